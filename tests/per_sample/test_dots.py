"""``GradNorms.dots``: what it is given, and when. Values are checked beside the norms, by ``assert_right``, for every kind of layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sam_kernels.per_sample import GradNorms
from tests.per_sample.brute import run_engine

B = 4


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def losses_of(model: nn.Module) -> torch.Tensor:
    losses: torch.Tensor = model(torch.randn(B, 3, generator=torch.Generator().manual_seed(1))).square().sum(1)
    return losses


def test_the_gradient_of_a_loss_is_what_a_step_along_it_changes() -> None:
    """Σ_i ⟨∇f_i, ∇f⟩ = ‖∇f‖², and a part of the names counts alone."""
    model = model_of()
    engine, losses, _ = run_engine(model, lambda: losses_of(model))
    grads = dict(zip(dict(model.named_parameters()), torch.autograd.grad(losses.sum(), list(model.parameters())), strict=True))
    square = torch.stack([grad.square().sum() for grad in grads.values()]).sum()
    torch.testing.assert_close(engine.dots(grads).sum(), square)
    of_one = engine.dots({"2.bias": grads["2.bias"]})
    torch.testing.assert_close(of_one.sum(), grads["2.bias"].square().sum())
    engine.weighted_grads_()  # what dots has read is still there
    torch.testing.assert_close(model[0].weight.grad, grads["0.weight"])


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "too few": ([torch.ones(5, 3)], ValueError, "1 tensors for 4 trainable parameters"),
    "a shape": ({"0.weight": torch.ones(3, 5)}, ValueError, r"'0.weight' has shape \(3, 5\), its parameter \(5, 3\)"),
    "a name": ({"weight": torch.ones(5, 3)}, ValueError, "'weight', which is no trainable parameter"),
    "integers": ({"0.bias": torch.ones(5, dtype=torch.int64)}, TypeError, "must be a floating-point tensor"),
    "a tensor": (torch.ones(4), TypeError, "a list of tensors, or a dict"),
}


@pytest.mark.parametrize("what", WRONG)
def test_vectors_that_do_not_fit(what: str) -> None:
    vectors, error, words = WRONG[what]
    model = model_of()
    engine, _, _ = run_engine(model, lambda: losses_of(model))
    with pytest.raises(error, match=words):
        engine.dots(vectors)


def test_nothing_is_kept() -> None:
    model = model_of()
    engine = GradNorms(model)
    with engine:
        losses = losses_of(model)
    engine(losses, keep=False)
    with pytest.raises(RuntimeError, match="keep=True"):
        engine.dots({})
