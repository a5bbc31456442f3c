"""Every member is saved, copied and loaded with all that it keeps, and a checkpoint of another is refused as a whole."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict as dcp

import sam_kernels
from tests.optim.family import BASES, MEMBERS
from tests.optim.family_runs import CASES, ONE_CASE_EACH, everything_of, make, memory_of, run
from tests.optim.problem import assert_same_bits, closure_of, loss_of, make_batch, make_model, through_a_file, twin, weights

KEEPERS = ["VaSSO", "FriendlySAM", "LookSAM", "S2SAM"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "base"), CASES)
def test_save_load_continue_is_bit_exact(name: str, base: str, dtype: torch.dtype) -> None:
    def made(model: Any) -> tuple[Any, Any]:
        optimizer = make(name, model.parameters(), base)
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    model = make_model(dtype)
    optimizer, scheduler = made(model)
    run(optimizer, model, 4, after=scheduler.step)
    assert len(memory_of(optimizer)) == (len(weights(model)) if name in KEEPERS else 0)
    saved = through_a_file([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    run(optimizer, model, 4, start=4, after=scheduler.step)

    resumed_model = make_model(dtype)
    resumed, resumed_scheduler = made(resumed_model)
    for part, state in zip((resumed_model, resumed, resumed_scheduler), saved, strict=True):
        part.load_state_dict(state)
    run(resumed, resumed_model, 4, start=4, after=resumed_scheduler.step)
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert_same_bits(everything_of(resumed, resumed_model), everything_of(optimizer, model))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize(("name", "base"), ONE_CASE_EACH)
def test_copies_continue_alike_and_share_nothing(name: str, base: str, how: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters(), base)
    run(optimizer, model, 2)
    before = everything_of(optimizer, model)
    other_model, other = copy.deepcopy((model, optimizer)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
    run(other, other_model, 3, start=2)
    assert_same_bits(everything_of(optimizer, model), before)
    run(optimizer, model, 3, start=2)
    assert_same_bits(everything_of(other, other_model), everything_of(optimizer, model))


def test_a_loaded_checkpoint_is_a_copy() -> None:
    model = make_model()
    optimizer, other = make("VaSSO", model.parameters()), make("VaSSO", model.parameters())
    run(optimizer, model, 2)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    other.load_state_dict(saved)
    run(other, model, 2)
    for got, wanted in zip(saved["state"].values(), before["state"].values(), strict=True):
        assert torch.equal(got["direction_average"], wanted["direction_average"])


@pytest.mark.parametrize(("name", "base"), CASES)
def test_a_plain_checkpoint_of_the_base_is_loaded(name: str, base: str) -> None:
    model = make_model()
    base_class, kwargs = BASES[base]
    plain = base_class(model.parameters(), **{"lr": 0.02, **kwargs})
    for k in range(2):
        plain.step(closure_of(plain, model, make_batch(seed=k)))
    optimizer = make(name, model.parameters(), base)
    optimizer.load_state_dict(through_a_file(plain.state_dict()))
    assert optimizer.param_groups[0]["rho"] == MEMBERS[name].rho
    for param, state in plain.state.items():
        for key, value in state.items():
            assert torch.equal(optimizer.state[param][key], value)
    run(optimizer, model, 2)
    assert all(weight.isfinite().all() for weight in everything_of(optimizer, model))


PAIRS = [
    ("SAM", "VaSSO", "direction"),
    ("VaSSO", "SAM", "direction"),
    ("VaSSO", "FriendlySAM", "direction"),
    ("RSAM", "MomentumSAM", "direction"),
    ("S2SAM", "MomentumSAM", "direction"),
    ("GSAM", "WSAM-coupled", "descent"),
    ("WSAM-decoupled", "WSAM-coupled", "descent"),
    ("SAM", "LookSAM", "descent"),
    ("LookSAM", "SAM", "descent"),
    ("GCSAM", "GSAM", "direction"),
]


@pytest.mark.parametrize(("saved_by", "loaded_by", "what"), PAIRS)
def test_another_members_checkpoint_is_refused_and_changes_nothing(saved_by: str, loaded_by: str, what: str) -> None:
    model = make_model()
    other = twin(model)
    source, optimizer = make(saved_by, other.parameters()), make(loaded_by, model.parameters())
    run(source, other, 2)
    run(optimizer, model, 2)
    before, groups = everything_of(optimizer, model), copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=rf"the checkpoint is of {what} '[\w-]+', this optimizer has {what} '[\w-]+'"):
        optimizer.load_state_dict(through_a_file(source.state_dict()))
    assert_same_bits(everything_of(optimizer, model), before)
    assert optimizer.state_dict()["param_groups"] == groups


@pytest.mark.parametrize("name", KEEPERS)
@pytest.mark.parametrize("fault", ["shape", "groups of other sizes", "fewer parameters", "a hook that raises"])
def test_a_load_that_fails_leaves_the_optimizer_as_it_was(name: str, fault: str) -> None:
    model, other = make_model(), make_model()
    params = list(other.parameters())
    source = make(name, [{"params": params[:1]}, {"params": params[1:]}] if fault == "groups of other sizes" else params)
    params = list(model.parameters())
    optimizer = make(name, [{"params": params[:2]}, {"params": params[2:]}] if fault == "groups of other sizes" else params)
    run(source, other, 3)
    run(optimizer, model, 1)
    before, saved = everything_of(optimizer, model), copy.deepcopy(source.state_dict())
    if fault == "shape":
        key = next(key for key in saved["state"][3] if key in ("direction_average", "orthogonal_grad", "last_grad"))
        saved["state"][3][key] = torch.zeros(7)
    if fault == "fewer parameters":
        saved["param_groups"][0]["params"] = saved["param_groups"][0]["params"][:-1]
    if fault == "a hook that raises":

        def refuse(*_: Any) -> None:
            raise ValueError("no")

        optimizer.register_load_state_dict_pre_hook(refuse)
    with pytest.raises(ValueError, match=r"has shape \(7,\)|doesn't match|no"):
        optimizer.load_state_dict(saved)
    assert_same_bits(everything_of(optimizer, model), before)


@pytest.mark.parametrize(("name", "base"), CASES)
def test_the_plain_base_loads_what_a_member_saved_and_goes_on(name: str, base: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters(), base)
    run(optimizer, model, 3)
    base_class, _ = BASES[base]
    other = twin(model)
    plain, expected = base_class(other.parameters(), lr=0.5), optimizer.base_optimizer
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    for k in range(2):
        plain.step(closure_of(plain, other, make_batch(seed=k)))
        closure_of(optimizer, model, make_batch(seed=k))()
        expected.step()
    assert_same_bits(weights(other), weights(model))


@pytest.mark.parametrize(("name", "base"), CASES)
def test_distributed_checkpoint_keeps_momentum_and_averages(name: str, base: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters(), base)
    run(optimizer, model, 3)
    saved = dcp.get_optimizer_state_dict(model, optimizer)

    resumed_model = make_model()
    resumed_model.load_state_dict(model.state_dict())
    resumed = make(name, resumed_model.parameters(), base)
    blank = dcp.get_optimizer_state_dict(resumed_model, resumed)  # what dcp.load fills, entry by entry
    assert set(blank["state"]) == set(saved["state"])
    for param_name, state in saved["state"].items():
        assert set(blank["state"][param_name]) == set(state)
        for key, value in state.items():
            blank["state"][param_name][key] = value.clone() if isinstance(value, Tensor) else value
    dcp.set_optimizer_state_dict(resumed_model, resumed, {**blank, "param_groups": copy.deepcopy(saved["param_groups"])})
    assert resumed.param_groups[0]["sam_step"] == 3
    assert_same_bits(memory_of(resumed), memory_of(optimizer))
    run(optimizer, model, 3, start=3)
    run(resumed, resumed_model, 3, start=3)
    assert_same_bits(everything_of(resumed, resumed_model), everything_of(optimizer, model))


@pytest.mark.parametrize("name", KEEPERS)
def test_a_parameter_that_never_trained_is_not_taken_for_initialised(name: str) -> None:
    """AdamW initialises a parameter whose state is empty, and only that."""
    model = make_model()
    model[0].bias.requires_grad_(False)
    optimizer = make(name, model.parameters(), "adamw")
    run(optimizer, model, 2)
    other = twin(model)
    plain = torch.optim.AdamW(other.parameters())
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    other[0].bias.requires_grad_(True)
    plain.step(closure_of(plain, other, make_batch()))
    assert int(plain.state[other[0].bias]["step"]) == 1


@pytest.mark.parametrize("name", list(MEMBERS))
def test_parameters_that_join_in_mid_training(name: str) -> None:
    """As if they had been there with no gradient until then."""
    model = make_model(torch.float64)
    other = twin(model)
    options = {"sigma": 0.0} if name == "RSAM" else {}  # Δ moves all that is there, with a gradient or without
    joined, waited = make(name, model[0].parameters(), **options), make(name, other.parameters(), **options)

    def step(optimizer: Any, net: Any, k: int, *, only_first: bool) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            net.zero_grad()
            loss = loss_of(net, make_batch(torch.float64, seed=k))
            loss.backward()
            if only_first:
                for param in net[2].parameters():
                    param.grad = None
            return loss

        optimizer.step(closure)

    for k in range(2):
        step(joined, model, k, only_first=True)
        step(waited, other, k, only_first=True)
    joined.add_param_group({"params": list(model[2].parameters())})
    assert joined.param_groups[1]["sam_step"] == 2
    for k in range(2, 5):
        step(joined, model, k, only_first=False)
        step(waited, other, k, only_first=False)
    for got, wanted in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)
    run(joined, model, 1)
    resumed = make(name, [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}], **options)
    resumed.load_state_dict(through_a_file(joined.state_dict()))
    assert_same_bits(memory_of(resumed), memory_of(joined))


def test_a_group_that_does_not_go_with_the_member_is_not_taken() -> None:
    first, second = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = sam_kernels.MomentumSAM([first], torch.optim.SGD, lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match=r"MomentumSAM: param_groups\[1\] has momentum=0"):
        optimizer.add_param_group({"params": [second], "momentum": 0.0})
    polyak = sam_kernels.SAMSPS([first])
    with pytest.raises(ValueError, match=r"SAMSPS: .* maximize=True \(param_groups\[1\]\)"):
        polyak.add_param_group({"params": [second], "maximize": True})
    assert len(optimizer.param_groups) == len(polyak.param_groups) == 1
