"""Squared gradient norms of convolutions against the float64 reference, on every backend that has them."""

from __future__ import annotations

import pytest
import torch

from sam_kernels.functional.per_sample import conv_square_norms_
from sam_kernels.reference import per_sample as reference
from tests.helpers.per_sample import CONVOLUTIONS, DTYPES, SHARP, arithmetic, guarded, linear_bound, require, unit

NAMES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


@pytest.mark.parametrize("dtypes", DTYPES[:5], ids=lambda pair: "_".join(NAMES[each] for each in pair))
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_against_the_reference(backend: str, name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    require(backend, *dtypes)
    case, wide = CONVOLUTIONS[name], arithmetic(*dtypes)
    inputs, grads = case.tensors(*dtypes)
    m = case.groups_of_samples
    expected = reference.conv_sample_grads(inputs.double(), grads.double(), m, groups=case.groups, **case.options())
    squares = expected.square().flatten(1).sum(1)
    rows, row_grads = case.rows(inputs, grads)
    for method in ("gram", "direct", "products"):
        form = "gram" if method == "gram" else "direct"
        norms, check_norms = guarded((m,), torch.float64, 0.5)
        products, check_products = guarded(tuple(expected.shape), wide)
        kept = products if method == "products" else None
        conv_square_norms_(norms, inputs, grads, kept, groups=case.groups, method=form, **case.options())
        check_norms()
        check_products()
        error = (norms - 0.5 - squares).abs()
        bound = linear_bound(backend, form, rows, row_grads).view(m, -1).sum(1)
        assert (error <= bound + (0.5 + squares) * 1e-15).all(), (method, error, bound)
        assert (error <= SHARP[wide] * squares.clamp(min=0.5)).all(), (method, error)
        if kept is not None:
            size = (row_grads.double().abs().mT @ rows.double().abs()).view_as(expected)
            assert ((products - expected).abs() <= size * (rows.shape[1] + 1) * (unit(wide) + 1e-16)).all()
        else:
            assert products.isnan().all()


def test_a_sample_that_is_not_finite_stays_alone(backend: str) -> None:
    require(backend, torch.float32)
    case = CONVOLUTIONS["micro_batches"]
    inputs, grads = case.tensors(torch.float32, torch.float32)
    inputs[3, 1, 2, 2] = torch.nan  # in the second of three groups
    for method in ("gram", "direct"):
        norms = torch.zeros(3, dtype=torch.float64)
        conv_square_norms_(norms, inputs, grads, groups=case.groups, method=method, **case.options())
        assert torch.isfinite(norms).tolist() == [True, False, True]


def test_channels_last_is_copied(backend: str) -> None:
    require(backend, torch.float32)
    case = CONVOLUTIONS["strided"]
    inputs, grads = case.tensors(torch.float32, torch.float32)
    norms = [torch.zeros(2, dtype=torch.float64) for _ in range(2)]
    conv_square_norms_(norms[0], inputs, grads, **case.options())
    conv_square_norms_(norms[1], inputs.to(memory_format=torch.channels_last), grads, **case.options())
    assert torch.equal(*norms)
