"""Who computes what: gradient norms alone, norms and the batch's gradient, or that gradient alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bench.per_sample.models import Problem, sample_losses
from sam_kernels.per_sample import GradNorms

__all__ = ["PROVIDERS", "Provider"]

Run = Callable[[], Tensor | None]  # the norms, where there are any


@dataclass(frozen=True)
class Provider:
    """``make`` prepares once; what it returns is timed."""

    title: str
    make: Callable[[Problem], Run]
    missing: Callable[[Problem], str | None] = lambda problem: None


def _plain(problem: Problem) -> Run:
    def run() -> None:
        problem.model.zero_grad()
        problem.losses().sum().backward()

    return run


def _floor(problem: Problem) -> Run:
    """No weight's gradient but the first layer's: the gradients of activations, without which there is no norm either."""
    for param in list(problem.model.parameters())[1:]:
        param.requires_grad_(False)
    return _plain(problem)


def _ours(problem: Problem, *, keep: bool = False, backward: bool = False) -> Run:
    engine = GradNorms(problem.model)

    def run() -> Tensor:
        problem.model.zero_grad()
        with engine:
            losses = problem.losses()
        norms = engine(losses, keep=keep, backward=backward)
        if keep:
            engine.weighted_grads_(torch.ones_like(norms))
        return norms

    return run


def _opacus(problem: Problem) -> Run:
    """Ghost norms, as Opacus' fast gradient clipping takes them: in hooks of an ordinary backward pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        # Its backward hooks multiply by the batch where the loss is a mean: sum is what it is given.
        wrapped = GradSampleModuleFastGradientClipping(
            problem.model, batch_first=True, loss_reduction="sum", use_ghost_clipping=True, max_grad_norm=1.0
        )

    def run() -> Tensor:
        wrapped.zero_grad()
        problem.losses(wrapped).sum().backward()
        norms: Tensor = wrapped.get_norm_sample()
        return norms

    return run


def _vmap(problem: Problem) -> Run:
    params = {name: param.detach() for name, param in problem.model.named_parameters()}
    buffers = dict(problem.model.named_buffers())

    def loss(params: Any, inputs: Tensor, labels: Tensor) -> Tensor:
        outputs = torch.func.functional_call(problem.model, (params, buffers), (inputs[None],))
        return sample_losses(outputs, labels[None]).sum()

    sample_grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))

    def run() -> Tensor:
        grads = sample_grads(params, problem.inputs, problem.labels)
        squares = [torch.linalg.vector_norm(grad.flatten(1), dim=1).square() for grad in grads.values()]
        return torch.stack(squares).sum(0).sqrt()

    return run


def _no_batch_norm(problem: Problem) -> str | None:
    return "BatchNorm: a sample has no gradient of its own" if problem.kind.has_batch_norm else None


def _no_opacus(problem: Problem) -> str | None:
    if any(getattr(module, "inplace", False) for module in problem.model.modules()):
        return "its hooks refuse activations in place"
    return _no_batch_norm(problem) or (None if find_spec("opacus") else "opacus is not installed")


PROVIDERS = {
    "plain": Provider("forward and backward, no norms", _plain),
    "floor": Provider("forward and backward to activations, the least there is", _floor),
    "norms": Provider("sam_kernels, norms", _ours),
    "norms+weighted": Provider("sam_kernels, norms, then weighted gradients (weights of 1)", partial(_ours, keep=True)),
    "norms+backward": Provider("sam_kernels, norms beside an ordinary backward pass", partial(_ours, backward=True)),
    "opacus": Provider("Opacus, ghost norms", _opacus, _no_opacus),
    "vmap": Provider("torch.func.vmap(grad)", _vmap, _no_batch_norm),
}
