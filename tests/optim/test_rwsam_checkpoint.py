"""A checkpoint of RWSAM goes into RWSAM alone, in every form, and SAM's into no RWSAM; so do those of before, whose mark lacks the name."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import SGD

import sam_kernels
from tests.optim.problem import assert_same_bits, through_a_file, twin, weights
from tests.optim.rwsam_problem import build, losses_of, make_batch, make_model, state_of, train

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
FORMS: dict[str, StateDictOptions | None] = {
    "its own": None,
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
}
every_form = pytest.mark.parametrize("form", FORMS)
every_side = pytest.mark.parametrize("side", ["wrapper", "base"])
NAMES = ["RWSAM", "SAM"]
REFUSED = {"SAM": r"the checkpoint has 'beta' .* of RWSAM", "RWSAM": "RWSAM: the checkpoint has no 'beta'|param_groups.0.weight.beta"}


def make(name: str, model: nn.Module, base: Any = SGD, **options: Any) -> Any:
    options = {"rho": 0.1, "lr": 0.1, "momentum": 0.9, **options}
    return build(model, "exact", base, **options) if name == "RWSAM" else sam_kernels.SAM(model.parameters(), base, **options)


def run(name: str, model: nn.Module, optimizer: Any, steps: range) -> None:
    if name == "RWSAM":
        train(model, optimizer, steps, torch.float64)
        return
    for step in steps:

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = losses_of(model, make_batch(seed=step)).mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def made(name: str, steps: int = 2, **options: Any) -> tuple[nn.Module, Any]:
    model = make_model()
    optimizer = make(name, model, **options)
    run(name, model, optimizer, range(steps))
    return model, optimizer


def dict_of(optimizer: Any, model: nn.Module, form: str) -> Any:
    options = FORMS[form]
    return optimizer.state_dict() if options is None else get_optimizer_state_dict(model, optimizer, options=options)


def load(optimizer: Any, model: nn.Module, saved: Any, form: str) -> None:
    options = FORMS[form]
    if options is None:
        optimizer.load_state_dict(saved)
    else:
        set_optimizer_state_dict(model, optimizer, saved, options=options)


def as_before(saved: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint as versions without the name in the mark made it."""
    if "param_groups" in saved:
        return {**saved, "param_groups": [{key.removesuffix("/RWSAM"): value for key, value in g.items()} for g in saved["param_groups"]]}
    return {key.removesuffix("/RWSAM"): value for key, value in saved.items()}


def assert_refused(name: str, saved: Any, form: str, side: str = "wrapper") -> None:
    """Raises, and weights, state and groups are as before."""
    model, optimizer = made(name, 1)
    before, groups = [*weights(model), *state_of(optimizer)], copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises((ValueError, KeyError), match=REFUSED[name]):
        load(optimizer if side == "wrapper" else optimizer.base_optimizer, model, saved, form)
    assert_same_bits([*weights(model), *state_of(optimizer)], before)
    assert optimizer.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("saver", NAMES)
@every_form
@every_side
def test_what_weights_samples_and_what_does_not_refuse_each_others_checkpoint(saver: str, form: str, side: str) -> None:
    model, source = made(saver)
    loader = NAMES[1 - NAMES.index(saver)]
    assert_refused(loader, through_a_file(dict_of(source, model, form)), form, side)


@every_form
@pytest.mark.parametrize("how", ["now", "before"])
def test_a_checkpoint_of_rwsam_is_continued(form: str, how: str) -> None:
    model, optimizer = made("RWSAM")
    saved = through_a_file(dict_of(optimizer, model, form))
    if how == "before":
        saved, now = as_before(saved), saved
        assert saved.keys() != now.keys() or saved["param_groups"] != now["param_groups"]
    other_model = twin(model)
    other = make("RWSAM", other_model, beta=7.0, rho=0.2)
    load(other, other_model, saved, form)
    assert (other.param_groups[0]["beta"], other.param_groups[0]["rho"]) == (2.0, 0.1)
    for net, each in ((model, optimizer), (other_model, other)):
        run("RWSAM", net, each, range(2, 4))
    assert_same_bits([*weights(other_model), *state_of(other)], [*weights(model), *state_of(optimizer)])
    assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()


@every_form
def test_a_checkpoint_of_rwsam_as_before_is_refused_too(form: str) -> None:
    model, source = made("RWSAM", beta=lambda t: 2.0)  # saved as None
    assert_refused("SAM", as_before(through_a_file(dict_of(source, model, form))), form)


@pytest.mark.parametrize("form", ["nested", "flat"])
@pytest.mark.parametrize("saver", NAMES)
@pytest.mark.parametrize("loader", NAMES)
def test_what_is_filled_from_a_file_has_a_key_that_the_others_file_has_not(saver: str, loader: str, form: str, tmp_path: Path) -> None:
    model, source = made(saver)
    dcp.save({"optimizer": dict_of(source, model, form)}, checkpoint_id=tmp_path, no_dist=True)
    other_model, other = made(loader, 0)
    state = {"optimizer": dict_of(other, other_model, form)}
    if loader != saver:
        missing = {"SAM": "sam_saved_by:gradient/plain/SGD", "RWSAM": r"beta"}[loader]
        with pytest.raises(CheckpointException, match=rf"Missing key .*{missing}\.$"):
            dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        return
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    load(other, other_model, state["optimizer"], form)
    assert_same_bits(state_of(other), state_of(source))


@pytest.mark.parametrize("form", ["nested", "flat"])
def test_a_file_of_rwsam_as_before_is_filled_in_under_its_mark(form: str, tmp_path: Path) -> None:
    """As docs/migrating.md has it."""
    model, source = made("RWSAM")
    dcp.save({"optimizer": as_before(dict_of(source, model, form))}, checkpoint_id=tmp_path, no_dist=True)
    other_model, other = made("RWSAM", 0)
    state = {"optimizer": as_before(dict_of(other, other_model, form))}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    load(other, other_model, state["optimizer"], form)
    assert_same_bits(state_of(other), state_of(source))
    assert other.param_groups[0]["sam_step"] == 2


class WithBeta(SGD):
    """A base that has a ``beta`` of its own."""

    def __init__(self, params: Any, beta: float = 0.5, **options: Any) -> None:
        super().__init__(params, **options)
        self.defaults["beta"] = beta
        for group in self.param_groups:
            group["beta"] = beta


@pytest.mark.parametrize("how", ["now", "before"])
def test_the_bases_beta_is_not_taken_for_rwsams(how: str) -> None:
    model, optimizer = made("SAM", base=WithBeta)
    load(optimizer, model, through_a_file(optimizer.state_dict()), "its own")
    other, source = made("RWSAM", base=WithBeta)
    saved = through_a_file(source.state_dict())
    with pytest.raises(ValueError, match=r"the checkpoint has 'sam_beta' .* of RWSAM"):
        optimizer.load_state_dict(saved if how == "now" else as_before(saved))
    source.load_state_dict(saved if how == "now" else as_before(saved))
    run("RWSAM", other, source, range(1))


def test_a_beta_that_the_caller_has_put_into_a_group_is_the_callers() -> None:
    model = make_model()
    optimizer = sam_kernels.SAM([{"params": list(model.parameters()), "beta": 3}], SGD, rho=0.1, lr=0.1)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    assert optimizer.param_groups[0]["beta"] == 3
    _, source = made("RWSAM", momentum=0.0)
    with pytest.raises(ValueError, match="the checkpoint is of gradient/plain/SGD/RWSAM"):
        optimizer.load_state_dict(source.state_dict())


@pytest.mark.parametrize("loader", NAMES)
def test_values_that_both_have_are_loaded_as_the_errors_say(loader: str) -> None:
    _, source = made(NAMES[1 - NAMES.index(loader)])
    saved = through_a_file(source.state_dict())
    for group in saved["param_groups"]:
        if loader == "SAM":
            del group["beta"], group["sam_saved_by:gradient/plain/SGD/RWSAM"]
        else:
            group["beta"] = None
    _, optimizer = made(loader, 0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SAM: .*'beta'.* was a function")  # None
        optimizer.load_state_dict(saved)
    assert_same_bits(state_of(optimizer), state_of(source))
    assert optimizer.param_groups[0].get("beta") == {"SAM": None, "RWSAM": 2.0}[loader]
