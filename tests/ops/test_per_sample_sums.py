"""Gradients of scales and shifts, and squared gradient norms of embeddings, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from sam_kernels.functional.per_sample import affine_grads_, embedding_square_norms_
from sam_kernels.reference import per_sample as reference
from tests.helpers.per_sample import AFFINE, DTYPES, EMBEDDINGS, SHARP, arithmetic, guarded, require


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_affine_against_the_reference(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    require(backend, *dtypes)
    wide = arithmetic(*dtypes)
    for shape in AFFINE:
        values, grads = torch.randn(shape).to(dtypes[0]), torch.randn(shape).to(dtypes[1])
        out = (shape[0], shape[2])
        for with_weight, with_bias in ((True, True), (True, False), (False, True)):
            only_bias = wide if with_weight else arithmetic(dtypes[1])
            weight, check_weight = guarded(out, wide)
            bias, check_bias = guarded(out, only_bias)
            affine_grads_(weight if with_weight else None, bias if with_bias else None, values if with_weight else None, grads)
            check_weight()
            check_bias()
            for given, result, terms in (
                (with_weight, weight, values.double() * grads.double()),
                (with_bias, bias, grads.double()),
            ):
                if given:
                    error, size = (result - terms.sum((1, 3))).abs(), terms.abs().sum((1, 3))
                    # sums in float64, rounded once; a backend that sums in float32 stays within 1e-6
                    relative = 1e-13 if result.dtype is torch.float64 else 2.0**-24 * 1.01 if backend == "native" else 1e-6
                    assert (error <= relative * size).all(), (shape, error / size)
                else:
                    assert result.isnan().all()


def test_affine_of_a_hundred_thousand_terms(backend: str) -> None:
    """All of one sign and size, where a single float32 sum would lose five digits."""
    require(backend, torch.float32)
    for shape in ((1, 100_000, 3, 1), (1, 1, 2, 100_000), (1, 50, 2, 2000)):
        values, grads = torch.full(shape, 1.1), torch.full(shape, 0.7)
        weight, bias = torch.empty(1, shape[2]), torch.empty(1, shape[2])
        affine_grads_(weight, bias, values, grads)
        expected = (values.double() * grads.double()).sum((1, 3)), grads.double().sum((1, 3))
        for result, exact in zip((weight, bias), expected, strict=True):
            # Triton's programs add in float32: blocks first, then, here, 100 of them
            assert ((result - exact) / exact).abs().max() <= (1e-5 if backend == "triton" else 1e-6), shape


def test_affine_one_group_that_is_not_finite_stays_alone(backend: str) -> None:
    require(backend, torch.float32)
    for shape in ((3, 7, 40, 1), (3, 2, 5, 33)):
        values, grads = torch.randn(shape), torch.randn(shape)
        grads[1, 1, 2, -1] = torch.nan
        weight, bias = torch.empty(3, shape[2]), torch.empty(3, shape[2])
        affine_grads_(weight, bias, values, grads)
        for result in (weight, bias):
            assert result.isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padding_idx", [None, 0, 7])
def test_embedding_against_the_reference(backend: str, dtype: torch.dtype, padding_idx: int | None) -> None:
    require(backend, dtype)
    for m, tokens, dim, vocabulary in EMBEDDINGS:
        if backend == "triton" and tokens * dim > 20_000:
            continue  # a second each in the interpreter; tests/interpreted has sizes of its own
        indices, grads = torch.randint(0, vocabulary, (m, tokens)), torch.randn(m, tokens, dim).to(dtype)
        for ids in (indices, indices.int()):
            norms, check = guarded((m,), torch.float64, 0.5)
            embedding_square_norms_(norms, ids, grads, padding_idx=padding_idx)
            check()
            expected = torch.full((m,), 0.5, dtype=torch.float64)
            reference.embedding_square_norms_(expected, indices, grads.double(), padding_idx=padding_idx)
            torch.testing.assert_close(norms, expected, rtol=1e-12 if backend == "native" else SHARP[arithmetic(dtype)], atol=0)


def test_embedding_indices_far_apart(backend: str) -> None:
    """Nothing is allocated by the size of an index."""
    require(backend, torch.float32)
    indices = torch.tensor([[2**62, 3, 2**62, -5]])
    grads = torch.randn(1, 4, 9)
    norms = torch.zeros(1, dtype=torch.float64)
    embedding_square_norms_(norms, indices, grads)
    rows = grads[0].double()
    expected = (rows[0] + rows[2]).square().sum() + rows[1].square().sum() + rows[3].square().sum()
    torch.testing.assert_close(norms[0], expected, rtol=5e-6, atol=0)
