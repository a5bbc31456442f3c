"""Squared gradient norms of linear layers against the float64 reference, on every backend that has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sam_kernels.functional.per_sample import linear_method, linear_square_norms_
from sam_kernels.reference import per_sample as reference
from tests.helpers.per_sample import DTYPES, LINEAR, SHARP, arithmetic, guarded, linear_bound, require, unit

METHODS = ["gram", "direct", "products"]
BEFORE = 0.25  # what square_norms holds already


def operands(shape: tuple[int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> tuple[Tensor, Tensor]:
    m, tokens, in_features, out_features = shape
    return torch.randn(m, tokens, in_features).to(dtypes[0]), torch.randn(m, tokens, out_features).to(dtypes[1])


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "_".join(str(each).removeprefix("torch.") for each in pair))
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [False, True])
def test_against_the_reference(backend: str, method: str, dtypes: tuple[torch.dtype, torch.dtype], bias: bool) -> None:
    require(backend, *dtypes)
    wide = arithmetic(*dtypes)
    for shape in LINEAR:
        inputs, grads = operands(shape, dtypes)
        m, tokens, in_features, out_features = shape
        norms, check_norms = guarded((m,), torch.float64, BEFORE)
        form = "direct" if method == "products" else method
        expected = reference.linear_sample_grads(inputs.double(), grads.double())
        if method == "products":
            products, check_products = guarded((m, out_features, in_features), wide)
            linear_square_norms_(norms, inputs, grads, products, method="direct", bias=bias)
            check_products()
            size = grads.double().abs().mT @ inputs.double().abs()
            assert ((products - expected).abs() <= size * (tokens + 1) * (unit(wide) + 1e-16)).all(), shape
            kept = products.double().square().flatten(1).sum(1) + BEFORE
            kept += grads.double().sum(1).square().sum(1) * bias
            torch.testing.assert_close(
                norms, kept, rtol=1e-12 if wide is torch.float64 or (backend == "native" and not bias) else 1e-5, atol=0
            )
        else:
            linear_square_norms_(norms, inputs, grads, method=method, bias=bias)
        check_norms()
        if bias:  # as of inputs with a 1 behind the last feature
            inputs = torch.cat([inputs, torch.ones_like(inputs[:, :, :1])], 2)
            expected = reference.linear_sample_grads(inputs.double(), grads.double())
        squares = expected.square().flatten(1).sum(1)
        error = (norms - BEFORE - squares).abs()
        slack = (BEFORE + squares) * 1e-15
        assert (error <= linear_bound(backend, form, inputs, grads) + slack).all(), (shape, error)
        assert (error <= SHARP[wide] * squares.clamp(min=BEFORE)).all() or tokens * in_features * out_features < 64, (shape, error)


def test_auto_takes_what_linear_method_says(backend: str) -> None:
    require(backend, torch.float32)
    for shape in ((2, 5, 256, 256), (1, 300, 20, 20)):
        inputs, grads = operands(shape, (torch.float32, torch.float32))
        method = linear_method(*shape[1:])
        assert method == ("gram" if shape[1] == 5 else "direct")
        norms = [torch.zeros(shape[0], dtype=torch.float64) for _ in range(2)]
        linear_square_norms_(norms[0], inputs, grads)
        linear_square_norms_(norms[1], inputs, grads, method=method)
        assert torch.equal(*norms)


@pytest.mark.parametrize("method", ["gram", "direct"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_group_that_is_not_finite_stays_alone(backend: str, method: str, value: float) -> None:
    require(backend, torch.float32)
    for tokens in (1, 6, 33, 300):
        inputs, grads = operands((4, tokens, 21, 19), (torch.float32, torch.float32))
        clean = torch.zeros(4, dtype=torch.float64)
        linear_square_norms_(clean, inputs, grads, method=method)
        inputs[2, tokens // 2, 20] = value
        norms = torch.zeros(4, dtype=torch.float64)
        linear_square_norms_(norms, inputs, grads, method=method)
        assert torch.isfinite(norms).tolist() == [True, True, False, True]
        others = [0, 1, 3]
        if backend == "native":
            assert torch.equal(norms[others], clean[others])


def test_layouts_and_offsets(backend: str) -> None:
    """What is not contiguous is copied, and nothing needs more than the dtype's own alignment."""
    require(backend, torch.float32)
    inputs, grads = operands((3, 40, 30, 20), (torch.float32, torch.float32))
    expected = torch.zeros(3, dtype=torch.float64)
    linear_square_norms_(expected, inputs, grads)
    shifted = torch.empty(inputs.numel() + 1)[1:].view_as(inputs).copy_(inputs)
    for a, g in ((inputs.mT.contiguous().mT, grads), (inputs, grads.transpose(0, 1).contiguous().transpose(0, 1)), (shifted, grads)):
        norms = torch.zeros(3, dtype=torch.float64)
        linear_square_norms_(norms, a, g)
        assert torch.equal(norms, expected)


def test_large_numbers(backend: str) -> None:
    """Products of float32 that overflow make the norm infinite or NaN, never a wrong number. The direct form's squares are not among them
    on the CPU's kernels: these are in float64."""
    require(backend, torch.float32)
    for tokens in (1, 5, 40):
        inputs, grads = operands((2, tokens, 20, 30), (torch.float32, torch.float32))
        inputs[1] *= 1e25
        for method in ("gram", "direct"):
            norms = torch.zeros(2, dtype=torch.float64)
            linear_square_norms_(norms, inputs, grads, method=method)
            expected = torch.zeros(2, dtype=torch.float64)
            reference.linear_square_norms_(expected, inputs.double(), grads.double())
            torch.testing.assert_close(norms[0], expected[0], rtol=5e-6, atol=0)
            if torch.isfinite(norms[1]) or (backend == "native" and method == "direct"):
                torch.testing.assert_close(norms[1], expected[1], rtol=5e-6, atol=0)


def test_small_numbers(backend: str) -> None:
    """A square below what float32 holds is still a number where squares are in float64."""
    require(backend, torch.float32)
    inputs, grads = (1e-14 * torch.ones(1, tokens, n) for tokens, n in ((3, 8), (3, 5)))
    norms = torch.zeros(1, dtype=torch.float64)
    linear_square_norms_(norms, inputs, grads, method="direct")
    expected = 8 * 5 * (3 * 1e-28) ** 2
    assert norms.item() == 0.0 if backend != "native" and norms.item() == 0.0 else abs(norms.item() / expected - 1) < 1e-6
