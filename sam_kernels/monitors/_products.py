"""Products of the Hessian of a loss with vectors, and what is done with such vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sam_kernels import functional
from sam_kernels._sharding import is_dtensor
from sam_kernels._validate import check_tensor, describe
from sam_kernels.monitors._twice import first_gradients, second_gradients

__all__ = ["HessianProducts", "Vector"]

Vector = list[Tensor]  # a flat tensor for each device
_CHUNK = 1 << 22  # elements that are widened to float64 at a time


class HessianProducts:
    """The graph of one call of a closure, and products of the Hessian with vectors.

    Vectors have an element for each of all the parameters, in float32, or in float64 where a parameter is. Sums of them are float64.

    Attributes:
        numel: elements of all trainable parameters together.
        eps: relative rounding error of a vector's element.
        root: the power of two next to √numel: elements of a unit vector times this are about 1.

    Raises TypeError, ValueError or RuntimeError: see :func:`sam_kernels.monitors.hessian_top_eigenvalue`.
    """

    def __init__(self, op: str, closure: Callable[[], Any], params: Iterable[Tensor]) -> None:
        self._op = op
        self._params = _trainable(op, params)
        self.numel = sum(param.numel() for param in self._params)
        if not self.numel:
            raise ValueError(f"{op}: none of params requires a gradient and has elements; call requires_grad_() on some")
        self._dtype = torch.float64 if any(param.dtype is torch.float64 for param in self._params) else torch.float32
        self.eps = torch.finfo(self._dtype).eps
        self._devices = list(dict.fromkeys(param.device for param in self._params))
        self._lengths = [sum(param.numel() for param in self._params if param.device == device) for device in self._devices]
        self.root = 2.0 ** round(math.log2(math.sqrt(self.numel)))
        with torch.enable_grad():
            grads = first_gradients(op, _loss(op, closure), self._params)
        if all(grad is None for grad in grads):
            raise ValueError(f"{op}: the loss does not depend on any of params; pass the parameters of the model that the closure calls")
        for i, grad in enumerate(grads):
            if grad is not None and grad.layout is not torch.strided:
                raise TypeError(f"{op}: the gradient of trainable parameter {i} is a {grad.layout} tensor; use sparse=False in its layer")
        self._first = grads
        # A gradient without a graph is a constant: the loss is linear in the parameter.
        self._grads = {i: grad for i, grad in enumerate(grads) if grad is not None and grad.requires_grad}

    def random(self, seed: int, distribution: str) -> Vector:
        """The numbers of :func:`sam_kernels.functional.random_perturb_`, a row for each trainable parameter, elements in C order.
        They are float32 numbers, which every backend has kernels for."""
        z, zeros = self._zeros(torch.float32), self._zeros(torch.float32)
        functional.random_perturb_(self._views(z), self._views(zeros), seed=seed, scale=1.0, distribution=distribution, from_old=True)
        return [part.to(self._dtype) for part in z]

    def gradients(self) -> list[tuple[Tensor, Tensor | None]]:
        """(parameter, its gradient without a graph) for each trainable parameter; None: the loss does not depend on it."""
        return [(param, None if grad is None else grad.detach()) for param, grad in zip(self._params, self._first, strict=True)]

    def diagonal(self, seeds: Sequence[int]) -> list[Tensor]:
        """Hutchinson's estimate of the diagonal of H, the mean of z * (H z) over z of random signs, in the shapes of the parameters."""
        total = self._zeros(self._dtype)
        for seed in seeds:
            z = self.random(seed, "rademacher")
            total = [part + left * right for part, left, right in zip(total, z, self.of(z), strict=True)]
        return self._views(self.scaled(total, 1.0 / len(seeds)))

    def of(self, vector: Vector, *, scale: float = 1.0) -> Vector:
        """H ``vector``. With a ``scale`` H (scale ``vector``) / scale, so that nothing underflows in 16 bits where elements are small."""
        result = self._zeros(self._dtype)
        if not self._grads:
            return result
        views = self._views(vector)
        vectors = [(views[i] * scale).to(grad.dtype) for i, grad in self._grads.items()]
        found = second_gradients(self._op, list(self._grads.values()), self._params, vectors)
        for view, product in zip(self._views(result), found, strict=True):
            if product is not None:
                view.copy_(product)
        return self.scaled(result, 1.0 / scale)

    def dots(self, lefts: Sequence[Vector], right: Vector) -> list[float]:
        """Inner products in float64."""
        total = torch.zeros(len(lefts), dtype=torch.float64, device="cpu")
        for k, part in enumerate(right):
            for chunk in self._chunks(part, len(lefts)):
                rows = torch.stack([left[k][chunk] for left in lefts]).to(torch.float64)
                total += (rows @ part[chunk].to(torch.float64)).cpu()
        return total.tolist()

    def norm(self, vector: Vector) -> float:
        return math.sqrt(self.dots([vector], vector)[0])

    def scaled(self, vector: Vector, factor: float) -> Vector:
        return [part * factor for part in vector]

    def subtract_(self, vector: Vector, others: Sequence[Vector], factors: Sequence[float]) -> None:
        """vector <- vector - Σ factor other, rounded once."""
        weights = torch.tensor(factors, dtype=torch.float64, device="cpu")
        for k, part in enumerate(vector):
            local = weights.to(part.device)
            for chunk in self._chunks(part, len(others)):
                rows = torch.stack([other[k][chunk] for other in others]).to(torch.float64)
                part[chunk] = part[chunk].to(torch.float64) - local @ rows

    def result(self, value: float) -> Tensor:  # ()
        return torch.tensor(value, dtype=self._dtype, device=self._params[0].device)

    def _zeros(self, dtype: torch.dtype) -> Vector:
        return [torch.zeros(n, dtype=dtype, device=device) for n, device in zip(self._lengths, self._devices, strict=True)]

    def _views(self, vector: Vector) -> list[Tensor]:
        """Each parameter's elements of a vector, in its shape."""
        starts, views = dict.fromkeys(self._devices, 0), []
        flat = dict(zip(self._devices, vector, strict=True))
        for param in self._params:
            start, device = starts[param.device], param.device
            starts[device] += param.numel()
            views.append(flat[device][start : starts[device]].view(param.shape))
        return views

    @staticmethod
    def _chunks(part: Tensor, rows: int) -> list[slice]:
        size = max(_CHUNK // rows, 1)
        return [slice(start, start + size) for start in range(0, len(part), size)]


def _trainable(op: str, params: Iterable[Tensor]) -> list[Tensor]:
    """The parameters that require a gradient, each once."""
    if isinstance(params, nn.Module):
        raise TypeError(f"{op}: params must be tensors in a list, got a module ({describe(params)}); pass model.parameters()")
    if isinstance(params, Tensor | str | dict) or not isinstance(params, Iterable):
        raise TypeError(f"{op}: params must be tensors in a list, got {describe(params)}")
    found: dict[Tensor, None] = {}
    for i, param in enumerate(params):
        if not isinstance(param, Tensor):
            raise TypeError(f"{op}: params[{i}] must be a torch.Tensor, got {describe(param)}")
        if not param.requires_grad:
            continue
        marks = ("_fsdp_flattened", "_is_flat_param", "_st_info")  # torch's own: of FSDP1, and of DDP over tensor parallelism
        if is_dtensor(param) or any(hasattr(param, mark) for mark in marks):
            raise TypeError(
                f"{op}: params[{i}] is sharded, and passes over shards cannot be differentiated twice; load the weights into a model of "
                "one process (torch.distributed.checkpoint.state_dict.StateDictOptions(full_state_dict=True)) and pass its parameters"
            )
        found[check_tensor(op, f"params[{i}]", param)] = None
    return list(found)


def _loss(op: str, closure: Callable[[], Any]) -> Tensor:  # ()
    if not callable(closure):
        raise TypeError(f"{op}: closure must be a callable, got {describe(closure)}")
    loss = closure()
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        raise TypeError(f"{op}: closure must return the loss, a floating-point tensor of one element, got {describe(loss)}")
    if is_dtensor(loss):
        raise TypeError(f"{op}: closure returned a DTensor; passes over shards cannot be differentiated twice; use a model of one process")
    if not loss.requires_grad:
        raise RuntimeError(
            f"{op}: closure returned a loss without a graph; compute it from parameters that require a gradient, without detach, item or "
            "torch.no_grad, and outside of torch.inference_mode"
        )
    return loss.reshape(())
