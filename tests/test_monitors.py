"""Monitors against enumeration: every draw there is, of a handful of gradients."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import functional, monitors
from tests.optim.problem import assert_same_bits, every_backend, gradients, loss_of, make_batch, make_model, weights

N = 4
EXACT = {"rel": 1e-12, "abs": 1e-12}


def sample_gradients() -> Tensor:  # (N, 5)
    return torch.randn(N, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.7


def covariance_trace(g: Tensor) -> float:
    return (g - g.mean(0)).square().sum(1).mean().item()


def norms_of(micro_batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Norms of the micro-batches' mean gradients, and that of their mean."""
    means = torch.stack(micro_batches)
    return functional.grad_norms([[mean] for mean in means]), means.mean(0).norm()


@pytest.mark.parametrize(("m", "b"), [(1, 2), (1, 3), (2, 2), (2, 3)])
def test_variance_and_squared_norm_are_unbiased_over_independent_samples(m: int, b: int) -> None:
    g = sample_gradients()
    variances, squares = [], []
    for draw in itertools.product(range(N), repeat=m * b):
        norms, mean = norms_of([g[list(draw[j * m : (j + 1) * m])].mean(0) for j in range(b)])
        variances.append(monitors.gradient_variance(norms, mean, micro_batch=m))
        squares.append(mean**2 - variances[-1] / (m * b))
        scale = monitors.gradient_noise_scale(norms, mean, micro_batch=m).item()
        assert scale == (pytest.approx((variances[-1] / squares[-1]).item(), rel=1e-9) if squares[-1] > 0 else math.inf)
    assert torch.stack(variances).mean().item() == pytest.approx(covariance_trace(g), **EXACT)
    assert torch.stack(squares).mean().item() == pytest.approx(g.mean(0).square().sum().item(), **EXACT)


@pytest.mark.parametrize(("m", "b"), [(1, 3), (2, 2), (3, 3)])
def test_variance_is_unbiased_over_micro_batches_drawn_without_replacement(m: int, b: int) -> None:
    g = sample_gradients()
    subsets = [g[list(chosen)].mean(0) for chosen in itertools.combinations(range(N), m)]
    found = [
        monitors.gradient_variance(*norms_of(list(draw)), micro_batch=m, population=N) for draw in itertools.product(subsets, repeat=b)
    ]
    assert torch.stack(found).mean().item() == pytest.approx(covariance_trace(g), **EXACT)


def test_disjoint_pieces_overestimate_as_documented() -> None:
    g = sample_gradients()
    found = [
        monitors.gradient_variance(*norms_of([g[list(order[:2])].mean(0), g[list(order[2:])].mean(0)]), micro_batch=2)
        for order in itertools.permutations(range(N))
    ]
    assert torch.stack(found).mean().item() == pytest.approx(covariance_trace(g) * N / (N - 1), **EXACT)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_expected_norm_over_all_micro_batches(m: int) -> None:
    g = sample_gradients()
    subsets = [g[list(chosen)].mean(0) for chosen in itertools.combinations(range(N), m)]
    norms, _ = norms_of(subsets)
    mean, error = monitors.expected_grad_norm(norms)
    expected = [subset.square().sum().sqrt().item() for subset in subsets]
    assert mean.item() == pytest.approx(math.fsum(expected) / len(expected), **EXACT)
    squares = math.fsum((x - math.fsum(expected) / len(expected)) ** 2 for x in expected)
    assert error.item() == pytest.approx(math.sqrt(squares / (len(expected) - 1) / len(expected)), **EXACT)


def test_the_squared_standard_error_is_unbiased() -> None:
    x = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    draws = [torch.stack(draw) for draw in itertools.product(x, repeat=3)]
    mean_square = torch.stack([monitors.expected_grad_norm(draw)[1] ** 2 for draw in draws]).mean().item()
    assert mean_square == pytest.approx((torch.stack([draw.mean() for draw in draws]).var(correction=0)).item(), **EXACT)
    assert monitors.expected_grad_norm(x[:1])[1].isnan()


def test_results_stay_in_the_precision_given() -> None:
    norms = torch.tensor([3000.25, 3000.5])
    assert monitors.gradient_variance(norms, 3000.0).dtype is torch.float32
    expected = 2 * ((3000.25**2 + 3000.5**2) / 2 - 3000.0**2)  # float32 squares would be off by a unit
    assert monitors.gradient_variance(norms, 3000.0).item() == pytest.approx(expected, rel=2**-23)
    assert monitors.gradient_variance(norms.double(), norms[0]).dtype is torch.float64
    assert monitors.gradient_noise_scale(torch.ones(2), 0.1).item() == math.inf


@pytest.mark.parametrize("function", [monitors.gradient_variance, monitors.gradient_noise_scale])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0, 2.0], 1.0), TypeError, r"norms must be a torch\.Tensor"),
        ((torch.ones(2, dtype=torch.int64), 1.0), TypeError, "norms has dtype torch.int64"),
        ((torch.ones(1), 1.0), ValueError, "norms must have one dimension and at least 2 elements"),
        ((torch.ones(2, 2), 1.0), ValueError, "norms must have one dimension"),
        ((torch.ones(2), "1"), TypeError, "mean_grad_norm must be a number"),
        ((torch.ones(2), -1.0), ValueError, "mean_grad_norm must be a finite number in"),
        ((torch.ones(2), torch.ones(2)), ValueError, "mean_grad_norm must have one element"),
        ((torch.ones(2), 1.0, 0), ValueError, "micro_batch must be at least 1, got 0"),
        ((torch.ones(2), 1.0, 1.5), TypeError, "micro_batch must be an integer, got 1.5"),
    ],
)
def test_bad_norms(function: Any, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{function.__name__}: {message}"):
        function(*arguments[:2], **({"micro_batch": arguments[2]} if len(arguments) == 3 else {}))


def test_bad_populations_and_expectations() -> None:
    with pytest.raises(ValueError, match="gradient_variance: population must be at least 3, got 2"):
        monitors.gradient_variance(torch.ones(2), 1.0, micro_batch=2, population=2)
    with pytest.raises(ValueError, match="expected_grad_norm: norms must have one dimension and at least 1"):
        monitors.expected_grad_norm(torch.ones(0))


def closure_of(model: nn.Module, batch: Any, calls: list[int]) -> Any:
    def closure() -> Tensor:
        calls.append(1)
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    return closure


@every_backend
@pytest.mark.parametrize("options", [{}, {"lambd": 0.5}, {"adaptive": True, "eta": 0.01, "eps": 1e-3}], ids=str)
def test_sharpness_is_the_gap_that_the_formula_says(backend: str, options: dict[str, Any]) -> None:
    import sam_kernels

    model, batch = make_model(torch.float64), make_batch(torch.float64)
    start, first = weights(model), loss_of(model, batch).item()
    grads = gradients(model, batch)
    scaling = [w.abs() + 0.01 if "adaptive" in options else torch.ones_like(w) for w in start]
    norm = math.sqrt(sum(((t * g) ** 2).sum().item() for t, g in zip(scaling, grads, strict=True)))
    lambd = options.get("lambd", 1.0)
    scale = 0.1 * (1 - lambd + lambd / (norm + options.get("eps", 1e-12)))
    there = make_model(torch.float64)
    for param, w, t, g in zip(there.parameters(), start, scaling, grads, strict=True):
        param.data = w + scale * t * t * g
    calls: list[int] = []
    with sam_kernels.use_backend(backend):
        gap = monitors.sharpness(closure_of(model, batch, calls), model.parameters(), rho=0.1, **options)
    assert gap.shape == ()
    assert gap.item() == pytest.approx(loss_of(there, batch).item() - first, rel=1e-11)
    assert len(calls) == 2
    assert_same_bits(weights(model), start)
    for param, expected in zip(model.parameters(), gradients(there, batch), strict=True):
        torch.testing.assert_close(param.grad, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("raising_call", [1, 2])
def test_sharpness_leaves_the_weights_where_the_closure_raises(raising_call: int) -> None:
    model, calls = make_model(), []
    before = weights(model)
    inner = closure_of(model, make_batch(), calls)
    seen = []

    def closure() -> Tensor:
        seen.append(weights(model))
        loss = inner()
        if len(calls) == raising_call:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        monitors.sharpness(closure, model.parameters(), rho=0.5)
    assert_same_bits(weights(model), before)
    assert torch.equal(seen[-1][0], before[0]) is (raising_call == 1)


def test_sharpness_of_parameters_without_gradients_and_of_bad_input() -> None:
    param = nn.Parameter(torch.ones(2))
    assert monitors.sharpness(lambda: torch.ones(()), [param], rho=0.1).item() == 0.0
    for arguments, error, message in [
        ((3, [param]), TypeError, "closure must be a callable"),
        ((lambda: 1.0, [param]), TypeError, "closure must return the loss, a tensor of one element, got 1.0"),
        ((lambda: torch.ones(2), [param]), TypeError, "closure must return the loss"),
        ((lambda: torch.ones(()), param), TypeError, "params must be tensors in a list"),
        ((lambda: torch.ones(()), 3), TypeError, "params must be tensors in a list"),
        ((lambda: torch.ones(()), [3]), TypeError, r"params\[0\] must be a torch\.Tensor"),
    ]:
        with pytest.raises(error, match=f"sharpness: {message}"):
            monitors.sharpness(*arguments, rho=0.1)
    with pytest.raises(ValueError, match="sharpness: rho must be a finite number"):
        monitors.sharpness(lambda: torch.ones(()), [param], rho=-1.0)


def test_a_norm_that_is_no_number_is_no_noise_scale() -> None:
    norms = torch.tensor([1.0, math.nan, 2.0])
    assert monitors.gradient_noise_scale(norms, 1.0).isnan()
