"""``torch.compile`` of the lean loop's arithmetic and of the base update: two graphs, one for each half of the step."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.providers.base import RHO, Base, Provider, Stepper

__all__ = ["PROVIDERS", "CompiledSAM"]

# Compile time grows with the number of tensors in a graph: 148 take about a minute, 1,000 a quarter of an hour.
MAX_TENSORS = 300


def _ascend(params: list[Tensor], grads: list[Tensor], old_params: list[Tensor], rho: float) -> None:
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads, 2, dtype=torch.float32)))
    scale = rho / (norm + 1e-12)
    torch._foreach_copy_(old_params, params)
    for param, grad in zip(params, grads, strict=True):
        param.add_((grad.float() * scale).to(param.dtype))


def _descend_sgd(
    params: list[Tensor], grads: list[Tensor], old_params: list[Tensor], states: dict[str, list[Tensor]], lr: float, momentum: float
) -> None:
    for param, grad, old_param, buffer in zip(params, grads, old_params, states["momentum_buffer"], strict=True):
        buffer.mul_(momentum).add_(grad)
        param.copy_(old_param - lr * buffer)


def _descend_adamw(
    params: list[Tensor],
    grads: list[Tensor],
    old_params: list[Tensor],
    states: dict[str, list[Tensor]],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    beta1, beta2 = betas
    step = states["step"][0].add_(1)  # all parameters have made the same number of steps
    step_size = lr / (1 - beta1**step)
    correction = (1 - beta2**step).sqrt()
    for param, grad, old_param, exp_avg, exp_avg_sq in zip(params, grads, old_params, states["exp_avg"], states["exp_avg_sq"], strict=True):
        wide = grad.float()
        new_exp_avg = torch.lerp(exp_avg.float(), wide, 1 - beta1)
        new_exp_avg_sq = exp_avg_sq.float() * beta2 + (1 - beta2) * wide * wide
        update = step_size * new_exp_avg / (new_exp_avg_sq.sqrt() / correction + eps)
        param.copy_(old_param.float() * (1 - lr * weight_decay) - update)
        exp_avg.copy_(new_exp_avg)
        exp_avg_sq.copy_(new_exp_avg_sq)


class CompiledSAM:
    def __init__(self, params: Sequence[torch.nn.Parameter], base: Base, rho: float) -> None:
        self.leaves = list(params)
        self.params = [p.detach() for p in params]
        self.old_params = [torch.empty_like(p) for p in self.params]
        self.state = {key: [torch.zeros_like(p) for p in self.params] for key in base.state_keys if key != "step"}
        if "step" in base.state_keys:
            self.state["step"] = [torch.zeros(())]
        compiled = functools.partial(torch.compile, fullgraph=True, dynamic=False)
        descend = _descend_sgd if base.name == "sgd" else _descend_adamw
        self._ascend = compiled(functools.partial(_ascend, rho=rho))
        self._descend = compiled(functools.partial(descend, **base.kwargs))

    @torch.no_grad()
    def first_step(self) -> None:
        self._ascend(self.params, [p.grad for p in self.leaves], self.old_params)

    @torch.no_grad()
    def second_step(self) -> None:
        self._descend(self.params, [p.grad for p in self.leaves], self.old_params, self.state)


def _make(params: Sequence[torch.nn.Parameter], base: Base) -> Stepper:
    torch._dynamo.reset()
    return CompiledSAM(params, base, RHO)


def _missing(n_tensors: int) -> str | None:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        return "torch.compile needs a C++ compiler on this device"
    if n_tensors > MAX_TENSORS:
        return f"torch.compile of a graph over {n_tensors} tensors takes longer than the rest of the run (limit {MAX_TENSORS})"
    return None


PROVIDERS = (Provider("torch.compile", "torch.compile, whole step", _make, _missing),)
