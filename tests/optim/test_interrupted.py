"""Row 7, the narrow case: Ctrl-C while the weights are being perturbed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sam_kernels
from sam_kernels.operations import Operands, Perturb
from sam_kernels.validation.backends import backend_of
from tests.optim.problem import BACKENDS, assert_same_bits, closure_of, loss_of, make_batch, make_model, weights


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("interrupted_group", [0, 1])
@pytest.mark.parametrize("api", ["closure", "two-step"])
def test_row_07_interrupt_around_a_perturbation(
    monkeypatch: pytest.MonkeyPatch, name: str, done: bool, interrupted_group: int, api: str
) -> None:
    model, batch = make_model(), make_batch()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]
    optimizer = sam_kernels.SAM(groups, torch.optim.SGD, rho=0.5, lr=0.1)
    backend = backend_of(name)
    real, calls = backend.operations[Perturb], []

    def perturb_(op: Perturb, lists: Operands) -> None:
        calls.append(1)
        if len(calls) == 3 + interrupted_group:
            if done:
                real(op, lists)
            raise KeyboardInterrupt
        real(op, lists)

    monkeypatch.setitem(backend.operations, Perturb, perturb_)
    with sam_kernels.use_backend(name):
        optimizer.step(closure_of(optimizer, model, batch))  # so that the backups hold an older step's weights
        before = weights(model)
        if api == "closure":
            with pytest.raises(KeyboardInterrupt):
                optimizer.step(closure_of(optimizer, model, batch))
        else:
            loss_of(model, batch).backward()
            with pytest.raises(KeyboardInterrupt):
                optimizer.first_step()
        assert_same_bits(weights(model), before)
        with pytest.raises(RuntimeError, match="call first_step first"):
            optimizer.second_step()
        optimizer.step(closure_of(optimizer, model, batch))
    assert not torch.equal(weights(model)[0], before[0])


def test_a_group_that_is_removed_between_the_halves_has_its_weights_again() -> None:
    left, right = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = sam_kernels.SAM([{"params": [left]}, {"params": [right]}], torch.optim.SGD, lr=0.1, rho=0.1)
    for param in (left, right):
        param.grad = torch.full_like(param, 2.0)
    optimizer.first_step()
    assert not torch.equal(right, torch.ones(3))
    del optimizer.param_groups[1]
    optimizer.second_step()
    assert torch.equal(right, torch.ones(3))
    assert torch.allclose(left, torch.full((3,), 0.8))
