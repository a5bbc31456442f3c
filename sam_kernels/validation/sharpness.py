"""Gibbs weights of one tensor of gradient norms, and draws by them: inputs as data, and the bounds of the weights."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from sam_kernels.reference.sharpness import gibbs_terms
from sam_kernels.validation.cases import make_tensor, seed_of
from sam_kernels.validation.compare import Worst, failure
from sam_kernels.validation.family import Family
from sam_kernels.validation.options import SHARPNESS_OPTIONS
from sam_kernels.validation.problem import Problem
from sam_kernels.validation.roundings import Roundings

__all__ = ["SHARPNESS_DTYPES", "Sharpness", "weight_bounds"]

SHARPNESS_DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Around the blocks of every backend; "huge" ones are so far apart that most weights vanish.
_SIZES = {"single": 1, "odd": 7, "below": 127, "block": 128, "above": 257, "many": 1027}
_ABOUT = ("ties", "zeros", "tiny", "huge", "nan", "inf", "unaligned", "strided")
_ABOUT_SIZE = 33


class Sharpness(Family):
    options = SHARPNESS_OPTIONS

    def cases(self, op: str) -> tuple[str, ...]:
        return (*_SIZES, *_ABOUT)

    def dtypes_of(self, backend: str, device: str) -> Collection[str]:
        return SHARPNESS_DTYPES

    def build(self, op: str, case: str, dtype: str, option: str, seed: int = 0) -> Problem:
        number = seed_of(seed, op, case, dtype, option)
        generator = torch.Generator().manual_seed(number)
        norms = 3.0 * torch.rand(_SIZES.get(case, _ABOUT_SIZE), generator=generator, dtype=torch.float64)
        if case in ("ties", "zeros"):
            norms = torch.full_like(norms, 1.25 if case == "ties" else 0.0)
        norms *= {"tiny": 1e-30, "huge": 1e30}.get(case, 1.0)
        if case in ("nan", "inf"):
            norms[20] = float(case)
        keywords = dict(SHARPNESS_OPTIONS[op][option])
        if (dtype_of_beta := keywords.pop("tensors", None)) is not None:
            keywords["beta"] = torch.tensor(keywords["beta"], dtype=getattr(torch, dtype_of_beta))
        if op == "sharpness_sample":
            keywords["num_samples"] = keywords["num_samples"] or len(norms)
            if not keywords["replacement"]:
                keywords["num_samples"] = min(keywords["num_samples"], len(norms))
            keywords["seed"] = number << 20 | 0xABCDE
        layout = case if case in ("unaligned", "strided") else "contiguous"
        return Problem(op, {"norms": [make_tensor(norms, SHARPNESS_DTYPES[dtype], layout)]}, keywords)

    def results(self, problem: Problem) -> dict[str, torch.dtype]:
        weights = {"weights": problem.tensor("norms").dtype}
        return weights if problem.op == "sharpness_weights" else {"indices": torch.int64, **weights}

    def bounds(self, before: Problem, exact: Problem, roundings: Roundings) -> dict[str, list[Tensor]]:
        drawn = exact.tensor("indices") if "indices" in exact.lists else None
        return {"weights": [weight_bounds(before.double(), drawn, exact.tensor("weights"))]}

    def inspect(self, before: Problem, after: Problem, exact: Problem) -> Worst | None:
        """Compare indices one by one. No case is so close to a boundary that they might differ (tests/cli/test_validate_sharpness.py)."""
        if "indices" not in after.lists:
            return None
        norms, drawn, expected = before.tensor("norms"), after.tensor("indices"), exact.tensor("indices")
        if norms.isfinite().all():
            wrong = (drawn != expected).nonzero().flatten()
            if wrong.numel():
                j = int(wrong[0])
                reason = f"{wrong.numel()} of {drawn.numel()} differ, draw {j} is {int(drawn[j])}, expected {int(expected[j])}"
                return failure("indices", reason)
        elif not ((drawn >= 0) & (drawn < len(norms))).all():
            return failure("indices", "out of range")
        elif not before.kwargs["replacement"] and len(set(drawn.tolist())) < len(drawn):
            return failure("indices", "drawn twice")
        return None


def weight_bounds(problem: Problem, drawn: Tensor | None, weights: Tensor) -> Tensor:  # (k,) int64 or None, (k,) float64 -> (k,) float64
    """Return bounds of the weights, before they are rounded to their dtype.

    beta (n - max n) is the same number everywhere. Its exponential is off by up to 4 ulp (8 units of 2^-53) on either side, a sum of B
    positive terms by B - 1 units more, the divisions and the addition that follow by up to 4: 2 B + 40 for the ratio of a sum and a term.
    Terms near the end of the range lose their digits: they are off by up to 4 of the smallest number on either side.
    """
    terms = gibbs_terms(problem.tensor("norms"), problem.kwargs["beta"])
    relative = (2 * len(terms) + 40) * 2.0**-53
    if drawn is None:
        flat = isinstance(problem.kwargs["beta"], float) and problem.kwargs["beta"] == 0.0  # 1 / B, to the bit
        return torch.zeros_like(weights) if flat else weights * relative + 8 * 2.0**-1074
    lost = relative + 8 * 2.0**-1074 / terms[drawn]
    return torch.where(lost < 0.5, weights * lost / (1.0 - lost), math.inf)
