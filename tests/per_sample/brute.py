"""Gradients of single samples, or micro-batches, by autograd: one backward pass for each, through the very graph the engine was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sam_kernels.per_sample import GradNorms

__all__ = ["assert_close", "assert_right", "group_norms", "run_engine", "trainable", "weighted"]


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def _grads(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    params = trainable(model)
    found = torch.autograd.grad(loss, list(params.values()), retain_graph=True, allow_unused=True)
    return {name: torch.zeros_like(param) if g is None else g for (name, param), g in zip(params.items(), found, strict=True)}


def group_norms(model: nn.Module, losses: Tensor, micro_batch: int = 1, reduction: str = "sum") -> Tensor:
    """(B / m,) float64."""
    return torch.stack([_dot(grads, grads).sqrt() for grads in _group_grads(model, losses, micro_batch, reduction)])


def _group_grads(model: nn.Module, losses: Tensor, micro_batch: int, reduction: str) -> list[dict[str, Tensor]]:
    groups = losses.split(micro_batch)
    return [_grads(model, group.sum() if reduction == "sum" else group.mean()) for group in groups]


def _dot(left: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
    return torch.stack([(left[name].double() * right[name].double()).sum() for name in left]).sum()


def weighted(model: nn.Module, losses: Tensor, weights: Tensor, micro_batch: int = 1, reduction: str = "sum") -> dict[str, Tensor]:
    each = weights.to(losses.dtype).repeat_interleave(micro_batch)
    return _grads(model, (each * losses).sum() / (micro_batch if reduction == "mean" else 1))


def run_engine(model: nn.Module, forward: Callable[[], Tensor], **options: Any) -> tuple[GradNorms, Tensor, Tensor]:
    """The engine, the losses with their graph, and the norms."""
    engine = GradNorms(model, **options)
    with engine:
        losses = forward()
    return engine, losses, engine(losses, retain_graph=True)


def assert_close(actual: Tensor, expected: Tensor, relative: float, what: str = "norms", scale: Tensor | None = None) -> float:
    """Relative to the norm of ``expected`` as a whole where it is a gradient, element by element where it is a list of norms.

    Returns the largest error.
    """
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape, what
    size = expected.abs() if what == "norms" else (expected.norm() if scale is None else scale.double()).expand_as(expected)
    error = ((actual - expected).abs() / size.clamp(min=1e-30)).max().item() if actual.numel() else 0.0
    assert error <= relative, f"{what}: off by {error:.3g}, {relative:.3g} allowed"
    return error


def assert_right(model: nn.Module, forward: Callable[[], Tensor], *, relative: float = 1e-10, again: bool = False, **options: Any) -> float:
    """Norms, inner products with a random vector, then gradients for random weights and for ones, against autograd. A weight of zero is
    among them.

    ``again``: autograd has a pass of its own, with the same random numbers, as it must where the engine's was through checkpoints.
    Returns the largest relative error.
    """
    errors = []
    m, reduction = options.get("micro_batch", 1), options.get("reduction", "sum")
    for ones in (False, True):
        state = torch.get_rng_state()
        engine, losses, norms = run_engine(model, forward, **options)
        if again:
            torch.set_rng_state(state)
            losses = forward()
        grads = _group_grads(model, losses, m, reduction)
        errors.append(assert_close(norms, torch.stack([_dot(each, each).sqrt() for each in grads]), relative))
        vectors = {name: torch.randn_like(param) for name, param in trainable(model).items()}
        length = _dot(vectors, vectors).sqrt()
        dots = engine.dots(vectors) if ones else engine.dots(list(vectors.values()))
        expected_dots = torch.stack([_dot(each, vectors) for each in grads])
        errors.append(assert_close(dots, expected_dots, relative, "dots", norms.max() * length))
        weights = torch.ones_like(norms) if ones else torch.rand_like(norms)
        if not ones:
            weights[0] = 0.0
        model.zero_grad(set_to_none=True)
        engine.weighted_grads_(weights)
        expected = weighted(model, losses, weights, m, reduction)
        scale = torch.stack([g.double().norm() for g in weighted(model, losses, torch.ones_like(norms), m, reduction).values()])
        for (name, grad), size in zip(expected.items(), scale, strict=True):
            param = model.get_parameter(name)
            actual = torch.zeros_like(grad) if param.grad is None else param.grad
            assert actual.dtype is param.dtype
            # relative to this parameter's gradient, or, where that is rounding alone (a bias before a normalisation), to the largest one
            errors.append(assert_close(actual, grad, relative, name, torch.maximum(size, scale.max() * 1e-3)))
        model.zero_grad(set_to_none=True)
    return max(errors)
