"""Problems with a loss for every sample, and the formulas of RW-SAM written out with autograd, one backward pass a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import RWSAM, reference
from sam_kernels.validation.backends import has_per_sample
from tests.optim.problem import set_weights, weights

B = 12


def make_model(dtype: torch.dtype = torch.float64, *, batch_norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(3)
    norm = nn.BatchNorm1d(7) if batch_norm else nn.LayerNorm(7)
    return nn.Sequential(nn.Linear(5, 7), norm, nn.Tanh(), nn.Dropout(dropout), nn.Linear(7, 3)).to(dtype)


def make_batch(dtype: torch.dtype = torch.float64, seed: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(B, 5, generator=generator, dtype=torch.float64) * torch.linspace(0.2, 3.0, B, dtype=torch.float64)[:, None]
    return inputs.to(dtype), torch.randint(0, 3, (B,), generator=generator)


def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:  # (B,)
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Recorded:
    """A closure that remembers with which weights it was called, and may raise on one of the calls."""

    def __init__(self, model: nn.Module, batch: tuple[Tensor, Tensor], error: BaseException | None = None, at: int = -1) -> None:
        self.model, self.batch, self.error, self.at = model, batch, error, at
        self.calls: list[list[Tensor]] = []

    def __call__(self) -> Tensor:
        self.calls.append(weights(self.model))
        if self.error is not None and len(self.calls) - 1 == self.at:
            raise self.error
        return losses_of(self.model, self.batch)

    @property
    def ascent(self) -> list[Tensor]:
        """e: where the last call was, seen from where the one before it was."""
        return [there - here for here, there in zip(self.calls[-2], self.calls[-1], strict=True)]


def group_grads(model: nn.Module, batch: tuple[Tensor, Tensor], m: int = 1) -> list[list[Tensor]]:
    """The gradients of the mean loss of every m consecutive samples."""
    losses = losses_of(model, batch)
    params = list(model.parameters())
    return [list(torch.autograd.grad(group.mean(), params, retain_graph=True)) for group in losses.split(m)]


def norms_of(grads: Sequence[Sequence[Tensor]], where: Callable[[int], bool] = lambda _: True) -> Tensor:  # (B / m,)
    """``where``: of which parameters, by their number."""
    return torch.stack([torch.stack([g.square().sum() for i, g in enumerate(group) if where(i)]).sum().sqrt() for group in grads])


def combined(grads: Sequence[Sequence[Tensor]], coefficients: Tensor) -> list[Tensor]:
    return [sum(c * group[i] for c, group in zip(coefficients, grads, strict=True)) for i in range(len(grads[0]))]  # type: ignore[misc]


def ascent_along(
    direction: Sequence[Tensor], params: Sequence[Tensor], *, rho: float, lambd: float = 1.0, adaptive: bool = False, eta: float = 0.0
) -> list[Tensor]:
    """e of Unified SAM for any direction."""
    scaling = [param.detach().abs() + eta if adaptive else torch.ones_like(param) for param in params]
    norm = torch.sqrt(torch.stack([((t * v) ** 2).sum() for t, v in zip(scaling, direction, strict=True)]).sum())
    return [rho * (1 - lambd + lambd / (norm + 1e-12)) * t * t * v for t, v in zip(scaling, direction, strict=True)]


def written_out_step(
    model: nn.Module,
    base: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    *,
    beta: float,
    m: int = 1,
    counted: Callable[[Tensor], Tensor] = lambda norms: norms,
    **ascent: Any,
) -> tuple[Tensor, Tensor]:
    """One step of RW-SAM with ``base`` on the model's own parameters. The norms and weights. ``counted``: the norms as β takes them."""
    start = weights(model)
    grads = group_grads(model, batch, m)
    norms = norms_of(grads)
    p = (beta * counted(norms)).softmax(0)
    e = ascent_along(combined(grads, p), list(model.parameters()), **ascent)
    set_weights(model, [w + each for w, each in zip(start, e, strict=True)])
    model.zero_grad()
    losses_of(model, batch).mean().backward()
    set_weights(model, start)
    base.step()
    return norms, p


def directions_of(model: nn.Module, seed: int, distribution: str = "rademacher") -> list[Tensor]:
    """z of every parameter, by the reference."""
    zeros = [torch.zeros_like(param) for param in model.parameters()]
    reference.random_perturb_(zeros, [z.clone() for z in zeros], seed=seed, scale=1.0, distribution=distribution)
    return zeros


def assert_close(actual: Any, expected: Any, relative: float = 1e-10) -> None:
    """Each tensor relative to the norm of the expected one."""
    actual, expected = ([each] if isinstance(each, Tensor) else list(each) for each in (actual, expected))
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        error = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
        assert error <= relative, f"tensor {i}: off by {error:.3g}, {relative:.3g} allowed"


WAYS: dict[str, dict[str, Any]] = {
    "exact": {"norms": "exact"},
    "exact_draw": {"norms": "exact", "sampling": "draw", "draws": 3},
    "finite_difference": {"norms": "finite_difference", "num_directions": 2},
    "jvp": {"norms": "jvp"},
    "last_layer": {"norms": "last_layer"},
}
CALLS = {way: 2 + {"finite_difference": 2, "jvp": 1}.get(way, 0) for way in WAYS}  # of the closure, each step
every_way = pytest.mark.parametrize("way", WAYS)


def build(model: nn.Module, way: str, base: Any = torch.optim.SGD, **options: Any) -> RWSAM:
    return RWSAM(model, base, **{"beta": 2.0, "rho": 0.3, "lr": 0.1, **WAYS[way], **options})


def train(model: nn.Module, optimizer: RWSAM, steps: range, dtype: torch.dtype = torch.float32) -> None:
    for step in steps:
        batch = make_batch(dtype, seed=step)
        optimizer.step(partial(losses_of, model, batch))


def state_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value.clone() for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def skip_without_norms(backend: str, norms: str) -> None:
    """Norms of the engine need a backend that has its operations: the CUDA kernels, run on the host, have none."""
    if norms not in ("finite_difference", "jvp") and not has_per_sample(backend):
        pytest.skip(f"backend {backend} has no gradient norms per sample")
