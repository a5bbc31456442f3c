"""The average of gradients that ``adamw_step_`` keeps, for every beta1 in [0, 1) and old averages of any length."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from sam_kernels import functional
from tests.helpers.backends import require_dtype
from tests.helpers.compare import assert_same_bits

BELOW, ABOVE = math.nextafter(0.5, 0.0), math.nextafter(0.5, 1.0)
NEARLY_HALF = [BELOW, 0.5, ABOVE, 0.5 - 2**-26, 0.5 + 2**-26]
UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}  # the unit roundoff of the arithmetic


def averaged(exp_avg: Tensor, grad: Tensor, beta1: float) -> Tensor:
    """The new average of a step."""
    new = exp_avg.clone()
    functional.adamw_step_(
        [torch.zeros_like(exp_avg)], [grad], [new], [torch.ones_like(exp_avg)], [torch.tensor(3.0)], lr=0.1, betas=(beta1, 0.9)
    )
    return new


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_without_memory_the_average_is_the_gradient(backend: str, dtype: torch.dtype) -> None:
    require_dtype(backend, dtype)
    grad = (0.001 * torch.randn(1000, dtype=torch.float64)).to(dtype)
    exp_avg = (1000 * torch.randn(1000, dtype=torch.float64)).to(dtype)
    assert_same_bits("exp_avgs", [averaged(exp_avg, grad, 0.0)], [grad])


@pytest.mark.parametrize("longer", [1.0, 1e3, 1e8])
@pytest.mark.parametrize("beta1", [1e-5, 0.02, 0.1, 0.3, *NEARLY_HALF, 0.7, 0.9])
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_an_average_errs_by_its_own_terms_alone(backend: str, dtype: torch.dtype, beta1: float, longer: float) -> None:
    """beta1 m + (1 - beta1) g errs by at most 4 u (beta1 |m| + (1 - beta1) |g|), with u the unit roundoff, to first order.

    As a sum of two products: a factor, a product and the sum are rounded, by u each: 3 u. As m + (1 - beta1) (g - m), for beta1 ≥ 1/2: the
    factor, the difference and the product err by 3 u (1 - beta1) (|m| + |g|), the sum by one more u; and 1 - beta1 ≤ beta1.
    """
    require_dtype(backend, dtype)
    grad, exp_avg = torch.randn(300, dtype=dtype), longer * torch.randn(300, dtype=dtype)
    old_weight, weight = Fraction(beta1), 1 - Fraction(beta1)
    for new, m, g in zip(*(map(Fraction, t.tolist()) for t in (averaged(exp_avg, grad, beta1), exp_avg, grad)), strict=True):
        size = old_weight * abs(m) + weight * abs(g)
        units = abs(new - (old_weight * m + weight * g)) / size / Fraction(UNIT[dtype])
        assert units <= 4 + 1e-5, f"{float(units)} u for an average of {float(m)} and a gradient of {float(g)}"


@pytest.mark.parametrize("beta1", [0.0, 0.3, *NEARLY_HALF, 0.9])
def test_an_infinite_gradient_makes_an_infinite_average(backend: str, beta1: float) -> None:
    grad = torch.tensor([math.inf, -math.inf, 1.0]).repeat(20)  # torch's kernels for vectors and for the rest
    new = averaged(torch.ones(60), grad, beta1)
    assert new[grad.isinf()].equal(grad[grad.isinf()])
    assert new[grad == 1.0].isfinite().all()


@pytest.mark.parametrize("beta1", [0.5, ABOVE, 0.5 + 2**-26, 0.7, 0.9, 0.999])
def test_from_one_half_on_a_kernel_rounds_a_weighted_difference(backend: str, beta1: float) -> None:
    """The form of :func:`torch.lerp`: three operations, rounded one after the other. The average of equal numbers is that number."""
    if backend == "foreach":
        pytest.skip("torch.lerp itself, which may fuse the last two")
    exp_avg, grad = torch.randn(1000), torch.randn(1000)
    grad[::5] = exp_avg[::5]
    weight = torch.tensor(1.0 - beta1)
    new = averaged(exp_avg, grad, beta1)
    assert_same_bits("exp_avgs", [new], [exp_avg + weight * (grad - exp_avg)])
    assert_same_bits("exp_avgs", [new[::5]], [exp_avg[::5]])
