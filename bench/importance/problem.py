"""Ridge regression with n = d = 100 and eigenvalues {1, 10} and 98 from U[1, 2] (arXiv 2503.02225), in two ways."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.linear_models import LinearModels

__all__ = ["PROBLEMS", "RIDGE", "N", "Ridge", "make_problem", "rows_of"]

N = 100
RIDGE = 0.1
PROBLEMS = {
    "mixed": "rows as they come: A = √n U Λ^½ V', U and V random rotations",
    "apart": "rows as different as these eigenvalues allow: A = √n Λ^½ V'",
}


@dataclass
class Ridge:
    """f = (1/n) Σ f_i, f_i(x) = (a_i'x - b_i)² / 2 + r ‖x‖² / 2, in float64. f's Hessian is A'A / n + r: the eigenvalues above, plus r."""

    a: Tensor  # (n, d)
    b: Tensor  # (n,)

    def __post_init__(self) -> None:
        hessian = self.a.T @ self.a / len(self.a) + RIDGE * torch.eye(self.a.shape[1], dtype=torch.float64)
        self.mu = torch.linalg.eigvalsh(hessian)[0].item()
        self.smoothness = self.a.square().sum(1) + RIDGE  # (n,) L_i
        self.minimum = torch.linalg.solve(hessian, self.a.T @ self.b / len(self.a))  # (d,)
        self.f_inf = self.f(self.minimum).item()
        # The minimum of f_i lies along a_i.
        self.mean_f_i_inf = (RIDGE * self.b.square() / (2 * self.smoothness)).mean().item()

    def models(self, streams: int) -> LinearModels:
        """This problem, once for each stream of samples."""
        a, b = (np.broadcast_to(part.numpy(), (streams, *part.shape)) for part in (self.a, self.b))
        return LinearModels("squares", a, b, RIDGE)

    def f(self, x: Tensor) -> Tensor:  # (..., d) -> (...)
        return (x @ self.a.T - self.b).square().mean(-1) / 2 + RIDGE / 2 * x.square().sum(-1)


def make_problem(name: str, seed: int = 0) -> Ridge:
    """Same eigenvalues, same V and the same kind of b (a point's image plus standard normal noise) for both.

    L_i = ‖a_i‖² + r. Their mean is Σ eigenvalues + r, whatever U. A random U gives every row nearly that. U = 1 gives row i the norm
    √(n λ_i), and no U spreads the norms more: a diagonal is majorised by the eigenvalues (Schur).
    """
    generator = torch.Generator().manual_seed(seed)
    eigenvalues = torch.cat([torch.tensor([1.0, 10.0]), 1 + torch.rand(N - 2, generator=generator)]).double()
    a = rows_of(eigenvalues, generator, mixed=name == "mixed")
    point, noise = torch.randn(2, N, generator=generator, dtype=torch.float64)
    return Ridge(a, a @ (point / 10) + noise)


def rows_of(eigenvalues: Tensor, generator: torch.Generator, *, mixed: bool) -> Tensor:
    """(n, n) A with these eigenvalues (n,) of A'A / n, float64: √n Λ^½ V', and turned by U if ``mixed``."""
    n = len(eigenvalues)
    v, u = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    a = math.sqrt(n) * eigenvalues.sqrt()[:, None] * v.T
    return u @ a if mixed else a
