"""Directions made of the gradient and a moving average of earlier ones: what the two papers say, step after step."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import functional
from tests.helpers.backends import widest
from tests.helpers.compare import assert_same_bits

KINDS: list[dict[str, Any]] = [{"kind": "vasso"}, {"kind": "friendly", "sigma": 0.9, "lmbda": 0.7}]
NAMES = ["vasso", "friendly"]


def grads_of_steps(steps: int) -> list[list[Tensor]]:
    return [[torch.randn(300), torch.randn(5, 7)] for _ in range(steps)]


@pytest.mark.parametrize("options", KINDS, ids=NAMES)
@pytest.mark.parametrize("grad_scale", [None, 1024.0])
def test_ascent_goes_rho_along_the_direction_whose_norm_was_returned(
    backend: str, options: dict[str, Any], grad_scale: float | None
) -> None:
    """Several steps with lambd = 1: |p - old_p| = rho only if norm, direction and average fit each other."""
    scale = None if grad_scale is None else torch.tensor(grad_scale)
    ema: list[Tensor | None] = [None, None]
    params = [torch.zeros(300), torch.zeros(5, 7)]
    for grads in grads_of_steps(4):
        first: list[Tensor | None] = list(ema)
        given = grads if scale is None else [g * scale for g in grads]
        norm = functional.direction_norm_(given, ema, grad_scale=scale, **options)
        used = [m if before is not None else None for before, m in zip(first, ema, strict=True)]
        olds = [torch.zeros_like(p) for p in params]
        functional.perturb_(params, given, olds, norm, rho=0.05, grad_scale=scale, ema=used, **options)
        moved = torch.cat([(p - old).flatten() for p, old in zip(params, olds, strict=True)])
        assert moved.norm().item() == pytest.approx(0.05, rel=1e-5)
        functional.restore_(params, olds)


@pytest.mark.parametrize("options", KINDS, ids=NAMES)
def test_the_average_is_that_of_the_paper(backend: str, options: dict[str, Any]) -> None:
    decay, gain = (0.7, 0.3) if options["kind"] == "friendly" else (0.1, 0.9)
    ema: list[Tensor | None] = [None, None]
    expected: list[Tensor] = []
    for grads in grads_of_steps(3):
        functional.direction_norm_(grads, ema, **options)
        expected = [decay * m + gain * g for m, g in zip(expected, grads, strict=True)] if expected else grads
    for m, e in zip(ema, expected, strict=True):
        torch.testing.assert_close(m, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", KINDS, ids=NAMES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_in_the_norm_and_not_in_the_average(backend: str, options: dict[str, Any], value: float) -> None:
    for first in (True, False):
        grad, before, found_inf = torch.randn(300), torch.randn(300), torch.tensor(0.0)
        grad[7] = value
        ema: list[Tensor | None] = [None if first else before.clone()]
        norm = functional.direction_norm_([grad], ema, found_inf=found_inf, **options)
        assert not norm.isfinite()
        assert found_inf.item() == 1.0
        average = ema[0]
        assert average is not None
        assert average.isfinite().all()
        assert average[7] == (0.0 if first else before[7])


def test_a_gradient_that_is_not_finite_stays_out_of_a_vasso_ascent(backend: str) -> None:
    param, old, m = torch.zeros(300), torch.zeros(300), torch.randn(300)
    functional.perturb_([param], [torch.full((300,), math.nan)], [old], torch.tensor(1.0), rho=0.5, lambd=0.0, ema=[m], kind="vasso")
    torch.testing.assert_close(param, 0.5 * m)


def test_the_buffers_are_the_callers(backend: str) -> None:
    """Also in another memory order; nothing to do gives 0."""
    grads = [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(9)]
    ema: list[Tensor | None] = [torch.randn(2, 3, 4, 5), torch.randn(9).to(torch.bfloat16)]
    before = [m.clone() for m in ema if m is not None]
    pointers = [m.data_ptr() for m in ema if m is not None]
    norm = functional.direction_norm_(grads, ema, kind="vasso", theta=0.5)
    assert [m.data_ptr() for m in ema if m is not None] == pointers
    assert norm.dtype is torch.float32
    expected = [0.5 * m.float() + 0.5 * g for m, g in zip(before, grads, strict=True)]
    torch.testing.assert_close(ema[0], expected[0])
    torch.testing.assert_close(norm, torch.linalg.vector_norm(torch.cat([e.reshape(-1) for e in expected])))
    assert functional.direction_norm_([], [], kind="friendly").item() == 0.0
    wide = widest(backend)
    assert functional.direction_norm_([torch.randn(4, dtype=wide)], [None], kind="friendly").dtype is wide


def test_lmbda_one_never_updates(backend: str) -> None:
    grad, m = torch.randn(100), torch.randn(100)
    ema: list[Tensor | None] = [m.clone()]
    norm = functional.direction_norm_([grad], ema, kind="friendly", sigma=0.5, lmbda=1.0)
    assert_same_bits("ema", ema, [m])
    assert norm.item() == pytest.approx((grad - 0.5 * m).norm().item(), rel=1e-6)
