"""Rows 1–3 of the behaviours in docs/internals/contracts.md: checkpoints, copies, schedulers, hooks, torch.distributed.checkpoint."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import state_dict as dcp

import sam_kernels
from tests.optim.problem import assert_same_bits, closure_of, loss_of, make_batch, make_model, twin, weights

BASES = [
    pytest.param(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, id="sgd-momentum"),
    pytest.param(torch.optim.Adam, {"lr": 0.01}, id="adam"),
    pytest.param(torch.optim.AdamW, {"lr": 0.01}, id="adamw"),
    pytest.param(torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9}, id="rmsprop"),
]


def train(model: Any, optimizer: Any, scheduler: Any, steps: int) -> None:
    for k in range(steps):
        optimizer.step(closure_of(optimizer, model, make_batch(next(model.parameters()).dtype, seed=k)))
        scheduler.step()


@pytest.mark.parametrize(("base", "kwargs"), BASES)
def test_row_01_save_load_continue_is_bit_exact(base: Any, kwargs: dict[str, Any]) -> None:
    def make(model: Any) -> tuple[Any, Any]:
        optimizer = sam_kernels.UnifiedSAM(model.parameters(), base, lambd="1/t", rho="0.1/k^0.5", **kwargs)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)

    model = make_model()
    optimizer, scheduler = make(model)
    train(model, optimizer, scheduler, 5)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file)
    train(model, optimizer, scheduler, 5)

    resumed_model = make_model()
    resumed, resumed_scheduler = make(resumed_model)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    resumed_scheduler.load_state_dict(saved["scheduler"])
    assert resumed.param_groups[0]["sam_step"] == 5
    train(resumed_model, resumed, resumed_scheduler, 5)
    assert_same_bits(weights(resumed_model), weights(model))


def test_row_01_a_checkpoint_carries_no_copy_of_the_weights() -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer.step(closure_of(optimizer, model, make_batch()))
    assert all(set(state) == {"momentum_buffer"} for state in optimizer.state_dict()["state"].values())


def test_row_01_checkpoints_are_interchangeable_with_the_base_optimizer() -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.AdamW, lr=0.01, rho=0.07)
    optimizer.step(closure_of(optimizer, model, make_batch()))
    plain = torch.optim.AdamW(model.parameters(), lr=0.5)
    plain.load_state_dict(optimizer.state_dict())
    assert plain.param_groups[0]["lr"] == 0.01
    back = sam_kernels.SAM(model.parameters(), torch.optim.AdamW, rho=0.03)
    original = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss_of(model, make_batch()).backward()
    original.step()
    back.load_state_dict(original.state_dict())
    assert back.param_groups[0]["rho"] == 0.03  # not in the checkpoint: stays
    assert back.param_groups[0]["lr"] == 0.01
    assert torch.equal(next(iter(back.state.values()))["exp_avg"], next(iter(original.state.values()))["exp_avg"])


def test_row_01_callables_stay_with_the_program() -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=lambda t: 0.1 / t)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["rho"] is None
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["rho"](2) == 0.05


@pytest.mark.parametrize("scheduled", [lambda t: 0.1 / t, sam_kernels.schedules.Tail(0.1, start=3)], ids=["function", "radius"])
def test_row_01_a_number_for_a_function_and_a_function_for_a_number_are_told(scheduled: Any) -> None:
    model = make_model()
    numbered, following = (sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=rho) for rho in (0.05, scheduled))
    with pytest.warns(UserWarning, match=r"param_groups\[0\]\['rho'\] was a function when .* and is 0.05 here"):
        numbered.load_state_dict(following.state_dict())
    assert numbered.param_groups[0]["rho"] == 0.05
    saved = numbered.state_dict()
    saved["param_groups"][0]["rho"] = None
    following.load_state_dict(saved)
    assert following.param_groups[0]["rho"] is scheduled
    with pytest.warns(UserWarning, match=r"\['rho'\] is 0.05 in the checkpoint, and takes the place of the function .* None in the"):
        following.load_state_dict(numbered.state_dict())
    assert following.param_groups[0]["rho"] == 0.05


def test_row_01_float32_state_of_bfloat16_parameters_survives() -> None:
    model = make_model(torch.bfloat16)
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer.step(closure_of(optimizer, model, make_batch(torch.bfloat16)))
    for state in optimizer.state.values():
        state["momentum_buffer"] = torch.full_like(state["momentum_buffer"], 1.0, dtype=torch.float32) + 2.0**-12
    saved = optimizer.state_dict()
    resumed = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    resumed.load_state_dict(saved)
    for state in resumed.state.values():
        assert state["momentum_buffer"].dtype is torch.float32
        assert (state["momentum_buffer"] == 1.0 + 2.0**-12).all()
    resumed.step(closure_of(resumed, model, make_batch(torch.bfloat16)))
    assert all(state["momentum_buffer"].dtype is torch.float32 for state in resumed.state.values())


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize(("base", "kwargs"), BASES)
def test_row_02_copies_continue_alike(how: str, base: Any, kwargs: dict[str, Any]) -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), base, rho=0.1, max_grad_norm=1.0, **kwargs)
    optimizer.step(closure_of(optimizer, model, make_batch()))
    copied_model, copied = copy.deepcopy((model, optimizer)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
    assert copied.base_optimizer is not optimizer.base_optimizer
    assert copied.param_groups is copied.base_optimizer.param_groups
    assert copied.state is copied.base_optimizer.state
    for k in range(3):
        optimizer.step(closure_of(optimizer, model, make_batch(seed=k)))
        copied.step(closure_of(copied, copied_model, make_batch(seed=k)))
    assert_same_bits(weights(copied_model), weights(model))


def test_row_02_add_param_group() -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model[0].parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9)
    optimizer.step(closure_of(optimizer, model, make_batch()))
    optimizer.add_param_group({"params": list(model[2].parameters()), "rho": 0.2, "lr": 0.5})
    assert len(optimizer.base_optimizer.param_groups) == 2
    group = optimizer.param_groups[1]
    assert (group["rho"], group["lr"], group["momentum"], group["lambd"], group["sam_step"]) == (0.2, 0.5, 0.9, 1.0, 1)
    before = weights(model)
    optimizer.step(closure_of(optimizer, model, make_batch()))
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


@pytest.mark.parametrize("api", ["closure", "two-step"])
@pytest.mark.parametrize("on", ["sam", "base"])
def test_row_02_schedulers_work_without_the_false_warning(api: str, on: str) -> None:
    model, batch = make_model(), make_batch()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer if on == "sam" else optimizer.base_optimizer, step_size=1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k in range(3):
            assert optimizer.param_groups[0]["lr"] == optimizer.base_optimizer.param_groups[0]["lr"] == 0.5**k
            if api == "closure":
                optimizer.step(closure_of(optimizer, model, batch))
            else:
                loss_of(model, batch).backward()
                optimizer.first_step(zero_grad=True)
                loss_of(model, batch).backward()
                optimizer.second_step(zero_grad=True)
            scheduler.step()


@pytest.mark.parametrize("api", ["closure", "two-step"])
def test_row_02_step_hooks_fire_once_a_step(api: str) -> None:
    model, batch = make_model(), make_batch()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.base_optimizer.register_step_post_hook(lambda *_: calls.append("base"))
    if api == "closure":
        optimizer.step(closure_of(optimizer, model, batch))
    else:
        loss_of(model, batch).backward()
        optimizer.first_step(zero_grad=True)
        loss_of(model, batch).backward()
        optimizer.second_step()
    assert calls == ["pre", "base", "post"]


def test_row_02_a_base_that_is_listened_to_steps_as_the_fused_one() -> None:
    model, batch = make_model(torch.float64), make_batch(torch.float64)
    other = twin(model)
    fused = sam_kernels.SAM(model.parameters(), torch.optim.AdamW, lr=0.01)
    heard = sam_kernels.SAM(other.parameters(), torch.optim.AdamW, lr=0.01)
    heard.base_optimizer.register_step_post_hook(lambda *_: None)
    for _ in range(3):
        fused.step(closure_of(fused, model, batch))
        heard.step(closure_of(heard, other, batch))
    for got, expected in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-14)


def test_row_02_step_without_closure_is_a_plain_base_step() -> None:
    model, batch = make_model(), make_batch()
    other = twin(model)
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    plain = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        plain.zero_grad()
        loss_of(model, batch).backward()
        loss_of(other, batch).backward()
        assert optimizer.step() is None
        plain.step()
    assert_same_bits(weights(model), weights(other))


def test_row_02_changing_lr_after_load_takes_effect() -> None:
    model, batch = make_model(), make_batch()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    before = weights(model)
    optimizer.step(closure_of(optimizer, model, batch))
    assert_same_bits(weights(model), before)


def test_row_03_distributed_checkpoint_keeps_the_momentum() -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    train(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0), 3)
    saved = dcp.get_optimizer_state_dict(model, optimizer)
    assert "momentum_buffer" in saved["state"]["0.weight"]

    resumed_model = make_model()
    resumed_model.load_state_dict(model.state_dict())
    resumed = sam_kernels.SAM(resumed_model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    dcp.get_optimizer_state_dict(resumed_model, resumed)  # on a fresh optimizer: calls step(closure=None) itself
    dcp.set_optimizer_state_dict(resumed_model, resumed, copy.deepcopy(saved))  # torch loads tensors without copying them
    assert resumed.param_groups[0]["sam_step"] == 3
    for k in range(3):
        optimizer.step(closure_of(optimizer, model, make_batch(seed=k)))
        resumed.step(closure_of(resumed, resumed_model, make_batch(seed=k)))
    assert_same_bits(weights(resumed_model), weights(model))
