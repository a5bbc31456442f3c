"""The weights of a batch's samples: p = softmax(beta n), over the samples of all ranks where their gradients are averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from sam_kernels import functional
from sam_kernels.optim._reweighted.reweighting import Reweighting
from sam_kernels.optim._reweighted.samples import SampleRanks

__all__ = ["Weighing"]

LEAST_SPREAD = 1e-5  # of norms that differ by their rounding alone, over their mean


class Weighing:
    """``norms`` and ``weights``: (B / m,) of the rank's own samples, of each closure of the last step.

    Over ranks the mean over them of Σ (what :meth:`weigh` returns) ∇f_i is v.
    """

    def __init__(self, how: Reweighting, ranks: SampleRanks | None) -> None:
        self._how, self._ranks = how, ranks
        self.begin()

    def begin(self) -> None:
        """A new step: forgets the last one."""
        if self._ranks is not None:
            self._ranks.check()
        self.norms: list[Tensor] = []
        self.weights: list[Tensor] = []
        self._rows: list[Tensor] = []  # of closures that took norms, what _summary makes of each rank's samples

    @property
    def _count(self) -> int:
        return 1 if self._ranks is None else self._ranks.count

    def alike(self, losses: Tensor) -> None:  # (B,)
        """All samples have the same weight, and no norm is taken."""
        m, dtype = self._how.micro_batch, torch.promote_types(losses.dtype, torch.float32)
        self.weights.append(losses.new_full((len(losses) // m,), m / (len(losses) * self._count), dtype=dtype))

    def weigh(self, norms: Tensor, beta: float | Tensor, seed: int) -> Tensor:  # (B / m,)
        """What each gradient is multiplied by. ``seed``: of draws, the same on all ranks. Over ranks one all-gather of 56 bytes a rank; for
        draws two, of 8 bytes and of the norms."""
        self.norms.append(norms)
        if self._how.norm_cap is not None:
            every = norms if self._ranks is None else self._ranks.all_norms(norms)[0]
            capped = torch.minimum(norms, self._how.norm_cap * every.median())
            norms = torch.where(norms.isfinite(), capped, norms)  # what is not finite must skip the step
        if self._how.beta_scale == "std":
            beta = self._standardised(norms, beta)
        if self._how.sampling == "draw":
            return self._drawn(norms, beta, seed)
        weights = functional.sharpness_weights(norms, beta=beta)
        if self._ranks is None:
            self.weights.append(weights)
            return weights
        rows = self._ranks.gathered(_summary(norms, weights, beta))
        share = rows[:, 0].softmax(0)[self._ranks.index]  # of the rank's terms in the sum over all ranks
        self._rows.append(rows)
        self.weights.append((weights * share).to(weights.dtype))
        return (weights * (share * self._count)).to(weights.dtype)

    def _standardised(self, norms: Tensor, beta: float | Tensor) -> Tensor:  # () float64
        """beta over the norms' standard deviation: softmax has the same values with norms less their mean. 0 where all norms are 0."""
        mean, variance = norms.double().mean(), norms.double().var(correction=0)
        if self._ranks is not None:
            count = torch.full_like(mean, len(norms))
            counts, means, variances = self._ranks.gathered(torch.stack([count, mean, variance])).unbind(1)
            share = counts / counts.sum()
            mean = (share * means).sum()
            variance = (share * (variances + (means - mean).square())).sum()
        std = torch.maximum(variance.sqrt(), LEAST_SPREAD * mean)
        return torch.where(std > 0, beta / std, 0.0)

    def _drawn(self, norms: Tensor, beta: float | Tensor, seed: int) -> Tensor:  # (B / m,)
        how, own = self._how, slice(None)
        if self._ranks is not None:
            norms, own = self._ranks.all_norms(norms)
        weights = functional.sharpness_weights(norms, beta=beta)
        self.weights.append(weights[own])
        if self._ranks is not None:
            self._rows.append(_summary(norms, weights, beta).unsqueeze(0))
        drawn, _ = functional.sharpness_sample(norms, how.draws, beta=beta, replacement=how.replacement, seed=seed)
        # A norm that is not finite makes weights NaN: then the step must be skipped, whatever was drawn.
        counts = torch.zeros_like(norms).index_add_(0, drawn, torch.ones_like(norms[:1]).expand(how.draws))
        return (counts * (self._count / how.draws) + 0.0 * weights.sum())[own]

    def diagnostics(self) -> dict[str, Tensor]:
        """Means over the closures of the last step, each over the samples of all ranks."""
        found: dict[str, list[Tensor]] = {}

        def add(squares: Tensor, largest: Tensor) -> None:
            found.setdefault("effective_sample_size", []).append(squares.reciprocal())
            found.setdefault("max_weight", []).append(largest)

        def add_norms(mean: Tensor, least: Tensor, largest: Tensor) -> None:
            for name, value in (("mean_norm", mean), ("min_norm", least), ("max_norm", largest)):
                found.setdefault(name, []).append(value)

        for rows in self._rows:
            _, squares, largest, norms, least_norm, largest_norm, count = rows.unbind(1)
            share = rows[:, 0].softmax(0)
            add((share.square() * squares).sum(), (share * largest).max())
            add_norms(norms.sum() / count.sum(), least_norm.min(), largest_norm.max())
        for weights in self.weights[: 0 if self._rows else None]:
            add(weights.square().sum() * self._count, weights.max())
        for norms in self.norms[: 0 if self._rows else None]:
            add_norms(norms.mean(), norms.min(), norms.max())
        return {name: torch.stack(values).mean() for name, values in found.items()}


def _summary(norms: Tensor, weights: Tensor, beta: float | Tensor) -> Tensor:  # (n,), (n,) -> (7,) float64
    """log Σ exp(beta n), Σ p², max p; Σ n, min n, max n; the number of norms."""
    n, p = norms.double(), weights.double()
    largest = n.max()
    log_sum = (beta * n).max() - p.max().log()
    count = torch.full_like(largest, len(n))
    return torch.stack([log_sum, p.square().sum(), p.max(), n.sum(), n.min(), largest, count])
