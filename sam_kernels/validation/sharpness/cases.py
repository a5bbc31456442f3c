"""Inputs of the Gibbs weights and of the draws by them, as data, and the bounds of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sam_kernels.reference.sharpness import gibbs_terms
from sam_kernels.validation.cases import copy_of, make_tensor, seed_of

__all__ = ["SHARPNESS_DTYPES", "SHARPNESS_OPTIONS", "Call", "build", "combinations", "weight_bounds"]

SHARPNESS_DTYPES = {"float32": torch.float32, "float64": torch.float64}
_BETAS: dict[str, dict[str, Any]] = {
    "flat": {"beta": 0.0},
    "plain": {"beta": 0.7},
    "steep": {"beta": 90.0},
    "tensor": {"beta": torch.tensor(1.3, dtype=torch.float64)},
}
_ALL = 0  # as many draws as there are norms
SHARPNESS_OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "sharpness_weights": _BETAS,
    "sharpness_sample": {
        f"{beta}_{'replaced' if replacement else 'successive'}_{'all' if draws == _ALL else draws}": {
            **given,
            "replacement": replacement,
            "num_samples": draws,
        }
        for beta, given in _BETAS.items()
        for replacement in (True, False)
        for draws in (5, _ALL)
    },
}
# Around the blocks of every backend; "huge" ones are so far apart that most weights vanish.
_SIZES = {"single": 1, "odd": 7, "below": 127, "block": 128, "above": 257, "many": 1027}
_ABOUT = ("ties", "zeros", "tiny", "huge", "nan", "inf", "unaligned", "strided")
_ABOUT_SIZE = 33


@dataclass
class Call:
    """One call of an operation."""

    op: str
    norms: Tensor  # (B,)
    keywords: dict[str, Any]

    def run(self, module: Any) -> list[Tensor]:
        """Return the indices, of an operation that returns some, and the weights."""
        result = getattr(module, self.op)(self.norms, **self.keywords)
        return [result] if isinstance(result, Tensor) else list(result)

    def double(self) -> Call:
        return Call(self.op, self.norms.to(torch.float64, copy=True), self.keywords)

    def on(self, device: str) -> Call:
        """Return a copy, inside a copy of the memory around the norms."""
        moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.keywords.items()}
        return Call(self.op, copy_of(self.norms, device), moved)


def combinations(op: str, dtype: str) -> Iterator[tuple[str, str]]:
    """The (case, keyword set) pairs to check an operation with, in either dtype."""
    for case in (*_SIZES, *_ABOUT):
        yield from ((case, option) for option in SHARPNESS_OPTIONS[op])


def build(op: str, case: str, dtype: str, option: str, seed: int = 0) -> Call:
    """Return the call that a case, a dtype and a keyword set describe. The norms lie inside memory that holds NaN."""
    number = seed_of(seed, op, case, dtype, option)
    generator = torch.Generator().manual_seed(number)
    norms = 3.0 * torch.rand(_SIZES.get(case, _ABOUT_SIZE), generator=generator, dtype=torch.float64)
    if case in ("ties", "zeros"):
        norms = torch.full_like(norms, 1.25 if case == "ties" else 0.0)
    norms *= {"tiny": 1e-30, "huge": 1e30}.get(case, 1.0)
    if case in ("nan", "inf"):
        norms[20] = float(case)
    keywords = dict(SHARPNESS_OPTIONS[op][option])
    if op == "sharpness_sample":
        keywords["num_samples"] = keywords["num_samples"] or len(norms)
        if not keywords["replacement"]:
            keywords["num_samples"] = min(keywords["num_samples"], len(norms))
        keywords["seed"] = number << 20 | 0xABCDE
    return Call(op, make_tensor(norms, SHARPNESS_DTYPES[dtype], case if case in ("unaligned", "strided") else "contiguous"), keywords)


def weight_bounds(call: Call, drawn: Tensor | None, weights: Tensor) -> Tensor:  # (k,) int64 or None, (k,) float64 -> (k,) float64
    """Return bounds of the weights, before they are rounded to their dtype.

    beta (n - max n) is the same number everywhere. Its exponential is off by up to 4 ulp (8 units of 2^-53) on either side, a sum of B
    positive terms by B - 1 units more, the divisions and the addition that follow by up to 4: 2 B + 40 for the ratio of a sum and a term.
    Terms near the end of the range lose their digits: they are off by up to 4 of the smallest number on either side.
    """
    terms = gibbs_terms(call.norms, call.keywords["beta"])
    relative = (2 * len(terms) + 40) * 2.0**-53
    if drawn is None:
        flat = isinstance(call.keywords["beta"], float) and call.keywords["beta"] == 0.0  # 1 / B, to the bit
        return torch.zeros_like(weights) if flat else weights * relative + 8 * 2.0**-1074
    lost = relative + 8 * 2.0**-1074 / terms[drawn]
    return torch.where(lost < 0.5, weights * lost / (1.0 - lost), math.inf)
