r"""The expected residual of any sampling, from its first two moments. Notation: :mod:`sam_kernels.theory._unified`.

A sampling draws a vector v (n,) with E[v_i] = 1; its gradient is g = (1/n) Σ v_i ∇f_i. With M_ij = E[v_i v_j], G_ij = ⟨∇f_i, ∇f_j⟩ and
K = M - B 1 1',

    E‖g‖² - B ‖∇f‖² = (1/n²) Σ_ij K_ij G_ij = tr(L^½ K L^½ · L^-½ G L^-½) / n²,    L = diag(L_i).

L^-½ G L^-½ is positive semidefinite, and its trace is Σ ‖∇f_i‖² / L_i ≤ 2 Σ (f_i - f_i,inf). So A = max(0, λ_max(L^½ K L^½)) / n.
A diagonal D ⪰ K would give max_i D_i L_i / n. That is never less: D ⪯ c L^-1 for c = max_i D_i L_i, so L^½ K L^½ ⪯ c. And A is the least
that holds for this B and all f: f_i = L_i (x - c_i)² / 2 in one dimension, (√L_i (x - c_i))_i an eigenvector of λ_max, is an equality.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels._validate import check_number, check_tensor, check_vector
from sam_kernels.theory._unified import _ROUNDING

__all__ = ["expected_residual_of_moments"]

_NAME = "expected_residual_of_moments"
_PRECISION = 1e-6  # relative, of A + B μ at the B that is searched: each halving is an eigenvalue problem


def expected_residual_of_moments(
    second_moments: Tensor | Sequence[Sequence[float]],  # (n, n)
    *,
    L: float | Tensor | Sequence[float],  # (n,) or one for all
    B: float | None = None,
    mu: float | None = None,
    first_moments: Tensor | Sequence[float] | None = None,  # (n,)
) -> tuple[float, float]:
    """Return (A, B) of the expected residual of a sampling that is known by M_ij = E[v_i v_j]. Derived, in float64.

    g = (1/n) Σ v_i ∇f_i, E[v_i] = 1: the mean over a batch of weight · loss has v_i = (n/|S|) Σ weight over the draws of i. Then
    E‖g‖² ≤ 2 A (f - f_inf) + B ‖∇f‖² + C with A = max(0, λ_max(L^½ (M - B 1 1') L^½)) / n and C of :func:`residual_constant`. For this B
    no smaller A holds for all f. Every row of :func:`expected_residual` is a case of it.

    Two moments do not bound the smoothness of f_S, which step sizes and bounds need as their ``L``: that is a matter of the largest draw.
    Give them the maximum over all draws of (1/n) Σ |v_i| L_i, in the place of :func:`sampled_smoothness`.

    Args:
        second_moments: M, floating point; symmetric, with M - 1 1' (the covariance of v) positive semidefinite, within rounding: n times
            the eps of its dtype, 2^-26 at least, relative to √(M_ii M_jj) or to the norm of M. Exact ones: estimates have more noise.
        L: L_i > 0 of every sample, or one number for all.
        B: ≥ 0, of your choice. None: the B ≥ 0 with the least A + B ``mu``, if ``mu`` is given. (Step sizes for μ-PL functions fall
            with A + B μ.) Otherwise what all M_ij, i ≠ j, have in common, within rounding, as in :func:`expected_residual`; 1 where they
            differ, with which A is a bound on the variance.
        mu: μ > 0, only without ``B``.
        first_moments: E[v_i], for a check. Moments that are not 1 are an error: such a sampling minimises Σ E[v_i] f_i / n, not f.
    Returns: A and B.
    Raises: TypeError or ValueError for arguments of the wrong type, shape or range, with the index.
    Costs: an eigenvalue problem of M; some 30 with ``mu``, of O(n³) each: a minute at n = 2,000 on one core. A has their rounding, of
        about n times the eps of float64, unless M - B 1 1' is diagonal.
    """
    moments, tolerance = _checked_moments(second_moments)
    n = len(moments)
    if first_moments is not None:
        _check_unbiased(first_moments, n)
    is_one = isinstance(L, int | float) or (isinstance(L, Tensor) and L.numel() == 1)
    smoothness = check_vector(_NAME, "L", [check_number(_NAME, "L", L)] * n if is_one else L, low=0.0, open_low=True)
    if len(smoothness) != n:
        raise ValueError(f"{_NAME}: L must have n = {n} elements, as second_moments has rows, got {len(smoothness)}")
    if B is not None and mu is not None:
        raise ValueError(f"{_NAME}: give B or mu, not both: mu is what B is chosen by")
    common = _common(moments, tolerance)
    if B is not None:
        B = check_number(_NAME, "B", B, low=0.0)
    elif mu is not None:
        B = _best(moments, smoothness, check_number(_NAME, "mu", mu, low=0.0, open_low=True), common)
    else:
        B = 1.0 if common is None else common
    return _constant(moments, smoothness, B, common), B


def _constant(moments: Tensor, smoothness: Tensor, B: float, common: float | None) -> float:
    """A. A diagonal M - B 1 1' has its eigenvalues to the last bit."""
    if common == B:
        uneven = _off_diagonal(moments).sub(B).abs().max().item() * smoothness.sum().item()  # 0 but for rounding
        return (max(0.0, ((moments.diagonal() - B) * smoothness).max().item()) + uneven) / len(moments)
    return _largest(moments, smoothness, B)[0]


def _largest(moments: Tensor, smoothness: Tensor, B: float) -> tuple[float, float]:
    """A, and a subgradient of it as a function of B, which is convex."""
    root = smoothness.sqrt()
    values, vectors = torch.linalg.eigh(root[:, None] * (moments - B) * root)
    if values[-1] <= 0:
        return 0.0, 0.0
    return values[-1].item() / len(moments), -((vectors[:, -1] @ root).square().item()) / len(moments)


def _best(moments: Tensor, smoothness: Tensor, mu: float, common: float | None) -> float:
    """The B ≥ 0 of the least A + B μ, which is convex in B, by halving."""
    found: dict[float, float] = {}  # A + B μ of each B

    def slope(B: float) -> float:
        A, of_A = _largest(moments, smoothness, B)
        found[B] = A + B * mu
        return of_A + mu

    if common is not None:
        found[common] = _constant(moments, smoothness, common, common) + common * mu
    low, high = 0.0, found[0.0] / mu if slope(0.0) < 0 else 0.0  # from there on B μ alone is more
    steepest = smoothness.mean().item() + mu
    while (high - low) * steepest > _PRECISION * min(found.values()):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return min(found, key=lambda B: found[B])


def _off_diagonal(moments: Tensor) -> Tensor:
    """The elements off the diagonal; of one sample its own, with which A is 0."""
    n = len(moments)
    return moments[~torch.eye(n, dtype=torch.bool)] if n > 1 else moments[0]


def _common(moments: Tensor, tolerance: float) -> float | None:
    """What all elements off the diagonal have in common, None if they differ or are negative."""
    off = _off_diagonal(moments)
    least, largest = off.min().item(), off.max().item()
    if largest - least > tolerance * max(1.0, largest) or largest < 0:
        return None
    return max(0.0, least if least == largest else off.mean().item())


def _checked_moments(value: object) -> tuple[Tensor, float]:
    """(n, n) float64 on the CPU, symmetric to the last bit; and by how much what was given may be off."""
    name = "second_moments"
    if not isinstance(value, Tensor):
        try:
            value = torch.tensor(value, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{_NAME}: {name} must be a floating-point tensor or rows of numbers, all of one length") from None
    given = check_tensor(_NAME, name, value).detach()
    if given.dim() != 2 or given.shape[0] != given.shape[1] or not len(given):
        raise ValueError(f"{_NAME}: {name} must be square, (n, n), got shape {tuple(given.shape)}")
    moments = given.to("cpu", torch.float64)
    tolerance = _tolerance(given)
    if (wrong := ~moments.isfinite()).any():
        i, j = wrong.nonzero()[0].tolist()
        raise ValueError(f"{_NAME}: {name}[{i}, {j}] must be finite, got {moments[i, j].item()}")
    if (wrong := moments.diagonal() < 1 - tolerance).any():
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"{_NAME}: {name}[{i}, {i}] must be at least 1, as E[v²] ≥ E[v]² and E[v] = 1, got {moments[i, i].item()}; "
            "weight sample i by 1 / (how often it comes), so that E[v_i] = 1"
        )
    size = moments.diagonal().sqrt()
    if (wrong := (moments - moments.T).abs() > tolerance * size[:, None] * size).any():
        i, j = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{_NAME}: {name}[{i}, {j}] is {moments[i, j].item()}, [{j}, {i}] is {moments[j, i].item()}; "
            "both are E[v_i v_j] and must be equal"
        )
    moments = (moments + moments.T) / 2
    values, vectors = torch.linalg.eigh(moments - 1)
    if values[0] < -tolerance * torch.linalg.matrix_norm(moments):
        i = int(vectors[:, 0].abs().argmax())
        raise ValueError(
            f"{_NAME}: {name} - 1 is the covariance of v where E[v_i] = 1, and must be positive semidefinite; its least eigenvalue is "
            f"{values[0].item():.3g}, in whose vector row {i} has most; check that E[v_i] = 1, and that these are moments of one sampling"
        )
    return moments, tolerance


def _tolerance(given: Tensor) -> float:
    """Relative: n additions, rounded in the dtype; sums over very many draws have more terms."""
    return max(_ROUNDING, len(given) * torch.finfo(given.dtype).eps)


def _check_unbiased(value: Tensor | Sequence[float], n: int) -> None:
    first = check_vector(_NAME, "first_moments", value, low=0.0)
    if len(first) != n:
        raise ValueError(f"{_NAME}: first_moments must have n = {n} elements, as second_moments has rows, got {len(first)}")
    tolerance = _tolerance(value if isinstance(value, Tensor) else first)
    if (wrong := (first - 1).abs() > tolerance).any():
        i = int(wrong.nonzero()[0])
        raise ValueError(
            f"{_NAME}: first_moments[{i}] must be 1 within {tolerance:.3g}, got {first[i].item()}: a biased sampling converges to the "
            "minimum of another objective; divide v_i by E[v_i], and second_moments[i, j] by E[v_i] E[v_j]"
        )
