"""``grad_norm_`` and ``check_finite_``: the norm into a tensor that is given, and what is left in flags."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import _dispatch, functional, use_backend
from sam_kernels.validation.backends import backend_of
from tests.helpers.backends import require_dtype, widest
from tests.helpers.compare import assert_same_bits

NOT_FINITE = [math.inf, -math.inf, math.nan]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NORMS: list[dict[str, Any]] = [{}, {"adaptive": True, "eta": 0.01}]


@pytest.fixture
def _several_row_groups(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The choice is automatic, and float64 rows are another backend's."""
    others = {"native": "foreach", "triton": "foreach", "foreach": "native"}
    if _dispatch.reason_missing(others[backend]) is not None:
        pytest.skip(f"backend {others[backend]} is missing")
    monkeypatch.setattr(backend_of(backend), "dtypes", frozenset(DTYPES) - {torch.float64})
    monkeypatch.setattr(backend_of(backend), "is_automatic", True)
    monkeypatch.setattr(_dispatch, "BACKENDS", (backend, others[backend]))
    with use_backend(None):
        yield


def gradients(*dtypes: torch.dtype) -> list[Tensor]:
    """A chunk and more, one element, none, another memory order."""
    shapes = [(700, 3), (1,), (0,), (5, 7)]
    grads = [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, (dtypes * 4)[:4], strict=True)]
    return [*grads[:3], grads[3].t()]


def assert_same_norm(grads: list[Tensor], options: dict[str, Any]) -> None:
    params = [torch.randn(grad.shape).to(grad.dtype) for grad in grads]
    expected = functional.grad_norm(grads, params, **options)
    for norm in (torch.full((), math.nan, dtype=expected.dtype), torch.full((1,), math.nan, dtype=expected.dtype)):
        pointer = norm.data_ptr()
        functional.grad_norm_(norm, grads, params, **options)
        assert norm.data_ptr() == pointer
        assert_same_bits("norm", [norm], [expected])


@pytest.mark.parametrize("options", NORMS, ids=["plain", "adaptive"])
def test_the_norm_is_that_of_grad_norm(backend: str, options: dict[str, Any]) -> None:
    wide = widest(backend)
    for dtypes in ((torch.float32,), (torch.bfloat16, torch.float16), (torch.float16, wide, torch.float32, wide), (wide,)):
        assert_same_norm(gradients(*dtypes), options)
    assert_same_norm([], options)


@pytest.mark.usefixtures("_several_row_groups")
@pytest.mark.parametrize("options", NORMS, ids=["plain", "adaptive"])
def test_the_norm_of_several_row_groups(options: dict[str, Any]) -> None:
    grads = gradients(torch.float64, torch.bfloat16)
    assert_same_norm(grads, options)
    norm = torch.zeros((), dtype=torch.float64)
    functional.grad_norm_(norm, grads)
    assert norm.item() == pytest.approx(torch.cat([grad.double().reshape(-1) for grad in grads]).norm().item(), rel=1e-6)


def assert_steps_are_counted(bad: Tensor, good: list[Tensor]) -> None:
    """``bad`` is one of the gradients ``good`` whose first element is made what it must not be."""
    dtype = torch.float64 if any(grad.dtype is torch.float64 for grad in good) else torch.float32
    norm, found_inf, skipped = torch.zeros((), dtype=dtype), torch.tensor(0.0), torch.tensor(3.0)
    first = bad.reshape(-1)[0].item()
    # What the step before has left in found_inf is counted by the next one, which starts anew.
    for value, flag, count in ((first, 0.0, 3), (math.nan, 1.0, 3), (math.inf, 1.0, 4), (first, 0.0, 5), (first, 0.0, 5)):
        bad.view(-1)[0] = value
        functional.grad_norm_(norm, good, found_inf=found_inf, skipped=skipped)
        assert math.isfinite(norm.item()) == math.isfinite(value)
        assert (found_inf.item(), skipped.item()) == (flag, count)
    bad.view(-1)[0] = math.nan
    for grads in (good, []):  # without skipped, found_inf is never cleared
        functional.grad_norm_(norm, grads, found_inf=found_inf)
        assert found_inf.item() == 1.0
    functional.grad_norm_(norm, [], found_inf=found_inf, skipped=skipped)
    assert (norm.item(), found_inf.item(), skipped.item()) == (0.0, 0.0, 6.0)


def test_skipped_counts_the_steps_before(backend: str) -> None:
    grads = gradients(torch.float32, torch.bfloat16)
    for bad in (grads[0], grads[1]):
        bad.fill_(1.0)
        assert_steps_are_counted(bad, grads)
        bad.fill_(1.0)


@pytest.mark.usefixtures("_several_row_groups")
def test_skipped_counts_a_step_once_whatever_the_row_groups() -> None:
    grads = gradients(torch.float64, torch.float32)
    for bad in (grads[0], grads[1]):
        assert_steps_are_counted(bad, grads)
        bad.fill_(1.0)


def test_flags_may_have_one_dimension_or_more_bits(backend: str) -> None:
    """As a scaler's found_inf, or a count kept in float64."""
    found_inf, skipped = torch.tensor([1.0]), torch.tensor(2.0, dtype=torch.float64)
    functional.grad_norm_(torch.zeros(1), [torch.tensor([3.0, 4.0])], found_inf=found_inf, skipped=skipped)
    assert (found_inf.tolist(), skipped.item()) == ([0.0], 3.0)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"skipped": torch.tensor(0.0)}, ValueError, "grad_norm_: skipped needs found_inf"),
        ({"norm": torch.zeros(2)}, ValueError, "grad_norm_: norm must hold one floating-point number, got"),
        ({"norm": torch.zeros((), dtype=torch.int64)}, ValueError, "grad_norm_: norm must hold one floating-point number"),
        ({"norm": 0.0}, TypeError, "grad_norm_: norm must be a 0-dim tensor, got 0.0"),
        ({"found_inf": torch.zeros(2)}, ValueError, "grad_norm_: found_inf must hold one"),
        ({"found_inf": torch.zeros(()), "skipped": torch.zeros(0)}, ValueError, "grad_norm_: skipped must hold one"),
        ({"adaptive": True}, ValueError, "grad_norm_: adaptive=True needs params"),
        ({"eta": -1.0}, ValueError, "grad_norm_: eta must be"),
        ({"grads": torch.ones(3)}, TypeError, "grad_norm_: grads must be a list or tuple of tensors"),
        ({"grads": [torch.ones(3).int()]}, TypeError, r"grad_norm_: grads\[0\] has dtype torch.int32"),
    ],
    ids=str,
)
def test_what_grad_norm_refuses(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"norm": torch.tensor(7.0), "grads": [torch.ones(3)], **changes}
    with pytest.raises(error, match=words):
        functional.grad_norm_(**given)
    assert changes.get("norm") is not None or given["norm"].item() == 7.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_check_finite_finds_one_element_and_never_clears(backend: str, dtype: torch.dtype) -> None:
    require_dtype(backend, dtype)
    grads = gradients(dtype)
    for flag in (0.0, 1.0):
        found_inf = torch.tensor(flag)
        functional.check_finite_(grads, found_inf)
        assert found_inf.item() == flag
    for value in NOT_FINITE:
        for row, where in ((0, (0, 0)), (0, (-1, -1)), (1, (0,)), (3, (3, 2))):
            bad = [grad.clone() for grad in grads]
            bad[row][where] = value
            found_inf = torch.zeros(1)
            pointer = found_inf.data_ptr()
            functional.check_finite_(bad, found_inf)
            assert (found_inf.item(), found_inf.data_ptr()) == (1.0, pointer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_check_finite_takes_the_largest_numbers_for_finite(backend: str, dtype: torch.dtype) -> None:
    """Their norm is not."""
    require_dtype(backend, dtype)
    grads = [torch.full((700,), torch.finfo(dtype).max, dtype=dtype), torch.full((3,), -torch.finfo(dtype).max, dtype=dtype)]
    found_inf = torch.tensor(0.0)
    functional.check_finite_(grads, found_inf)
    assert found_inf.item() == 0.0
    grads[1][2] = math.nan
    functional.check_finite_(grads, found_inf)
    assert found_inf.item() == 1.0


@pytest.mark.parametrize("value", [1.0, *NOT_FINITE])
def test_check_finite_beside_a_sum_that_overflows(backend: str, value: float) -> None:
    require_dtype(backend, torch.float64)
    found_inf = torch.tensor(0.0)
    functional.check_finite_([torch.full((700,), 1e200, dtype=torch.float64), torch.ones(5), torch.full((1,), value)], found_inf)
    assert found_inf.item() == float(not math.isfinite(value))


@pytest.mark.usefixtures("_several_row_groups")
@pytest.mark.parametrize("row", [0, 1, None])
def test_check_finite_of_several_row_groups(row: int | None) -> None:
    grads = gradients(torch.float64, torch.bfloat16)
    if row is not None:
        grads[row].view(-1)[0] = math.inf
    found_inf = torch.tensor(0.0)
    functional.check_finite_(grads, found_inf)
    assert found_inf.item() == float(row is not None)


def test_check_finite_of_nothing(backend: str) -> None:
    for grads in ([], [torch.empty(0)], [torch.empty(0), torch.ones(2), torch.empty(3, 0)]):
        for flag in (0.0, 1.0):
            found_inf = torch.tensor(flag)
            functional.check_finite_(grads, found_inf)
            assert found_inf.item() == flag


@pytest.mark.parametrize(
    ("grads", "found_inf", "error", "words"),
    [
        ([torch.ones(3)], torch.zeros(2), ValueError, "check_finite_: found_inf must hold one floating-point number"),
        ([torch.ones(3)], False, TypeError, "check_finite_: found_inf must be a 0-dim tensor, got False"),
        (torch.ones(3), torch.zeros(()), TypeError, "check_finite_: grads must be a list or tuple of tensors"),
        ([torch.ones(3).int()], torch.zeros(()), TypeError, r"check_finite_: grads\[0\] has dtype torch.int32"),
    ],
    ids=str,
)
def test_what_check_finite_refuses(grads: Any, found_inf: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        functional.check_finite_(grads, found_inf)
