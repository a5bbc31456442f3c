"""An optimizer and the base that it wraps are one: what is done to either is done to both, whatever methods the base has of its own."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.optim import SGD, AdamW

import sam_kernels
from tests.optim.family_runs import everything_of, make, memory_of, run
from tests.optim.own_bases import Annotated, Chained, Coded, Moded
from tests.optim.problem import assert_same_bits, loss_of, make_batch, make_model, through_a_file, twin, weights

SIDES = pytest.mark.parametrize("side", ["wrapper", "base"])
KEEPERS = ["SAM", "VaSSO", "FriendlySAM", "LookSAM"]


def sam(model: nn.Module, base: Any = SGD, **options: Any) -> Any:
    return sam_kernels.SAM(model.parameters(), base, **{"rho": 0.1, "lr": 0.1, **options})


def on(optimizer: Any, side: str) -> Any:
    return optimizer if side == "wrapper" else optimizer.base_optimizer


# --- bases with methods of their own ---


@pytest.mark.parametrize("base", [Coded, Chained, Annotated], ids=lambda base: base.__name__)
@pytest.mark.parametrize("how", ["file", "deepcopy", "pickle"])
def test_a_base_with_a_format_of_its_own_continues_bit_for_bit(base: Any, how: str) -> None:
    model = make_model()
    optimizer = sam(model, base, lr=0.05)
    run(optimizer, model, 3)
    if how == "file":
        other_model = twin(model)
        other = sam(other_model, base, lr=0.3, rho=0.7)
        other.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        other_model, other = copy.deepcopy((model, optimizer)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
    assert [(group["rho"], group["sam_step"]) for group in other.param_groups] == [(0.1, 3)] * len(other.param_groups)
    for net, each in ((model, optimizer), (other_model, other)):
        run(each, net, 3, start=3)
    assert_same_bits(everything_of(other, other_model), everything_of(optimizer, model))


@pytest.mark.parametrize("base", [Coded, Chained, Annotated], ids=lambda base: base.__name__)
def test_a_checkpoint_of_the_plain_base_is_loaded(base: Any) -> None:
    model = make_model()
    plain = base(model.parameters(), lr=0.05)
    loss_of(model, make_batch()).backward()
    plain.step()
    optimizer = sam(model, base, lr=0.3)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert_same_bits([v for s in optimizer.state.values() for v in s.values()], [v for s in plain.state.values() for v in s.values()])
    assert [group["rho"] for group in optimizer.param_groups] == [0.1] * len(optimizer.param_groups)
    run(optimizer, model, 1)


def test_averages_travel_beside_a_format_of_the_bases_own() -> None:
    model = make_model()
    optimizer = sam_kernels.VaSSO(model.parameters(), Chained, rho=0.1)
    run(optimizer, model, 2)
    other_model = twin(model)
    other = sam_kernels.VaSSO(other_model.parameters(), Chained, rho=0.1)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for net, each in ((model, optimizer), (other_model, other)):
        run(each, net, 2, start=2)
    assert_same_bits(everything_of(other, other_model), everything_of(optimizer, model))


def _lookahead(params: Any) -> Any:
    return pytest.importorskip("pytorch_optimizer").Lookahead(SGD(params, lr=0.1, momentum=0.9), k=2)


def _schedule_free(params: Any) -> Any:
    return pytest.importorskip("pytorch_optimizer").ScheduleFreeWrapper(SGD(params, lr=0.1))


@pytest.mark.parametrize("make_base", [_lookahead, _schedule_free])
def test_wrappers_of_other_packages_save_and_load(make_base: Callable[[Any], Any]) -> None:
    """They leave torch's constructor out, and call a part of their checkpoint ``base_optimizer``."""

    def made(net: nn.Module) -> Any:
        optimizer = sam_kernels.VaSSO(net.parameters(), make_base(list(net.parameters())), rho=0.2)
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer

    model = make_model()
    optimizer = made(model)
    run(optimizer, model, 3)
    other_model = twin(model)
    other = made(other_model)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, each in ((model, optimizer), (other_model, other)):
        run(each, net, 3, start=3)
    assert_same_bits(weights(other_model), weights(model))
    assert (other.param_groups[0]["sam_step"], other.param_groups[0]["rho"]) == (6, 0.2)


def test_what_a_base_overrides_is_reached() -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model[0].parameters(), Moded, lr=0.1)
    base = optimizer.base_optimizer
    base.calls.clear()
    optimizer.train()
    optimizer.eval()
    optimizer.zero_grad(set_to_none=False)
    optimizer.add_param_group({"params": list(model[2].parameters())})
    optimizer.load_state_dict(optimizer.state_dict())
    assert base.calls == ["train", "eval", "zero_grad False", "add_param_group", "state_dict", "load_state_dict"]


def test_a_base_without_modes_has_none_through_the_wrapper() -> None:
    optimizer = sam(make_model())
    assert not hasattr(optimizer, "train")
    assert not hasattr(optimizer, "eval")
    assert not hasattr(optimizer, "sync_lookahead")
    assert not hasattr(optimizer, "calls")


# --- either side ---


@pytest.mark.parametrize("name", KEEPERS)
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw", "rmsprop"])
@SIDES
def test_a_checkpoint_loaded_on_either_side_continues_alike(side: str, base: str, name: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters(), base)
    run(optimizer, model, 3)
    saved, start = through_a_file(optimizer.state_dict()), weights(model)
    run(optimizer, model, 2, start=3)
    other_model = make_model()
    other = make(name, other_model.parameters(), base)
    run(other, other_model, 2)
    with torch.no_grad():
        for param, value in zip(other_model.parameters(), start, strict=True):
            param.copy_(value)
    on(other, side).load_state_dict(saved)
    run(other, other_model, 2, start=3)
    assert_same_bits(everything_of(other, other_model), everything_of(optimizer, model))


@pytest.mark.parametrize("name", KEEPERS[1:])
@SIDES
def test_a_plain_checkpoint_forgets_averages_of_another_run(side: str, name: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters())
    run(optimizer, model, 2)
    assert memory_of(optimizer)
    on(optimizer, side).load_state_dict(SGD(model.parameters(), lr=0.1, momentum=0.9).state_dict())
    assert not memory_of(optimizer)


@SIDES
def test_functions_stay_after_a_load(side: str) -> None:
    model = make_model()
    optimizer = sam(model, rho=lambda t: 0.2 / t, lambd="1/t")
    on(optimizer, side).load_state_dict(through_a_file(optimizer.state_dict()))
    run(optimizer, model, 1)
    assert optimizer.param_groups[0]["rho"](2) == 0.1


@pytest.mark.parametrize("wrong", ["direction", "rho", "shape"])
@SIDES
def test_a_checkpoint_that_does_not_fit_changes_nothing(side: str, wrong: str) -> None:
    model = make_model()
    optimizer = make("VaSSO", model.parameters())
    run(optimizer, model, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    if wrong == "direction":
        saved["param_groups"][0]["direction"] = "friendly"
    elif wrong == "rho":
        saved["param_groups"][0]["rho"] = -1.0
    else:
        saved["state"][0]["direction_average"] = torch.zeros(2)
    for entry in saved["state"].values():
        entry["momentum_buffer"].fill_(7.0)
    before, groups = everything_of(optimizer, model), dict(optimizer.param_groups[0])
    with pytest.raises(ValueError, match="SAM: "):
        on(optimizer, side).load_state_dict(saved)
    assert_same_bits(everything_of(optimizer, model), before)
    assert optimizer.param_groups[0] == groups


@SIDES
def test_too_few_groups_are_torchs_error(side: str) -> None:
    model = make_model()
    optimizer = sam(model)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        on(optimizer, side).load_state_dict({"state": {}, "param_groups": []})


@SIDES
def test_a_group_added_on_either_side_takes_part(side: str) -> None:
    model = make_model()
    other = twin(model)
    whole = sam(other, momentum=0.9)
    optimizer = sam_kernels.SAM(model[0].parameters(), SGD, rho=0.1, lr=0.1, momentum=0.9)
    on(optimizer, side).add_param_group({"params": list(model[2].parameters())})
    for net, each in ((model, optimizer), (other, whole)):
        run(each, net, 3)
    for got, expected in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@SIDES
def test_state_assigned_on_either_side_is_stepped_with(side: str) -> None:
    model = make_model()
    optimizer, other = sam(model, momentum=0.9), twin(model)
    fresh = sam(other, momentum=0.9)
    run(optimizer, model, 2)
    run(fresh, other, 2)
    on(optimizer, side).state = type(optimizer.state)(dict)
    fresh.state.clear()
    assert optimizer.state is optimizer.base_optimizer.state
    for net, each in ((model, optimizer), (other, fresh)):
        run(each, net, 1)
    assert_same_bits(everything_of(optimizer, model), everything_of(fresh, other))


@pytest.mark.parametrize("how", ["list", "item", "appended"])
@SIDES
def test_groups_assigned_on_either_side_get_sams_options(side: str, how: str) -> None:
    model = make_model()
    optimizer = sam(model, rho=0.3)
    run(optimizer, model, 2)
    plain = [
        {key: value for key, value in group.items() if key in SGD(model.parameters()).defaults or key == "params"}
        for group in optimizer.param_groups
    ]
    if how == "list":
        on(optimizer, side).param_groups = plain
    elif how == "item":
        on(optimizer, side).param_groups[0] = plain[0]
    else:
        on(optimizer, side).param_groups.append({**plain[0], "params": [nn.Parameter(torch.ones(2))]})
    run(optimizer, model, 1)
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    assert [(group["rho"], group["sam_step"]) for group in optimizer.param_groups] == [(0.3, 3)] * len(optimizer.param_groups)


@SIDES
def test_a_scheduler_on_either_side_goes_on_after_a_load_on_the_other(side: str) -> None:
    model = make_model()
    optimizer = sam(model, lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(on(optimizer, side), 1, 0.5)
        run(optimizer, model, 1)
        scheduler.step()
        on(optimizer, "base" if side == "wrapper" else "wrapper").load_state_dict(copy.deepcopy(optimizer.state_dict()))
        run(optimizer, model, 1)
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == optimizer.base_optimizer.param_groups[0]["lr"] == 0.25


def test_a_mixture_of_both_sides_is_one_optimizer() -> None:
    model = make_model()
    first, second = list(model[0].parameters()), list(model[2].parameters())
    optimizer = sam_kernels.VaSSO(first, AdamW, lr=0.01, rho=0.1)
    run(optimizer, model, 1)
    optimizer.base_optimizer.add_param_group({"params": second, "lr": 0.02})
    run(optimizer, model, 1)
    saved, start = through_a_file(optimizer.base_optimizer.state_dict()), weights(model)
    assert [group["lr"] for group in saved["param_groups"]] == [0.01, 0.02]
    optimizer.base_optimizer.param_groups = list(optimizer.param_groups)
    optimizer.state = optimizer.state
    whole = copy.deepcopy(optimizer.state_dict())
    run(optimizer, model, 2)
    other_model = twin(model)
    with torch.no_grad():
        for param, value in zip(other_model.parameters(), start, strict=True):
            param.copy_(value)
    other = sam_kernels.VaSSO([{"params": other_model[0].parameters()}, {"params": other_model[2].parameters()}], AdamW, lr=0.5, rho=0.4)
    other.base_optimizer.load_state_dict(whole)
    run(other, other_model, 2)
    assert_same_bits(everything_of(other, other_model), everything_of(optimizer, model))


def test_a_base_that_loaded_a_checkpoint_before_it_was_wrapped_continues_alike() -> None:
    model = make_model()
    optimizer = sam_kernels.VaSSO(model.parameters(), AdamW, lr=0.01, rho=lambda t: 0.1)
    run(optimizer, model, 2)
    other_model = twin(model)
    base = AdamW(other_model.parameters(), lr=0.5)
    base.load_state_dict(through_a_file(optimizer.state_dict()))
    other = sam_kernels.VaSSO(other_model.parameters(), base, rho=lambda t: 0.1)
    for net, each in ((model, optimizer), (other_model, other)):
        run(each, net, 2)
    assert_same_bits(everything_of(other, other_model), everything_of(optimizer, model))
    assert "direction" not in other.param_groups[0]


def test_a_wrapper_that_is_gone_leaves_no_hook_on_its_base() -> None:
    model = make_model()
    base = SGD(model.parameters(), lr=0.1)
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
    optimizer = sam_kernels.SAM(model.parameters(), base)
    assert [len(getattr(base, each)) for each in hooks] == [1, 1, 1]
    del optimizer
    gc.collect()
    assert [len(getattr(base, each)) for each in hooks] == [0, 0, 0]


def test_a_shallow_copy_shares_the_base() -> None:
    model = make_model()
    optimizer = sam(model, momentum=0.9)
    run(optimizer, model, 1)
    other = copy.copy(optimizer)
    assert other.base_optimizer is optimizer.base_optimizer
    other.param_groups[0]["lr"] = 0.5
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("name", KEEPERS)
@SIDES
def test_distributed_checkpoint_on_either_side(side: str, name: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters(), "adamw")
    run(optimizer, model, 3)
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    start = weights(model)
    run(optimizer, model, 1)
    other_model = make_model()
    other = make(name, other_model.parameters(), "adamw")
    with torch.no_grad():
        for param, value in zip(other_model.parameters(), start, strict=True):
            param.copy_(value)
    dcp.set_optimizer_state_dict(other_model, on(other, side), saved)
    run(other, other_model, 1)
    assert_same_bits(everything_of(other, other_model), everything_of(optimizer, model))


@pytest.mark.parametrize("where", ["instance", "class", "torch"])
def test_zero_grad_is_the_bases_where_somebody_has_replaced_it(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(torch.optim.SGD):
        pass

    model, calls = make_model(), []
    optimizer = sam_kernels.SAM(model.parameters(), Own, lr=0.1)
    owner: Any = {"instance": optimizer.base_optimizer, "class": Own, "torch": torch.optim.Optimizer}[where]
    monkeypatch.setattr(owner, "zero_grad", lambda *_, **options: calls.append(options))
    optimizer.zero_grad()
    assert calls == [{"set_to_none": True}]
