"""Problems of a few samples and a few parameters, float64, on which every mini-batch can be tried: as formulas, and as networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["LinearProblem", "Problem", "SmallProblem", "least_squares", "torus"]


class SmallProblem(Protocol):
    """N losses f_i of d parameters: by ``losses`` as a formula, for derivatives; by ``model`` as a network, which optimizers step."""

    count: int  # N
    start: Tensor  # (d,)

    def losses(self, x: Tensor) -> Tensor:  # (d,) -> (N,)
        ...

    def model(self) -> nn.Module:
        """Return a network whose parameters, one after another, are the d of ``losses``. Their values are arbitrary."""
        ...

    def losses_of(self, model: nn.Module, chosen: Sequence[int]) -> Tensor:  # (B,)
        """Return the losses of the samples ``chosen`` under the network."""
        ...


class Problem:
    """f_i(W, v) = (v'tanh(W a_i) - b_i)² / 2 with two hidden units, three inputs and eight samples: 8 parameters."""

    count = 8

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs, self.targets, self.start = (
            torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((self.count, 3), (self.count,), (8,))
        )

    def losses(self, x: Tensor) -> Tensor:  # (8,) -> (8,)
        return (torch.tanh(self.inputs @ x[:6].reshape(2, 3).T) @ x[6:] - self.targets) ** 2 / 2

    def model(self) -> nn.Module:
        first, second = (nn.Linear(*shape, bias=False, dtype=torch.float64) for shape in ((3, 2), (2, 1)))
        return nn.Sequential(first, nn.Tanh(), second)

    def losses_of(self, model: nn.Module, chosen: Sequence[int]) -> Tensor:  # (B,)
        rows = list(chosen)
        return (model(self.inputs[rows]).squeeze(1) - self.targets[rows]) ** 2 / 2

    def gradients(self, x: Tensor) -> Tensor:
        """(8, 8): of every sample, differentiable."""
        rows = [torch.autograd.grad(loss, x, create_graph=True)[0] for loss in self.losses(x)]
        return torch.stack(rows)


class LinearProblem:
    """f_i(x) = φ(a_i'x, b_i). ``inputs`` (N, d), ``targets`` (N,), ``start`` (d,)."""

    def __init__(self, inputs: Tensor, targets: Tensor, start: Tensor, phi: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.inputs, self.targets, self.start, self._phi = inputs, targets, start, phi
        self.count = len(inputs)

    def losses(self, x: Tensor) -> Tensor:  # (d,) -> (N,)
        return self._phi(self.inputs @ x, self.targets)

    def model(self) -> nn.Module:
        return nn.Linear(self.inputs.shape[1], 1, bias=False, dtype=torch.float64)

    def losses_of(self, model: nn.Module, chosen: Sequence[int]) -> Tensor:  # (B,)
        rows = list(chosen)
        return self._phi(model(self.inputs[rows]).squeeze(1), self.targets[rows])


def least_squares(seed: int = 0) -> LinearProblem:
    """φ = (z - b)² / 2, six samples, three parameters, all standard normal: steps of unnormalised members are affine in x."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((6, 3), (6,), (3,))
    inputs, targets, start = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return LinearProblem(inputs, targets, start, lambda z, b: (z - b) ** 2 / 2)


def torus() -> LinearProblem:
    """φ = z + cos(z + b) / 2 with a_i = (1, 0), (0, 1), (1, 1).

    The gradients have the period 2π in both parameters. None vanishes, nor does the mean of any of them: φ' > 0, and all a_i lie in one
    quadrant. A normalised step is therefore smooth everywhere.
    """
    inputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    phases = torch.tensor([0.0, 1.3, 2.6], dtype=torch.float64)
    return LinearProblem(inputs, phases, torch.zeros(2, dtype=torch.float64), lambda z, b: z + torch.cos(z + b) / 2)
