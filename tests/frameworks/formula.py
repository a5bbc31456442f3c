"""SAM and reweighted SAM written out: gradients by autograd, sums in the order of the formula, no optimizer of this library."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LR", "RHO", "SAM_OR_M", "STEPS", "Losses", "by_formula", "error_of", "reweighted", "same_bits"]

LR, RHO, STEPS = 0.1, 0.05, 5
SAM_OR_M = {1: "SAM", 2: "m-SAM by accumulation", 3: "m-SAM by accumulation"}
Losses = Callable[[nn.Module, Any, int], Tensor]


def by_formula(
    model: nn.Module,
    base: torch.optim.Optimizer,
    steps: Sequence[Sequence[Any]],
    loss: Losses,
    *,
    whole: bool,
    clip: float,
    lambd: float = 1.0,
    scale: float = 1.0,
    rho: Callable[[Tensor], Tensor] | None = None,
    after: Callable[[], Any] = lambda: None,
) -> None:
    """SAM written out. ``steps``: the micro-batches of each; ``whole``: one perturbation for all of a step. ``loss(model, batch, i)`` is a
    micro-batch's share of the loss of step i. ``lambd``: λ, with k times the share of one of k micro-batches. ``scale``: of losses, as by a
    GradScaler. ``rho``: the radius, of a micro-batch's share of the loss. ``after``: called after each step."""
    params = list(model.parameters())

    def grads_of(batches: Sequence[Any], i: int) -> list[Tensor]:
        total = torch.stack([loss(model, each, i) for each in batches]).sum()
        return [grad / scale for grad in torch.autograd.grad(total * scale, params)]

    for i, micro_batches in enumerate(steps):
        total = [torch.zeros_like(param) for param in params]
        groups = [micro_batches] if whole else [[each] for each in micro_batches]
        for group in groups:
            grads = [len(groups) * grad for grad in grads_of(group, i)]
            norm = norm_of(grads)
            start = [param.detach().clone() for param in params]
            radius = RHO if rho is None else rho(torch.stack([loss(model, each, i).detach() for each in group]).sum())
            with torch.no_grad():
                for param, grad in zip(params, grads, strict=True):
                    param.add_(radius * (1 - lambd + lambd / (norm + 1e-12)) * grad)
            sharp = grads_of(group, i)
            with torch.no_grad():
                for param, old in zip(params, start, strict=True):
                    param.copy_(old)
            total = [before + grad for before, grad in zip(total, sharp, strict=True)]
        _step(base, params, total, clip)
        after()


def reweighted(
    model: nn.Module,
    base: torch.optim.Optimizer,
    steps: Sequence[Sequence[Any]],
    losses: Callable[[nn.Module, Any], Tensor],
    *,
    beta: float,
) -> None:
    """RW-SAM (arXiv 2509.18001) written out: p = softmax(β n) of the norms n of the samples' gradients, the ascent along Σ p ∇f.
    ``losses(model, batch)`` are those of a micro-batch's samples, (B,)."""
    params = list(model.parameters())
    for micro_batches in steps:
        total = [torch.zeros_like(param) for param in params]
        for batch in micro_batches:
            of_samples = [torch.autograd.grad(each, params, retain_graph=True) for each in losses(model, batch)]
            weights = torch.softmax(beta * torch.stack([norm_of(grads) for grads in of_samples]), 0)
            along = [sum(p * grad for p, grad in zip(weights, grads, strict=True)) for grads in zip(*of_samples, strict=True)]
            norm = norm_of(along)  # type: ignore[arg-type]
            start = [param.detach().clone() for param in params]
            with torch.no_grad():
                for param, grad in zip(params, along, strict=True):
                    param.add_(RHO * grad / (norm + 1e-12))
            sharp = torch.autograd.grad(losses(model, batch).mean() / len(micro_batches), params)
            with torch.no_grad():
                for param, old in zip(params, start, strict=True):
                    param.copy_(old)
            total = [before + grad for before, grad in zip(total, sharp, strict=True)]
        _step(base, params, total, 0.0)


def _step(base: torch.optim.Optimizer, params: list[Any], grads: list[Tensor], clip: float) -> None:
    if clip:
        length = norm_of(grads)
        grads = [grad * min(1.0, clip / (length.item() + 1e-6)) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    base.step()


def norm_of(grads: Sequence[Tensor]) -> Tensor:  # ()
    return torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()


def error_of(model: nn.Module, expected: nn.Module) -> float:
    """The largest relative error of a parameter."""
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    return max(((param - right).norm() / right.norm()).item() for param, right in pairs)


def same_bits(model: nn.Module, expected: nn.Module) -> float:
    """0.0 where all parameters are equal bit for bit, otherwise 1.0."""
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    return 0.0 if all(torch.equal(*each) for each in pairs) else 1.0
