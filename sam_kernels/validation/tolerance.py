"""How far a correct result may lie from the exact one, derived operation by operation.

:class:`Rounded` is a number with a bound of its error. The formulas of the reference (:mod:`sam_kernels.reference.ops`) are evaluated on
it, and every operation adds the bound of its own rounding (running error analysis: Higham, *Accuracy and Stability of Numerical
Algorithms*, section 3.3). With u the unit roundoff of the arithmetic (2^-24 for float32, 2^-53 for float64):

* an operation gives fl(x) = x (1 + d) + h with |d| <= u and |h| half the smallest subnormal. It is charged twice that, one ulp: a backend
  may evaluate an equal expression with one more rounding (the reciprocal for a division, a lerp for a weighted sum);
* a hyperparameter, computed in float64, is rounded once on entry: u;
* errors of the operands go through by the usual rules (a product: |a| eb + |b| ea + ea eb). Where they cancel, the bound stays that of the
  operands: p + e in float32 is wrong by less than 2 ulp of the largest of p, e and p + e, unless e's own chain is what counts;
* the reference is float64 itself and errs too: u_64 more an operation;
* a value that leaves the range of the arithmetic has no bound.

Storage is no part of the bound: a result x stored in a narrower type lies between the roundings of x - bound and x + bound, since rounding
is monotone. For a 16-bit type that adds half an ulp of it, and demands round to nearest even.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Arithmetic", "Rounded", "dots_bound", "mean_bound", "norm_bound", "ulp"]


def ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:  # any shape, float64
    """The distance of neighbouring numbers of ``dtype`` at ``magnitude``."""
    info = torch.finfo(dtype)
    clamped = magnitude.abs().clamp(min=info.smallest_normal, max=info.max)
    exponent = torch.frexp(clamped).exponent - 1
    return info.eps * torch.exp2(exponent.to(torch.float64))


def norm_bound(norm: Tensor, terms: int, roundings: int | None = None) -> Tensor:
    """Bound of a norm of ``terms`` non-negative squares, before it is rounded to its own type: summed in float64 in any order, or in
    float32 where each term passes through ``roundings`` additions.

    A sum of n non-negative terms in any order is wrong by at most (n - 1) u relative to itself, a term of |T g|^2 by 5 u (|p| + eta one,
    times g one, squared twice both and one more). The root halves this and adds u. The reference errs alike: twice that.
    """
    double = ((terms + 4) / 2 + 1) * 2.0**-53
    single = double if roundings is None else ((roundings + 5) / 2 + 1) * 2.0**-24
    return (double + single) * norm


def dots_bound(
    left: Tensor,  # (N,)
    right: Tensor,  # (N,) d, exact
    error: Tensor,  # (N,) of the computed d
    roundings: int | None = None,
) -> Tensor:  # (3,) of sum l^2, sum l d, sum d^2
    """Bounds of inner products whose terms are summed as :func:`norm_bound` says, once more for the product.

    A float32 product below the normal numbers errs by half a subnormal: kernels that sum in float32 scale what is far from 1, so that each
    chunk's two squared norms are at least 2^-100, and N of these errors are less than N 2^-49 |l| |d|.
    """
    count = max(left.numel(), 1)
    reach = right.abs() + error
    norms = torch.linalg.vector_norm(left), torch.linalg.vector_norm(reach)
    products = torch.stack([norms[0] * norms[0], norms[0] * norms[1], norms[1] * norms[1]])
    sizes = torch.stack([(left * left).sum(), (left * reach).abs().sum(), (reach * reach).sum()])
    carried = torch.stack([torch.zeros_like(norms[0]), (left.abs() * error).sum(), ((right.abs() + reach) * error).sum()])
    rounded = 2 * (count + 1) * 2.0**-53 * sizes
    if roundings is not None:
        rounded += (roundings + 1) * 2.0**-24 * sizes + count * 2.0**-49 * products
    return (rounded + carried).nan_to_num(nan=torch.inf, posinf=torch.inf)


@dataclass(frozen=True)
class Arithmetic:
    """What one operation may add, for each element: its row may be computed in float32 or in float64."""

    unit: Tensor  # (N,) relative, one ulp
    tiny: Tensor  # (N,) absolute, the smallest subnormal
    largest: Tensor  # (N,) the largest finite number

    @staticmethod
    def of(dtypes: Tensor) -> Arithmetic:  # (N,) bool: float64
        """The arithmetic of elements for which float64 is used, or not."""

        def pick(double: float, single: float) -> Tensor:
            return torch.where(dtypes, torch.tensor(double, dtype=torch.float64), torch.tensor(single, dtype=torch.float64))

        single, double = torch.finfo(torch.float32), torch.finfo(torch.float64)
        return Arithmetic(pick(2 * double.eps, single.eps + double.eps), pick(2.0**-1074, 2.0**-149), pick(double.max, single.max))


class Rounded:
    """A number computed in floating point: ``value`` (N,) the exact one, ``error`` (N,) a bound of what was added to it."""

    def __init__(self, value: Tensor, error: Tensor, arithmetic: Arithmetic) -> None:
        self.value, self.error, self.arithmetic = value, error, arithmetic

    @staticmethod
    def exact(value: Tensor, arithmetic: Arithmetic) -> Rounded:
        """An operand as it lies in memory."""
        return Rounded(value, torch.zeros_like(value), arithmetic)

    def _constant(self, other: Rounded | Tensor | float) -> Rounded:
        if isinstance(other, Rounded):
            return other
        value = torch.as_tensor(other, dtype=torch.float64)
        return Rounded(value, value.abs() * self.arithmetic.unit / 2, self.arithmetic)

    def _result(self, value: Tensor, carried: Tensor) -> Rounded:
        reach = value.abs() + carried
        error = carried + self.arithmetic.unit * reach + self.arithmetic.tiny
        inside = reach + error <= self.arithmetic.largest
        return Rounded(value, torch.where(inside, error, torch.inf), self.arithmetic)

    def __add__(self, other: Rounded | Tensor | float) -> Rounded:
        other = self._constant(other)
        return self._result(self.value + other.value, self.error + other.error)

    def __sub__(self, other: Rounded | Tensor | float) -> Rounded:
        return self + -self._constant(other)

    def __mul__(self, other: Rounded | Tensor | float) -> Rounded:
        other = self._constant(other)
        carried = self.value.abs() * other.error + other.value.abs() * self.error + self.error * other.error
        return self._result(self.value * other.value, carried.nan_to_num(nan=torch.inf, posinf=torch.inf))

    def __truediv__(self, other: Rounded | Tensor | float) -> Rounded:
        other = self._constant(other)
        value = self.value / other.value
        carried = (self.error + value.abs() * other.error) / (other.value.abs() - other.error).clamp(min=0.0)
        return self._result(value, carried.nan_to_num(nan=torch.inf, posinf=torch.inf))

    def __radd__(self, other: Tensor | float) -> Rounded:
        return self._constant(other) + self

    def __rmul__(self, other: Tensor | float) -> Rounded:
        return self._constant(other) * self

    def __rtruediv__(self, other: Tensor | float) -> Rounded:
        return self._constant(other) / self

    def __neg__(self) -> Rounded:  # exact
        return Rounded(-self.value, self.error, self.arithmetic)

    def __abs__(self) -> Rounded:  # exact
        return Rounded(self.value.abs(), self.error, self.arithmetic)

    def clamp(self, *, max: float) -> Rounded:
        """Exact, and never wider."""
        return Rounded(self.value.clamp(max=max), self.error, self.arithmetic)

    def sqrt(self) -> Rounded:
        """The error of the operand is largest downwards: sqrt(x) - sqrt(x - e) <= sqrt(e)."""
        value = self.value.sqrt()
        carried = value - (self.value - self.error).clamp(min=0.0).sqrt()
        return self._result(value, torch.where(self.error.isfinite(), carried, torch.inf))


def mean_bound(values: Rounded, size: int, roundings: int | None = None) -> Rounded:
    """The means of consecutive runs of ``size`` exact values, each for every value of its run: summed in float64 in any order, or in
    float32 where each value passes through ``roundings`` additions.

    A sum in any order is wrong by at most (n - 1) u times the sum of magnitudes (Higham, section 4.2), here and in the reference, and both
    divide; in float32 by k u / (1 - k u) times it, k the roundings. Then the mean is divided and rounded into the arithmetic.
    """
    runs = values.value.reshape(-1, size)
    share = size * 2.0**-52
    if roundings is not None:
        share += roundings * 2.0**-24 / (1 - roundings * 2.0**-24)
    mean, magnitude = (spread.repeat_interleave(size) for spread in (runs.mean(dim=1), runs.abs().mean(dim=1)))
    return Rounded(mean, share * magnitude + values.arithmetic.unit * mean.abs() + values.arithmetic.tiny, values.arithmetic)
