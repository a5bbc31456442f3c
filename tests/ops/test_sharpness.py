"""Weights by sharpness and draws by them: the distribution is enumerated, the mean unbiased to rounding, what is odd stays defined."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from sam_kernels.backends.foreach import sharpness as foreach
from sam_kernels.functional import sharpness_sample, sharpness_weights
from sam_kernels.reference.sharpness import gibbs_terms, ordered_weights, replacement_weights, uniforms
from sam_kernels.validation.check import check, combinations
from sam_kernels.validation.options import SHARPNESS_OPTIONS
from sam_kernels.validation.sharpness import SHARPNESS_DTYPES
from tests.helpers.compare import assert_same_bits
from tests.ops.test_random import philox_in_integers

MODES = pytest.mark.parametrize("replacement", [True, False], ids=["replaced", "successive"])
NORMS = torch.tensor([0.3, 1.1, 0.2, 0.9], dtype=torch.float64)
BETA = 1.5
UNLIKELY = 1e-7  # of a count or a sum of squares, were the kernels right


def calls(backend: str, number: int) -> int:
    """Fewer where each is interpreted."""
    return number // 20 if backend == "triton" else number


def outcomes(terms: Tensor, draws: int, replacement: bool) -> Iterator[tuple[tuple[int, ...], float]]:
    """Every ordered outcome, with its probability."""
    weights = terms.tolist()
    for drawn in itertools.product(range(len(weights)), repeat=draws):
        if replacement:
            yield drawn, math.prod(weights[i] / sum(weights) for i in drawn)
        elif len(set(drawn)) == draws:
            rest = [sum(w for i, w in enumerate(weights) if i not in drawn[:r]) for r in range(draws)]
            yield drawn, math.prod(weights[i] / left for i, left in zip(drawn, rest, strict=True))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", SHARPNESS_DTYPES)
@pytest.mark.parametrize("op", SHARPNESS_OPTIONS)
def test_matches_the_reference(backend: str, op: str, dtype: str) -> None:
    wrong = []
    for i, (case, option) in enumerate(combinations(op, dtype)):
        if backend == "triton" and (i % 7 or case == "many"):
            continue
        worst = check(op, [backend], dtype, case, option)[backend]
        wrong += [] if worst.passed else [f"{case} {option}: {worst}"]
    assert wrong == []


def test_uniforms_are_bits_of_the_published_generator() -> None:
    """For every index in 64 bits, and never 0 or 1."""
    seed, indices = 0x0123456789ABCDEF, [0, 1, 2, 1000, 2**32 - 1, 2**32 + 5]
    for i, u in zip(indices, uniforms(torch.tensor(indices), seed).tolist(), strict=True):
        words = philox_in_integers([i % 2**32, i >> 32, 0, 2], [0x89ABCDEF, 0x01234567])
        assert Fraction(u) == Fraction(2 * ((words[0] << 20) | (words[1] >> 12)) + 1, 2**53)


def test_draws_are_the_inverse_of_the_exact_sums(backend: str) -> None:
    draws, seed = calls(backend, 1000), 77
    indices, _ = sharpness_sample(NORMS, draws, beta=BETA, replacement=True, seed=seed)
    sums = list(itertools.accumulate(Fraction(term) for term in gibbs_terms(NORMS, BETA).tolist()))
    for u, index in zip(uniforms(torch.arange(draws), seed).tolist(), indices.tolist(), strict=True):
        assert index == next(i for i, reached in enumerate(sums) if reached > Fraction(u) * sums[-1])


def test_successive_draws_are_the_largest_keys(backend: str) -> None:
    norms, seed = torch.linspace(0.0, 3.0, 300, dtype=torch.float64), 78
    keys = [BETA * n - math.log(-math.log(u)) for n, u in zip(norms.tolist(), uniforms(torch.arange(300), seed).tolist(), strict=True)]
    indices, _ = sharpness_sample(norms, 20, beta=BETA, replacement=False, seed=seed)
    assert indices.tolist() == sorted(range(300), key=lambda i: -keys[i])[:20]


def tail(count: int, trials: int, p: float) -> float:
    """The smaller of P(X <= count) and P(X >= count) of a binomial X, summed term by term."""

    def term(x: int) -> float:
        choices = math.lgamma(trials + 1) - math.lgamma(x + 1) - math.lgamma(trials - x + 1)
        return math.exp(choices + x * math.log(p) + (trials - x) * math.log1p(-p))

    return min(sum(map(term, range(count + 1))), sum(map(term, range(count, trials + 1))))


@MODES
def test_every_outcome_is_as_frequent_as_its_probability(backend: str, replacement: bool) -> None:
    """By enumeration; counts against exact tails of the binomial distribution."""
    terms, trials = gibbs_terms(NORMS, BETA), calls(backend, 4000)
    drawn = (sharpness_sample(NORMS, 2, beta=BETA, replacement=replacement, seed=seed)[0] for seed in range(trials))
    counts = Counter(tuple(indices.tolist()) for indices in drawn)
    expected = dict(outcomes(terms, 2, replacement))
    assert math.isclose(sum(expected.values()), 1.0)
    assert counts.keys() <= expected.keys()
    for outcome, probability in expected.items():
        assert tail(counts[outcome], trials, probability) > UNLIKELY, outcome


def quantile(freedom: int) -> float:
    """Of chi-square, at 1 - UNLIKELY: Wilson and Hilferty's cube of a normal, which is off by less than 1 % from 30 degrees on."""
    normal, spread = 5.199, 2.0 / (9.0 * freedom)
    return 1.01 * freedom * (1.0 - spread + normal * math.sqrt(spread)) ** 3


def test_the_quantile_is_that_of_the_sum_of_squares() -> None:
    """Its survival function for an even number of degrees is a Poisson sum: it is UNLIKELY at the quantile, a little less for the 1 %."""
    for freedom in (30, 50, 100):
        half = quantile(freedom) / 2
        survival = sum(math.exp(-half + i * math.log(half) - math.lgamma(i + 1)) for i in range(freedom // 2))
        assert UNLIKELY / 4 < survival <= UNLIKELY


@MODES
def test_large_batches_by_chi_square(backend: str, replacement: bool) -> None:
    """With replacement all draws of one seed; without, the first draw of many."""
    norms = torch.linspace(0.0, 2.0, 51, dtype=torch.float64)
    p = sharpness_weights(norms, beta=1.0)
    trials = calls(backend, 40_000 if replacement else 8_000)
    if replacement:
        drawn = sharpness_sample(norms, trials, beta=1.0, replacement=True, seed=5)[0]
    else:
        drawn = torch.cat([sharpness_sample(norms, 1, beta=1.0, replacement=False, seed=seed)[0] for seed in range(trials)])
    squares = ((drawn.bincount(minlength=51) - trials * p).square() / (trials * p)).sum()
    assert squares < quantile(50)


@MODES
def test_the_mean_is_unbiased_over_all_outcomes(replacement: bool) -> None:
    """The reference's weights: sum of probability, weight and value, exact but for rounding."""
    terms, values = gibbs_terms(NORMS, BETA), torch.tensor([3.0, -1.0, 0.5, 10.0], dtype=torch.float64)
    weigh = replacement_weights if replacement else ordered_weights
    for draws in (1, 2, 3, 4):
        found = sum(p * (weigh(terms, torch.tensor(i)) @ values[list(i)]).item() for i, p in outcomes(terms, draws, replacement))
        assert math.isclose(found, values.mean().item(), rel_tol=1e-14)


@MODES
def test_each_backends_mean_is_unbiased(backend: str, replacement: bool) -> None:
    """With the weights it gives for a seed of each outcome."""
    norms, values = NORMS[:3], torch.tensor([3.0, -1.0, 10.0], dtype=torch.float64)
    missing = dict(outcomes(gibbs_terms(norms, BETA), 2, replacement))
    mean = 0.0
    for seed in range(1000):
        indices, weights = sharpness_sample(norms, 2, beta=BETA, replacement=replacement, seed=seed)
        mean += missing.pop(tuple(indices.tolist()), 0.0) * (weights @ values[indices]).item()
        if not missing:
            break
    assert not missing
    assert math.isclose(mean, values.mean().item(), rel_tol=1e-14)


@pytest.mark.parametrize("dtype", SHARPNESS_DTYPES.values(), ids=str)
def test_beta_zero_is_exactly_uniform(backend: str, dtype: torch.dtype) -> None:
    for count in (1, 2, 3, 49, 127, 257):
        for norms in (torch.rand(count), torch.full((count,), 1e38)):
            weights = sharpness_weights(norms.to(dtype), beta=0.0)
            assert_same_bits("weights", [weights], [torch.full((count,), 1.0 / count, dtype=dtype)])
    far_apart = torch.tensor([-1.7e308, 1.7e308, 0.0], dtype=torch.float64)
    assert torch.equal(sharpness_weights(far_apart, beta=0.0), torch.full((3,), 1 / 3, dtype=torch.float64))


def test_one_norm(backend: str) -> None:
    norms = torch.tensor([2.5])
    assert sharpness_weights(norms, beta=3.0).tolist() == [1.0]
    for draws, replacement in ((1, True), (1, False), (4, True)):
        indices, weights = sharpness_sample(norms, draws, beta=3.0, replacement=replacement, seed=1)
        assert indices.tolist() == [0] * draws
        assert weights.tolist() == [1.0 / draws] * draws


def test_a_beta_so_large_that_weights_vanish(backend: str) -> None:
    """The largest is drawn; without replacement the others follow by size, with infinite weights and never NaN."""
    norms = torch.tensor([1.0, 3.0, 2.0])
    assert sharpness_weights(norms, beta=1e300).tolist() == [0.0, 1.0, 0.0]
    indices, weights = sharpness_sample(norms, 4, beta=1e300, replacement=True, seed=1)
    assert (indices.tolist(), weights.tolist()) == ([1] * 4, [torch.tensor(1 / 12).item()] * 4)
    indices, weights = sharpness_sample(norms.double(), 3, beta=1e300, replacement=False, seed=1)
    assert indices.tolist() == [1, 2, 0]
    assert weights.tolist() == [(1.0 + 2.0) / 9.0, math.inf, math.inf]


def test_equal_keys_are_drawn_in_the_order_of_indices(backend: str) -> None:
    """Equal at -inf: a product of beta that overflows."""
    norms = torch.tensor([0.0, 5.0, 1.0, 2.0] * 80, dtype=torch.float64)
    norms[5::4] = 2.5
    indices, weights = sharpness_sample(norms, 320, beta=1e308, replacement=False, seed=9)
    assert indices.tolist() == [1, *(i for i in range(320) if i != 1)]
    assert not weights.isnan().any()


def test_what_is_left_is_not_what_one_lacks(backend: str) -> None:
    """The first has p = 1 - 2e-18: 1 less the sum of what was drawn would be 0."""
    indices, weights = sharpness_sample(torch.tensor([41.0, 0.0, 0.0], dtype=torch.float64), 2, beta=1.0, replacement=False, seed=3)
    assert indices[0] == 0
    assert weights[1].item() == pytest.approx(2.0 / 6.0, rel=1e-15)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("beta", [0.0, 2.0, -2.0])
def test_a_norm_that_is_not_finite_makes_every_weight_nan(backend: str, bad: float, beta: float) -> None:
    for place in (0, 150, 299):
        norms = torch.rand(300)
        norms[place] = bad
        assert sharpness_weights(norms, beta=beta).isnan().all()
        for replacement in (True, False):
            indices, weights = sharpness_sample(norms, 300, beta=beta, replacement=replacement, seed=4)
            assert weights.isnan().all()
            assert ((indices >= 0) & (indices < 300)).all()
            assert replacement or len(indices.unique()) == 300
    assert sharpness_sample(torch.full((3,), bad), 3, beta=beta, replacement=False, seed=4)[0].tolist() == [0, 1, 2]


def test_a_number_and_a_tensor_are_the_same_beta(backend: str) -> None:
    norms = torch.rand(20, requires_grad=True)
    for beta in (torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.0])):
        for replacement in (True, False):
            pair = [sharpness_sample(norms, 7, beta=b, replacement=replacement, seed=4) for b in (beta, beta.item())]
            assert_same_bits("weights", [pair[0][1]], [pair[1][1]])
            assert torch.equal(pair[0][0], pair[1][0])
            assert not pair[0][1].requires_grad
        assert_same_bits("weights", [sharpness_weights(norms, beta=beta)], [sharpness_weights(norms, beta=beta.item())])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_bits_depend_on_neither_run_nor_threads(backend: str) -> None:
    norms = torch.rand(300 if backend == "triton" else 100_000)  # more than torch gives to one thread

    def outcome() -> list[Tensor]:
        drawn = [sharpness_sample(norms, 50, beta=3.0, replacement=replacement, seed=6) for replacement in (True, False)]
        return [sharpness_weights(norms, beta=3.0), *itertools.chain(*drawn)]

    first = outcome()
    for count in (1, 3):
        torch.set_num_threads(count)
        for ours, expected in zip(outcome(), first, strict=True):
            assert torch.equal(ours, expected)


@MODES
def test_the_fallback_reads_no_number_back(replacement: bool) -> None:
    """On torch's device without memory, where whatever depends on a value is an error."""
    norms, beta = torch.empty(9, device="meta"), torch.empty((), device="meta")
    assert foreach.sharpness_weights(norms, beta=beta).shape == (9,)
    indices, weights = foreach.sharpness_sample(norms, 5, beta=beta, replacement=replacement, seed=2)
    assert (indices.dtype, weights.dtype, len(indices), len(weights)) == (torch.int64, torch.float32, 5, 5)


@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"norms": [1.0]}, TypeError, "norms must be a torch.Tensor"),
        ({"norms": torch.ones(3, dtype=torch.float16)}, TypeError, "norms has dtype torch.float16; supported are float32, float64"),
        ({"norms": torch.ones(3, dtype=torch.int64)}, TypeError, "norms has dtype torch.int64"),
        ({"norms": torch.ones(3).to_sparse()}, TypeError, "norms is a torch.sparse_coo tensor"),
        ({"norms": torch.ones(3, 1)}, ValueError, r"norms must have shape \(B,\) with B at least 1, got \(3, 1\)"),
        ({"norms": torch.ones(0)}, ValueError, r"norms must have shape \(B,\) with B at least 1, got \(0,\)"),
        ({"beta": -math.inf}, ValueError, r"beta must be a finite number in \(-inf, inf\)"),
        ({"beta": math.nan}, ValueError, "beta must be a finite number"),
        ({"beta": math.inf}, ValueError, "beta must be a finite number"),
        ({"beta": torch.tensor(math.nan)}, ValueError, "beta must be a finite number"),
        ({"beta": torch.ones(2)}, ValueError, "beta must be a number or a tensor that holds one"),
        ({"beta": "1"}, TypeError, "beta must be a number"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ({"num_samples": 4}, ValueError, "num_samples must be at most 3, got 4"),
        ({"num_samples": -1, "replacement": True}, ValueError, "num_samples must be at least 1, got -1"),
        ({"num_samples": True}, TypeError, "num_samples must be an integer"),
        ({"num_samples": 2.0}, TypeError, "num_samples must be an integer"),
        ({"replacement": 1}, TypeError, "replacement must be True or False"),
        ({"seed": 2**64}, ValueError, "seed must be an integer in"),
        ({"seed": 1.0}, TypeError, "seed must be an integer"),
    ],
)
def test_bad_input_is_refused_by_name(backend: str, changed: dict[str, object], error: type[Exception], words: str) -> None:
    given = {"norms": torch.ones(3), "num_samples": 2, "beta": 1.0, "replacement": False, "seed": 0, **changed}
    with pytest.raises(error, match=f"^sharpness_sample: {words}"):
        sharpness_sample(**given)  # type: ignore[arg-type]  # as a caller may
    if changed.keys() <= {"norms", "beta"}:
        with pytest.raises(error, match=f"^sharpness_weights: {words}"):
            sharpness_weights(given["norms"], beta=given["beta"])  # type: ignore[arg-type]  # as a caller may
