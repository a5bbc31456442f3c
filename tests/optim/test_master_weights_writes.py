"""Weights that somebody else writes, and groups that change: masters follow, and nothing outlives its parameter."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import SAM
from tests.helpers.compare import assert_same_bits
from tests.optim.family_runs import make
from tests.optim.master_problem import assert_whole, closure_of, look, masters_of, params_of, run

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("error::UserWarning")]

F32, F16, B16 = torch.float32, torch.float16, torch.bfloat16
SGD, ADAMW, RMSPROP = "sgd-momentum", "adamw", "rmsprop"


def add_one(params: list[nn.Parameter]) -> None:
    for param in params:
        param.add_(1.0)


def swap_twice(params: list[nn.Parameter]) -> None:
    for param in params:
        kept = param.clone()
        param.mul_(0.5)
        param.copy_(kept)


def other_storage(params: list[nn.Parameter]) -> None:
    params[1].data = params[1] + 1.0


def other_order(params: list[nn.Parameter]) -> None:
    params[1].data = params[1].t().contiguous().t()


SEEN = (
    "were written by somebody else since the last step; where they are no longer their masters' rounding, the masters now have their values"
)
WRITES = [(add_one, True), (other_storage, True), (swap_twice, False), (other_order, False)]


@pytest.mark.parametrize("base", [SGD, RMSPROP])
@pytest.mark.parametrize(("write", "is_other"), WRITES)
def test_masters_follow_other_values_alone(base: str, write: Callable[..., None], is_other: bool) -> None:
    """After an odd number of steps, so that nothing but the write is looked for."""
    found = []
    for writes in (False, True):
        params = params_of((B16, F16, B16))
        optimizer = make("SAM", params, base, master_weights=True)
        run(optimizer, params, range(4))
        if writes:
            with torch.no_grad():
                write(params)
        start = [param.detach().float() for param in params]
        if writes and is_other:
            with pytest.warns(UserWarning, match=SEEN) as warned:
                run(optimizer, params, range(4, 7))
            assert len(warned) == 1
        else:
            run(optimizer, params, range(4, 7))
        assert_whole(optimizer, params)
        for param, master in zip(params, masters_of(optimizer), strict=True):
            assert master is not None
            assert master.stride() == param.stride()
        found.append((start, params, [each for each in masters_of(optimizer) if each is not None]))
    (start, _, masters), (start_after, _, masters_after) = found
    if is_other:
        moved = [(after - before) - 1.0 for before, after in zip(start, start_after, strict=True)]
        assert max(float(each.abs().max()) for each in moved[1:2]) <= 2**-9  # of a float16 weight below 4
        assert all(float(each.min()) > 0.5 for each in [masters_after[1] - masters[1]])
    else:
        assert_same_bits("masters", masters_after, masters)


@pytest.mark.parametrize("base", [SGD, ADAMW, RMSPROP])
def test_the_master_of_a_parameter_without_a_first_gradient_follows_too(base: str) -> None:
    params = params_of(B16)
    optimizer = make("SAM", params, base, lr=0.0, master_weights=True)

    def step(i: int) -> None:
        def lack(call: int) -> None:
            if call == 1:
                params[0].grad = None

        optimizer.step(closure_of(params, 10 * i, spoil=lack))

    for i in range(3):
        step(i)
    with torch.no_grad():
        params[0].fill_(3.0)
    with pytest.warns(UserWarning, match=SEEN):
        step(3)
    assert_same_bits("the written parameter's master", masters_of(optimizer)[:1], [torch.full((5,), 3.0)])
    assert_whole(optimizer, params)


def test_clipped_weights_keep_the_masters_of_those_that_were_not() -> None:
    params = params_of(B16)
    optimizer = make("SAM", params, SGD, lr=0.05, master_weights=True)
    run(optimizer, params, range(1))

    def clip_and_look() -> None:
        masters = [master.clone() for master in masters_of(optimizer) if master is not None]
        clipped = [param.abs() > 1.0 for param in params]
        assert any(bool(where.any()) for where in clipped)
        with torch.no_grad():
            for param in params:
                param.clamp_(-1.0, 1.0)
        look(optimizer, params)
        right = [torch.where(where, master.sign(), master) for where, master in zip(clipped, masters, strict=True)]
        assert_same_bits("masters", masters_of(optimizer), right)

    with pytest.warns(UserWarning, match=SEEN) as warned:
        clip_and_look()
    run(optimizer, params, range(1, 3))
    clip_and_look()  # no second warning
    assert len(warned) == 1


def test_writes_through_data_are_noticed_in_time() -> None:
    """They leave no trace: bits are compared at steps 1, 2, 4, 8, …, and words are of their own."""
    params = params_of(B16)
    optimizer = make("SAM", params, SGD, master_weights=True)
    run(optimizer, params, range(4))
    for i in (4, 5, 6):
        params[0].data.add_(1.0)
        run(optimizer, params, range(i, i + 1))
        assert_whole(optimizer, params)
    params[0].data.add_(1.0)
    with pytest.warns(UserWarning, match=r"1 of 3 parameters .* written through \.data, which leaves no trace"):
        run(optimizer, params, range(7, 8))
    assert_whole(optimizer, params)


def test_not_a_number_is_no_write() -> None:
    params = params_of(B16)
    optimizer = make("SAM", params, SGD, master_weights=True, check_finite=False)
    run(optimizer, params, range(2))
    optimizer.step(closure_of(params, 20, spoil=lambda call: call == 2 and params[0].grad.fill_(torch.nan)))  # type: ignore[union-attr]
    assert params[0].isnan().all()
    run(optimizer, params, range(3, 6))


def test_a_model_of_another_dtype_in_mid_training() -> None:
    model = nn.Linear(6, 2).to(B16)
    optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=0.01, master_weights=True)
    params = list(model.parameters())

    def steps() -> None:
        for _ in range(2):
            for take in (optimizer.first_step, optimizer.second_step):
                for param in params:
                    param.grad = torch.ones_like(param)
                take()

    steps()
    model.to(F32)
    with pytest.warns(UserWarning, match=r"2 parameters have become torch.float32 .* rounded to 16 bits") as warned:
        steps()
    assert len(warned) == 1
    assert masters_of(optimizer) == [None, None]
    assert not any("master_param" in entry for entry in optimizer.state_dict()["state"].values())
    model.to(B16)
    steps()
    model.to(F16)
    with pytest.warns(UserWarning, match=SEEN):
        steps()
    assert_whole(optimizer, params)
    assert {value.dtype for entry in optimizer.state.values() for value in entry.values()} == {F32}


def test_a_parameter_of_another_shape_has_another_master() -> None:
    param = nn.Parameter(torch.ones(3, dtype=B16))
    optimizer = SAM([param], torch.optim.SGD, lr=0.125, rho=0.5, master_weights=True)
    for shape in ((3,), (2, 3)):
        param.data = torch.ones(shape, dtype=B16)
        for take in (optimizer.first_step, optimizer.second_step):
            param.grad = torch.ones_like(param)
            take()
        assert_same_bits("master", masters_of(optimizer), [torch.full(shape, 0.875)])


@pytest.mark.parametrize("has_masters", [False, True])
def test_writes_between_the_halves_are_kept_or_an_error(has_masters: bool) -> None:
    params = params_of(B16)
    optimizer = make("SAM", params, SGD, master_weights=has_masters)
    run(optimizer, params, range(2))
    kept = params[0].detach().clone()
    closure_of(params, 20)()
    optimizer.first_step()
    with torch.no_grad():
        params[1].fill_(3.0)
    closure_of(params, 21)()
    with pytest.raises(RuntimeError, match="1 of 3 parameters looked at were written between first_step and second_step"):
        optimizer.second_step()
    seen: list[list[Tensor]] = []
    with pytest.warns(UserWarning, match=SEEN) if has_masters else contextlib.nullcontext():
        optimizer.step(closure_of(params, 30, seen=seen))
    assert_same_bits("weights of the first call", seen[0][:2], [kept, torch.full_like(params[1], 3.0)])


# --- groups ---


def test_a_group_before_another_that_is_removed_between_the_halves_is_an_error() -> None:
    params = params_of(B16)
    optimizer = make("SAM", [{"params": [param]} for param in params], SGD, master_weights=True)
    run(optimizer, params, range(2))
    before, masters = [param.detach().clone() for param in params], [each.clone() for each in masters_of(optimizer) if each is not None]
    closure_of(params, 20)()
    optimizer.first_step()
    assert not torch.equal(params[2], before[2])
    del optimizer.param_groups[0]
    with pytest.raises(RuntimeError, match=r"param_groups\[0\] were perturbed as those of another group"):
        optimizer.second_step()
    look(optimizer, params)
    assert_same_bits("params", params, before)
    assert_same_bits("masters", masters_of(optimizer), masters[1:])


def test_nothing_outlives_parameters_that_left() -> None:
    """A group that is emptied, one that is removed, and the only parameter that had no master."""
    params = params_of((B16, F16, F32)) + params_of(B16)
    optimizer = make("SAM", [{"params": params[:3]}, {"params": params[3:4]}, {"params": params[4:5]}], ADAMW, master_weights=True)
    run(optimizer, params[:3], range(2))
    optimizer.add_param_group({"params": params[5:]})
    for _ in range(2):
        for take in (optimizer.first_step, optimizer.second_step):
            for param in params:
                param.grad = torch.ones_like(param)
            take()
    assert_whole(optimizer, params)
    gone = [weakref.ref(params.pop(i)) for i in (5, 4, 3, 2)]
    del optimizer.param_groups[2:], param
    optimizer.param_groups[0]["params"] = params[:2]
    optimizer.param_groups[1]["params"].clear()
    for param in [param for param in optimizer.state if all(param is not each for each in params)]:
        del optimizer.state[param]
    del param
    for i in range(2):
        for take in (optimizer.first_step, optimizer.second_step):
            for each in params:
                each.grad = torch.full_like(each, float(i + 1))
            take()
    gc.collect()
    assert [each() for each in gone] == [None] * 4
    assert_whole(optimizer, params)
