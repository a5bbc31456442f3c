"""Row 8 of the behaviours in docs/internals/contracts.md: gradients that are not finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels.backends.native import CUDA_ON_HOST
from tests.optim.problem import assert_same_bits, closure_of, every_backend, every_base, make_batch, make_model, weights


@every_backend
@every_base
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bad_pass", [1, 2])
def test_row_08_non_finite_gradients_skip_the_step(backend: str, base: Any, kwargs: dict[str, Any], bad: float, bad_pass: int) -> None:
    model, batch = make_model(), make_batch()
    with sam_kernels.use_backend(backend):
        optimizer = sam_kernels.SAM(model.parameters(), base, **kwargs)
        optimizer.step(closure_of(optimizer, model, batch))
        before = weights(model)
        state = [value.clone() for s in optimizer.state.values() for value in s.values() if isinstance(value, Tensor)]
        passes = 0

        def closure() -> Tensor:
            nonlocal passes
            passes += 1
            loss = closure_of(optimizer, model, batch)()
            if passes == bad_pass:
                model[2].bias.grad[1] = bad  # type: ignore[index, union-attr]
            return loss

        optimizer.step(closure)
        assert_same_bits(weights(model), before)
        assert_same_bits([value for s in optimizer.state.values() for value in s.values() if isinstance(value, Tensor)], state)
        assert optimizer.skipped_steps == 1
        optimizer.step(closure)
        assert optimizer.skipped_steps == 1
        assert not torch.equal(weights(model)[0], before[0])


@pytest.mark.skipif(CUDA_ON_HOST, reason="kernels that wait for nothing leave a momentum of zeros")
def test_row_08_a_skipped_first_step_leaves_no_momentum() -> None:
    param = nn.Parameter(torch.ones(4))
    optimizer = sam_kernels.SAM([param], torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5)
    for grad in (float("nan"), 1.0):
        param.grad = torch.full((4,), grad)
        optimizer.first_step()
        optimizer.second_step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.ones(4))  # a first step: no dampening
    assert torch.equal(param.detach(), torch.full((4,), 1.0) - 0.1)


@every_backend
def test_row_08_check_finite_is_a_net_that_can_be_taken_away(backend: str) -> None:
    def run(check_finite: bool, ascent: float, descent: float, **kwargs: Any) -> tuple[torch.Tensor, int]:
        param = nn.Parameter(torch.ones(4))
        with sam_kernels.use_backend(backend):
            optimizer = sam_kernels.SAM([param], torch.optim.SGD, lr=0.1, check_finite=check_finite, **kwargs)
            param.grad = torch.full((4,), ascent)
            optimizer.first_step()
            param.grad = torch.full((4,), descent)
            optimizer.second_step()
        return param.detach(), optimizer.skipped_steps

    nan = float("nan")
    assert torch.equal(run(False, 1.0, 2.0)[0], run(True, 1.0, 2.0)[0])
    assert (run(True, 1.0, nan)[1], run(False, 1.0, nan)[1]) == (1, 0)
    assert run(False, 1.0, nan)[0].isnan().all()
    for after, skipped in (run(False, nan, 1.0), run(False, 1.0, nan, max_grad_norm=1.0)):  # the norm is taken anyway
        assert torch.equal(after, torch.ones(4))
        assert skipped == 1
