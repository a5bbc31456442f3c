"""The expected residual of a sampling from its moments: the table's rows, enumeration of draws, the choice of B, and refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import theory

pytestmark = pytest.mark.usefixtures("one_thread")
N = 6
L = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0, 0.5], dtype=torch.float64)
P = torch.tensor([0.3, 0.1, 0.2, 0.15, 0.15, 0.1], dtype=torch.float64)
OWN = torch.tensor([0.3, 0.9, 0.5, 1.0, 0.2, 0.7], dtype=torch.float64)
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("tau_nice", {"tau": 1}),
    ("tau_nice", {"tau": 3}),
    ("tau_nice", {"tau": N}),
    ("full", {}),
    ("single", {"probabilities": P}),
    ("uniform", {}),
    ("importance", {}),
    ("with_replacement", {"tau": 2}),
    ("with_replacement", {"tau": 4, "probabilities": P}),
    ("independent", {"probabilities": OWN}),
]
expected = theory.expected_residual_of_moments
Draws = list[tuple[float, Tensor]]


def draws(name: str, options: dict[str, Any]) -> Iterator[tuple[float, Tensor]]:
    """(probability, v) of every draw: g = Σ v_i ∇f_i / n."""
    one, tau, uniform = torch.eye(N, dtype=torch.float64), options.get("tau", 1), torch.full((N,), 1 / N, dtype=torch.float64)
    p = options.get("probabilities", L / L.sum() if name == "importance" else uniform)
    if name in ("tau_nice", "full"):
        subsets = list(itertools.combinations(range(N), N if name == "full" else tau))
        yield from ((1 / len(subsets), N * one[list(subset)].mean(0)) for subset in subsets)
    elif name == "independent":
        for mask in itertools.product((0.0, 1.0), repeat=N):
            drawn = torch.tensor(mask, dtype=torch.float64)
            yield torch.where(drawn > 0, p, 1 - p).prod().item(), drawn / p
    else:
        for picks in itertools.product(range(N), repeat=tau):
            yield p[list(picks)].prod().item(), (one[list(picks)] / p).mean(0)


def moments(all_draws: Draws) -> tuple[Tensor, Tensor]:
    """E[v], E[v v']."""
    q, v = torch.tensor([q for q, _ in all_draws], dtype=torch.float64), torch.stack([v for _, v in all_draws])
    return q @ v, (q[:, None] * v).T @ v


def blocks(weights: Tensor) -> Draws:
    """One of three blocks of two samples, with these probabilities: stratified data, or batches that are cut once."""
    return [
        (p.item(), torch.zeros(N, dtype=torch.float64).index_fill(0, torch.tensor([2 * k, 2 * k + 1]), 1 / p.item()))
        for k, p in enumerate(weights)
    ]


UNEVEN = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)


def signed() -> Draws:
    """Weights below 0, too: v = 1 + z and 1 - z."""
    z = torch.tensor([2.0, -1.0, 0.5, 0.0, 3.0, -2.0], dtype=torch.float64)
    return [(0.5, 1 + z), (0.5, 1 - z)]


@pytest.mark.parametrize(("name", "options"), ROWS, ids=lambda x: x if isinstance(x, str) else "-".join(x))
def test_every_row_of_the_table_follows_from_its_moments(name: str, options: dict[str, Any]) -> None:
    first, second = moments(list(draws(name, options)))
    found = expected(second, L=L, first_moments=first)
    assert found == pytest.approx(theory.expected_residual(name, n=N, L=L, **options), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("B", [None, 0.0, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("all_draws", [blocks(UNEVEN), signed(), list(draws("tau_nice", {"tau": 2}))], ids=["blocks", "signed", "tau_nice"])
def test_the_residual_holds_and_no_smaller_a_does(all_draws: Draws, B: float | None) -> None:
    """For gradients of any kind, ‖∇f_i‖² = 2 L_i (f_i - f_i,inf); with equality for those along the eigenvector."""
    _, second = moments(all_draws)
    A, used = expected(second, L=L, B=B)
    assert B in (None, used)
    generator, worst = torch.Generator().manual_seed(0), 0.0
    root = L.sqrt()
    top = torch.linalg.eigh(root[:, None] * (second - used) * root)[1][:, -1]
    for trial in range(300):
        g = torch.randn(N, 1 + trial % 3, generator=generator, dtype=torch.float64) if trial else (root * top)[:, None]
        above = (g.square().sum(1) / (2 * L)).mean().item()  # f - mean f_i,inf
        square = sum(q * (v @ g / N).square().sum().item() for q, v in all_draws)
        left, right = square - used * g.mean(0).square().sum().item(), 2 * A * above
        assert left <= right * (1 + 1e-12) + 1e-13
        worst = max(worst, left / right) if right else worst
    assert A == 0 or worst == pytest.approx(1, rel=1e-12)


def test_a_diagonal_majorant_is_no_better() -> None:
    _, second = moments(blocks(UNEVEN))
    A, B = expected(second, L=L)
    K = second - B
    for seed in range(200):
        shape = torch.rand(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
        scale = torch.linalg.eigvalsh(K / (shape.sqrt()[:, None] * shape.sqrt()))[-1].item()  # the least with scale · shape ⪰ K
        assert (scale * shape * L).max().item() / N >= A * (1 - 1e-12)


@pytest.mark.parametrize("mu", [1e-3, 0.1, 0.5, 2.0, 30.0])
@pytest.mark.parametrize("all_draws", [blocks(UNEVEN), signed(), list(draws("tau_nice", {"tau": 2})), list(draws("full", {}))])
def test_mu_chooses_the_b_that_is_best_for_steps(all_draws: Draws, mu: float) -> None:
    _, second = moments(all_draws)
    A, B = expected(second, L=L, mu=mu)
    assert expected(second, L=L, B=B) == pytest.approx((A, B), rel=1e-12, abs=1e-13)
    others = [*torch.linspace(0, 3 * B + 2, 400).tolist(), expected(second, L=L)[1]]
    assert A + B * mu <= min(a + b * mu for a, b in (expected(second, L=L, B=other) for other in others)) * (1 + 1e-6)


def test_a_better_b_than_the_table_s_allows_longer_steps() -> None:
    _, second = moments(list(draws("tau_nice", {"tau": 2})))
    steps = [theory.pl_constant_steps(0.01, 5.0, *expected(second, L=L, mu=mu), 0.0) for mu in (None, 0.01)]
    assert steps[1][1] > 1.05 * steps[0][1]


def test_b_without_a_choice() -> None:
    _, second = moments(blocks(UNEVEN))
    assert expected(second, L=L)[1] == 1.0  # elements off the diagonal differ: the variance
    assert expected([[2.5]], L=3.0) == (0.0, 2.5)  # one sample
    assert expected([[2.0, 0.5], [0.5, 2.0]], L=3.0) == (2.25, 0.5)
    assert expected([[3.0, -0.5], [-0.5, 3.0]], L=2.0) == pytest.approx((3.5, 1.0))  # B is at least 0; here 1
    assert expected(torch.tensor([[2.0, 0.5], [0.5, 2.0]]), L=[3.0, 1.0]) == (2.25, 0.5)  # float32


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: expected([1.0, 2.0], L=1.0), ValueError, r"second_moments must be square, \(n, n\), got shape \(2,\)"),
        (lambda: expected([[1.0, 1.0]], L=1.0), ValueError, r"must be square, \(n, n\), got shape \(1, 2\)"),
        (lambda: expected([[1.0], [1.0, 1.0]], L=1.0), TypeError, "must be a floating-point tensor or rows of numbers"),
        (lambda: expected(torch.ones(2, 2, dtype=torch.int64), L=1.0), TypeError, "second_moments has dtype torch.int64"),
        (lambda: expected([[1.0, math.nan], [1.0, 1.0]], L=1.0), ValueError, r"second_moments\[0, 1\] must be finite, got nan"),
        (
            lambda: expected([[2.0, 1.0], [1.1, 2.0]], L=1.0),
            ValueError,
            r"second_moments\[0, 1\] is 1.0, \[1, 0\] is 1.1; .* must be equal",
        ),
        (
            lambda: expected([[2.0, 1.0], [1.0, 0.9]], L=1.0),
            ValueError,
            r"second_moments\[1, 1\] must be at least 1, .* weight sample i by",
        ),
        (lambda: expected([[2.0, 2.1], [2.1, 2.0]], L=1.0), ValueError, "its least eigenvalue is -0.1, in whose vector row"),
        (lambda: expected([[2.0, 1.0], [1.0, 2.0]], L=[1.0]), ValueError, "L must have n = 2 elements, .* got 1"),
        (lambda: expected([[2.0, 1.0], [1.0, 2.0]], L=[1.0, 0.0]), ValueError, r"L\[1\] must be finite and more than 0.0, got 0.0"),
        (lambda: expected([[2.0]], L=1.0, B=-0.1), ValueError, "B must be a finite number in"),
        (lambda: expected([[2.0]], L=1.0, mu=0.0), ValueError, "mu must be a finite number in"),
        (lambda: expected([[2.0]], L=1.0, B=1.0, mu=1.0), ValueError, "give B or mu, not both"),
        (lambda: expected([[2.0]], L=1.0, first_moments=[1.0, 1.0]), ValueError, "first_moments must have n = 1 elements"),
        (
            lambda: expected([[2.0, 1.0], [1.0, 2.0]], L=1.0, first_moments=[1.0, 1.001]),
            ValueError,
            r"first_moments\[1\] must be 1 within 1.49e-08, got 1.001: a biased sampling .* divide v_i by E\[v_i\]",
        ),
    ],
)
def test_bad_input(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_biased_sampling_has_no_covariance() -> None:
    """Uniform draws of weight 1, each block twice as often as it should be: E[v] = 2 is seen without the first moments where it can be."""
    unweighted = [(q, v / 2) for q, v in blocks(UNEVEN)]
    with pytest.raises(ValueError, match=r"second_moments\[0, 0\] must be at least 1"):
        expected(moments(unweighted)[1], L=L)


def test_rounding_of_moments_is_no_error() -> None:
    ones = torch.full((300, 300), 1.0) * (1 + 1e-7)
    A, B = expected(ones, L=2.0)
    assert pytest.approx((0, 1), abs=1e-6) == (A, B)
    third = torch.full((3, 3), 1 / 3, dtype=torch.float64) * 3
    assert expected(third - 1e-16, L=1.0)[0] == pytest.approx(0, abs=1e-15)


def test_elements_that_differ_by_rounding_are_bounded_all_the_same() -> None:
    """A diagonal plus rounding: A is no less than the eigenvalue, which rounding may raise; and the two halves count alike."""
    noise = 5e-9 * torch.randn(50, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64).clamp(-0.5, 0.5)
    second = torch.full((50, 50), 0.9, dtype=torch.float64) + 8 * torch.eye(50, dtype=torch.float64)
    for one in (noise + noise.T, noise.triu(), noise.tril()):
        A, B = expected(second + one, L=1.0)
        assert abs(B - 0.9) < 1e-7
        mean = (2 * second + one + one.T) / 2
        assert torch.linalg.eigvalsh(mean - B)[-1].item() / 50 <= A <= 8 / 50 + 2e-8
        assert expected((second + one).T, L=1.0, B=1.0) == pytest.approx(expected(second + one, L=1.0, B=1.0), rel=1e-14)
