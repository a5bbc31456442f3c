"""Flat checkpoints of ``torch.distributed.checkpoint`` (``flatten_optimizer_state_dict=True``), and those that do not fit."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

import sam_kernels
from sam_kernels.optim.directions import VarianceSuppressed
from tests.optim.family_runs import CASES, everything_of, make, run
from tests.optim.problem import assert_same_bits, make_model, through_a_file, twin, weights

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
FORMS = pytest.mark.parametrize("options", [StateDictOptions(), FLAT], ids=["nested", "flat"])
SIDES = pytest.mark.parametrize("side", ["wrapper", "base"])


def on(optimizer: Any, side: str) -> Any:
    return optimizer if side == "wrapper" else optimizer.base_optimizer


def saved_by(optimizer: Any, model: nn.Module, options: StateDictOptions) -> Any:
    return through_a_file(get_optimizer_state_dict(model, optimizer, options=options))


def assert_refused(
    optimizer: Any, model: nn.Module, saved: Any, options: StateDictOptions, error: Any, words: str, side: str = "wrapper"
) -> None:
    """Raises, and weights, state and groups are as before."""
    before, groups = everything_of(optimizer, model), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(error, match=words):
        set_optimizer_state_dict(model, on(optimizer, side), saved, options=options)
    assert_same_bits(everything_of(optimizer, model), before)
    assert optimizer.state_dict()["param_groups"] == groups


@pytest.mark.parametrize(("name", "base"), CASES)
@SIDES
def test_a_flat_checkpoint_is_continued(name: str, base: str, side: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters(), base)
    run(optimizer, model, 3)
    saved, start = saved_by(optimizer, model, FLAT), weights(model)
    assert all(key.startswith(("state.", "param_groups.")) for key in saved)
    other_model = make_model()
    other = make(name, other_model.parameters(), base)
    with torch.no_grad():
        for param, value in zip(other_model.parameters(), start, strict=True):
            param.copy_(value)
    set_optimizer_state_dict(other_model, on(other, side), saved, options=FLAT)
    for net, each in ((model, optimizer), (other_model, other)):
        run(each, net, 3, start=3)
    assert_same_bits(everything_of(other, other_model), everything_of(optimizer, model))
    assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()


MEMBERS = [
    ("SAM", "VaSSO"),
    ("VaSSO", "SAM"),
    ("VaSSO", "FriendlySAM"),
    ("LookSAM", "SAM"),
    ("GSAM", "LookSAM"),
    ("RSAM", "SAM"),
]


@pytest.mark.parametrize(("saver", "loader"), MEMBERS)
@FORMS
@SIDES
def test_another_members_checkpoint_is_refused(saver: str, loader: str, options: StateDictOptions, side: str) -> None:
    model = make_model()
    other = twin(model)
    source, optimizer = make(saver, other.parameters()), make(loader, model.parameters())
    run(source, other, 2)
    run(optimizer, model, 2)
    words = r"the checkpoint is of (direction|descent) '[\w-]+', this optimizer has"
    assert_refused(optimizer, model, saved_by(source, other, options), options, ValueError, words, side)


@pytest.mark.parametrize(("saver", "loader"), [("VaSSO", "SAM"), ("VaSSO", "FriendlySAM"), ("GSAM", "SAM"), ("LookSAM", "GSAM")])
@FORMS
def test_what_a_checkpoint_is_filled_into_has_a_key_that_no_other_members_has(saver: str, loader: str, options: StateDictOptions) -> None:
    """dcp.load fills live tensors, and raises beforehand where a key is missing from the checkpoint."""
    keys = []
    for name in (saver, loader):
        model = make_model()
        found = get_optimizer_state_dict(model, make(name, model.parameters()), options=options)
        keys.append(set(found) if options.flatten_optimizer_state_dict else set(found["param_groups"][0]))
    assert keys[1] - keys[0]


@pytest.mark.parametrize(
    ("saver", "loader"), [("sgd-momentum", "adamw"), ("adamw", "sgd-momentum"), ("adam", "adamw"), ("rmsprop", "adamw")]
)
@FORMS
def test_a_checkpoint_of_another_base_is_refused(saver: str, loader: str, options: StateDictOptions) -> None:
    bases = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop, "sgd-momentum": torch.optim.SGD}
    made = []
    for name in (saver, loader):
        model = make_model()
        more = {"momentum": 0.9} if name == "sgd-momentum" else {}
        made.append((sam_kernels.SAM(model.parameters(), bases[name], rho=0.1, lr=0.01, **more), model))
        run(*made[-1], 2)
    (source, other), (optimizer, model) = made
    error = KeyError if options.flatten_optimizer_state_dict and saver != "adam" else ValueError  # torch's: an option that is not there
    words = (
        r"param_groups\."
        if error is KeyError
        else f"is of gradient/plain/{bases[saver].__name__} .*this optimizer is gradient/plain/(AdamW|SGD)"
    )
    assert_refused(optimizer, model, saved_by(source, other, options), options, error, words)


@pytest.mark.parametrize("side", ["wrapper", "base"])
def test_state_of_another_optimizer_than_the_base_is_refused(side: str) -> None:
    model, other = make_model(), make_model()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=0.01)
    run(optimizer, model, 2)
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    other(torch.ones(2, next(other.parameters()).shape[-1])).sum().backward()
    plain.step()
    before = everything_of(optimizer, model)
    with pytest.raises(ValueError, match="has 'momentum_buffer', which AdamW does not keep"):
        on(optimizer, side).load_state_dict(plain.state_dict())
    assert_same_bits(everything_of(optimizer, model), before)


@pytest.mark.parametrize(("key", "name"), [("momentum_buffer", "SAM"), ("direction_average", "VaSSO")])
@FORMS
def test_another_shape_is_refused(key: str, name: str, options: StateDictOptions) -> None:
    model = make_model()
    optimizer = make(name, model.parameters())
    run(optimizer, model, 2)
    saved = saved_by(optimizer, model, options)
    entry, full_key = (saved, f"state.2.weight.{key}") if options.flatten_optimizer_state_dict else (saved["state"]["2.weight"], key)
    entry[full_key] = entry[full_key][:-1]
    assert_refused(optimizer, model, saved, options, ValueError, rf"SAM: {key} in the checkpoint has shape \(\d+, \d+\), its parameter")


@FORMS
@SIDES
def test_more_parameters_are_refused_unless_strict_is_false(options: StateDictOptions, side: str) -> None:
    model = make_model()
    larger = nn.Sequential(*twin(model), nn.Linear(3, 3))
    source, optimizer = make("VaSSO", larger.parameters()), make("VaSSO", model.parameters())
    run(optimizer, model, 2)
    saved = saved_by(source, larger, options)
    words = r"the checkpoint has 2 parameters that the optimizer has not, such as '\d\.weight'; .*strict=False"
    assert_refused(optimizer, model, saved, options, ValueError, words, side)
    set_optimizer_state_dict(model, on(optimizer, side), saved, options=dataclasses.replace(options, strict=False))


def test_a_key_with_dots_in_a_group_is_no_parameter() -> None:
    model = make_model()
    optimizer = sam_kernels.SAM([{"params": list(model.parameters()), "my.own": 3}], torch.optim.SGD, rho=0.1, lr=0.1)
    saved = saved_by(optimizer, model, FLAT)
    set_optimizer_state_dict(model, optimizer, saved, options=FLAT)
    assert optimizer.param_groups[0]["my.own"] == 3


def test_two_optimizers_of_one_model_share_a_checkpoint() -> None:
    model = make_model()
    parts = [list(model[0].parameters()), list(model[2].parameters())]
    both = [make("VaSSO", parts[0]), make("SAM", parts[1])]
    for options in (StateDictOptions(), FLAT):
        saved = through_a_file(get_optimizer_state_dict(model, both, options=options))
        set_optimizer_state_dict(model, both, saved, options=options)


def test_what_the_loader_has_not_made_yet_is_loaded_too() -> None:
    """Torch takes the keys of live state from the flat form: here there are none, and the momentum is an option that is loaded."""
    model = make_model()
    optimizer = make("SAM", model.parameters(), momentum=0.9)
    run(optimizer, model, 3)
    saved = saved_by(optimizer, model, FLAT)
    other_model = twin(model)
    other = make("SAM", other_model.parameters(), momentum=0.0)
    set_optimizer_state_dict(other_model, other, saved, options=FLAT)
    for net, each in ((model, optimizer), (other_model, other)):
        run(each, net, 2, start=3)
    assert_same_bits(everything_of(other, other_model), everything_of(optimizer, model))


@pytest.mark.parametrize("key", ["exp_avg", "max_exp_avg_sq"])
def test_a_flat_checkpoint_without_an_entry_is_refused(key: str) -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.AdamW, rho=0.1, lr=0.01, amsgrad=key == "max_exp_avg_sq")
    run(optimizer, model, 2)
    saved = saved_by(optimizer, model, FLAT)
    del saved[f"state.2.weight.{key}"]
    assert_refused(optimizer, model, saved, FLAT, ValueError, f"SAM: the checkpoint has no '{key}' of '2.weight'")


def test_names_with_dots_and_slashes_are_told_apart() -> None:
    class Dotted(VarianceSuppressed):
        name = "my.own/direction"

    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, direction=Dotted(0.3))
    run(optimizer, model, 2)
    saved = saved_by(optimizer, model, FLAT)
    other_model = twin(model)
    other = sam_kernels.SAM(other_model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, direction=Dotted(0.3))
    set_optimizer_state_dict(other_model, other, saved, options=FLAT)
    for net, each in ((model, optimizer), (other_model, other)):
        run(each, net, 2, start=2)
    assert_same_bits(everything_of(other, other_model), everything_of(optimizer, model))


def test_a_checkpoint_without_marks_is_one_of_the_usual_names() -> None:
    """As earlier versions saved it."""
    model = make_model()
    for name in ("SAM", "VaSSO"):
        optimizer = make(name, model.parameters())
        run(optimizer, model, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            assert group.pop(next(key for key in group if key.startswith("sam_saved_by:"))) is True
        optimizer.load_state_dict(saved)


@FORMS
def test_a_base_that_has_state_from_the_start_is_asked_for_averages_too(options: StateDictOptions) -> None:
    """Torch then makes no step in which the others' state is made."""
    model = make_model()
    optimizer = sam_kernels.VaSSO(model.parameters(), torch.optim.Adagrad, rho=0.1, lr=0.1)
    before = get_optimizer_state_dict(model, optimizer, options=options)
    run(optimizer, model, 1)
    after = get_optimizer_state_dict(model, optimizer, options=options)
    states = (before, after) if options.flatten_optimizer_state_dict else (before["state"]["0.weight"], after["state"]["0.weight"])
    assert states[0].keys() == states[1].keys()
    assert any("direction_average" in key for key in states[0])
