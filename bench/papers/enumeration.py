"""The step of a member of the family for every mini-batch and every way to cut it: by the optimizers, and to first order in the radius."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

import sam_kernels
from bench.papers.small_problems import SmallProblem

__all__ = ["Member", "Steps", "Subset", "covariance", "first_order", "outcomes", "partitions"]

Subset = tuple[int, ...]


@dataclass(frozen=True)
class Member:
    """|S| = ``batch`` samples a step, perturbed by gradients of ``m`` samples each: pieces of S, or all data where m > |S|.

    With ``beta`` RW-SAM: perturbed by the weighted gradient of S.
    """

    name: str
    batch: int
    m: int
    lambd: float = 1.0
    beta: float | None = None


def partitions(samples: Subset, m: int) -> Iterator[list[Subset]]:
    """Every way to cut the samples into pieces of m, whatever their order."""
    if not samples:
        yield []
        return
    for others in combinations(samples[1:], m - 1):
        left = tuple(sample for sample in samples[1:] if sample not in others)
        for rest in partitions(left, m):
            yield [(samples[0], *others), *rest]


def outcomes(count: int, member: Member) -> list[list[Subset]]:
    """Every mini-batch of ``count`` samples, cut in every way: C lists of pieces, each as likely as the others."""
    return [pieces for samples in combinations(range(count), member.batch) for pieces in partitions(samples, min(member.m, member.batch))]


class Steps:
    """(C, d): x - x⁺ of every outcome at learning rate 1, by :class:`sam_kernels.UnifiedSAM` or :class:`sam_kernels.RWSAM` around SGD."""

    def __init__(self, problem: SmallProblem, member: Member, rho: float) -> None:
        self._problem, self._member, self._model = problem, member, problem.model()
        self._params = list(self._model.parameters())
        options = {"rho": rho, "lambd": member.lambd, "lr": 1.0}
        self._optimizer = (
            sam_kernels.UnifiedSAM(self._params, torch.optim.SGD, **options)
            if member.beta is None
            else sam_kernels.RWSAM(self._model, torch.optim.SGD, beta=member.beta, norms="exact", **options)
        )

    def __call__(self, x: Tensor) -> Tensor:  # (d,) -> (C, d)
        moved = []
        for pieces in outcomes(self._problem.count, self._member):
            self._move_to(x)
            self._step(pieces)
            moved.append(x - nn.utils.parameters_to_vector(self._params).detach())
        return torch.stack(moved)

    @torch.no_grad()
    def _move_to(self, x: Tensor) -> None:
        for param, values in zip(self._params, x.split([param.numel() for param in self._params]), strict=True):
            param.copy_(values.view_as(param))

    def _step(self, pieces: list[Subset]) -> None:
        problem, optimizer = self._problem, self._optimizer
        if isinstance(optimizer, sam_kernels.RWSAM):
            optimizer.step(lambda: problem.losses_of(self._model, pieces[0]))
        elif self._member.m > self._member.batch:
            optimizer.step(self._closure_of(pieces[0]), ascent_closure=self._closure_of(tuple(range(problem.count))))
        else:
            optimizer.step([self._closure_of(piece) for piece in pieces])

    def _closure_of(self, chosen: Subset) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            self._optimizer.zero_grad()
            loss = self._problem.losses_of(self._model, chosen).mean()
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own is untyped
            return loss

        return closure


def first_order(problem: SmallProblem, member: Member) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """x (d,) -> ∇f_S and r, (C, d) each, of every outcome: a step at learning rate 1 is ∇f_S + ρ r + O(ρ²).

    r = mean_j H_j u_j over the pieces I_j: H_j is the Hessian of f_{I_j}, u = (1 - λ + λ / ‖v‖) v with v = ∇f_{I_j}; ∇f of all data (n);
    Σ p_i ∇f_i over S with p = softmax(β ‖∇f_i‖) (RW-SAM). Differentiable, p too, and for ``torch.func``.
    """
    count = problem.count
    cuts = outcomes(count, member)
    pieces = torch.zeros(len(cuts), len(cuts[0]), count, dtype=problem.start.dtype)  # (C, P, N): weights of means
    for c, cut in enumerate(cuts):
        for p, piece in enumerate(cut):
            pieces[c, p, list(piece)] = 1 / len(piece)
    gradients_of, hessians_of = torch.func.jacrev(problem.losses), torch.func.hessian(problem.losses)

    def of(x: Tensor) -> tuple[Tensor, Tensor]:
        gradients, hessians = gradients_of(x), hessians_of(x)  # (N, d), (N, d, d)
        weights = torch.full_like(pieces, 1 / count) if member.m > member.batch else pieces
        if member.beta is not None:
            weights = torch.softmax(member.beta * gradients.norm(dim=1) + pieces.log(), -1)  # log 0: no weight outside S
        v = weights @ gradients  # (C, P, d)
        u = (1 - member.lambd + member.lambd / v.norm(dim=-1, keepdim=True)) * v
        return (pieces @ gradients).mean(1), torch.einsum("cpn,nij,cpj->cpi", pieces, hessians, u).mean(1)

    return of


def covariance(a: Tensor, b: Tensor) -> Tensor:
    """(d, d): E (a - E a)(b - E b)' over outcomes that are equally likely, (C, d) each."""
    return (a - a.mean(0)).T @ (b - b.mean(0)) / len(a)
