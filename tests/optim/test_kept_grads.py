"""Gradients of the first pass, kept until the descent: taken over where nobody else has them, copied where somebody does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sam_kernels
from sam_kernels.optim._engine.kept_grads import KeptGrads
from sam_kernels.optim._engine.passes import Passes


def _optimizer() -> tuple[list[torch.nn.Parameter], Passes, list[dict[str, object]]]:
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 2), (4,), (1,))]
    optimizer = sam_kernels.GSAM(params, torch.optim.SGD, rho=0.1, lr=0.1)
    return params, optimizer._passes, optimizer.param_groups


def _fill(params: list[torch.nn.Parameter], number: float) -> None:
    for param in params:
        param.grad = torch.full_like(param, number)


def _kept(
    params: list[torch.nn.Parameter], passes: Passes, groups: list[dict[str, object]], kept: KeptGrads, *, hand_over: bool
) -> list[Tensor]:
    kept.keep(passes.lists.group_grads(groups), hand_over=hand_over)
    _fill(params, -1.0)  # the second pass
    return kept.of(passes.lists.group_grads(groups)[0])


@pytest.mark.parametrize("hand_over", [True, False])
def test_values_step_after_step(hand_over: bool) -> None:
    params, passes, groups = _optimizer()
    kept = KeptGrads()
    for number in (1.0, 2.0, 3.0):
        _fill(params, number)
        found = _kept(params, passes, groups, kept, hand_over=hand_over)
        assert all(torch.equal(tensor, torch.full_like(tensor, number)) for tensor in found)
        kept.forget()


def test_what_nobody_else_has_is_not_copied() -> None:
    params, passes, groups = _optimizer()
    _fill(params, 1.0)
    places = [param.grad.data_ptr() for param in params if param.grad is not None]
    assert [tensor.data_ptr() for tensor in _kept(params, passes, groups, KeptGrads(), hand_over=True)] == places


def test_what_the_caller_keeps_is_copied_and_may_be_written() -> None:
    params, passes, groups = _optimizer()
    _fill(params, 1.0)
    callers = params[1].grad
    assert callers is not None
    kept = KeptGrads()
    kept.keep(passes.lists.group_grads(groups), hand_over=True)
    assert params[1].grad is callers
    assert params[0].grad is None
    _fill(params, -1.0)
    callers.fill_(7.0)
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in kept.of(passes.lists.group_grads(groups)[0]))


def test_copies_are_made_once_and_follow_who_has_a_gradient() -> None:
    params, passes, groups = _optimizer()
    kept = KeptGrads()
    _fill(params, 1.0)
    first = [tensor.data_ptr() for tensor in _kept(params, passes, groups, kept, hand_over=False)]
    _fill(params, 2.0)
    assert [tensor.data_ptr() for tensor in _kept(params, passes, groups, kept, hand_over=False)] == first
    _fill(params, 3.0)
    params[1].grad = None
    kept.keep(passes.lists.group_grads(groups), hand_over=False)
    _fill(params, -1.0)
    numbers = [tensor.unique().tolist() for tensor in kept.of(passes.lists.group_grads(groups)[0])]
    assert numbers == [[3.0], [0.0], [3.0]]
    kept.release()
    _fill(params, 4.0)
    assert [tensor.unique().tolist() for tensor in _kept(params, passes, groups, kept, hand_over=False)] == [[4.0]] * 3


def test_another_memory_order_gets_copies_of_its_own() -> None:
    params = [torch.nn.Parameter(torch.randn(2, 3))]
    optimizer = sam_kernels.GSAM(params, torch.optim.SGD, rho=0.1, lr=0.1)
    kept = KeptGrads()
    for grad in (torch.randn(2, 3), torch.randn(3, 2).t(), torch.randn(2, 3)):
        params[0].grad = grad
        kept.keep(optimizer._passes.lists.group_grads(optimizer.param_groups), hand_over=False)
        assert torch.equal(kept.of(optimizer._passes.lists.group_grads(optimizer.param_groups)[0])[0], grad)
