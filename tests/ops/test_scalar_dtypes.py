"""Scalar tensors of other dtypes than float32: the value counts, whatever the dtype, and what is written goes where the caller looks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import functional
from tests.helpers.calls import CALLS, Arguments
from tests.helpers.compare import assert_same_bits

DTYPES = [torch.float16, torch.bfloat16, torch.float64]
# Powers of two, different ones: each dtype holds them, and a scalar that took another's place shows.
READ = {
    "perturb_": {"norm": 2.0, "grad_scale": 4.0, "found_inf": 0.0},
    "perturb_ ema": {"norm": 2.0, "grad_scale": 4.0, "found_inf": 0.0},
    "direction_norm_": {"grad_scale": 4.0, "found_inf": 0.0},
    "sgd_step_": {"norm": 8.0, "grad_scale": 4.0, "found_inf": 0.0, "max_norm": 0.5},
    "adamw_step_": {"norm": 8.0, "grad_scale": 4.0, "found_inf": 0.0, "max_norm": 0.5},
    "combine_": {"found_inf": 0.0},
    "centralize_": {"found_inf": 0.0},
    "grad_norm": {"found_inf": 0.0},
    "grad_dots": {"found_inf": 0.0},
}
WRITES_FLAG = ("grad_norm", "centralize_", "direction_norm_", "grad_dots", "combine_")


def arguments_of(op: str, dtype: torch.dtype, **changes: float) -> Arguments:
    scalars = {**READ[op], **changes}
    tensors = {name: torch.tensor(value, dtype=dtype) if name != "max_norm" else value for name, value in scalars.items()}
    return {**CALLS[op](), **tensors}


def outcome(op: str, arguments: Arguments) -> list[Tensor]:
    """All that the operation returns and writes."""
    result = getattr(functional, op.split()[0])(**arguments)
    lists = [value for value in arguments.values() if isinstance(value, list)]
    return [*([] if result is None else [result]), *[tensor for tensors in lists for tensor in tensors]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", READ)
def test_a_scalar_counts_for_its_value(backend: str, op: str, dtype: torch.dtype) -> None:
    for found_inf in (0.0, 1.0):
        expected = outcome(op, arguments_of(op, torch.float32, found_inf=found_inf))
        assert_same_bits(f"{op}, found_inf {found_inf}", outcome(op, arguments_of(op, dtype, found_inf=found_inf)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
def test_flags_are_written_in_their_own_dtype(backend: str, dtype: torch.dtype) -> None:
    for op in (*WRITES_FLAG, "check_finite_"):
        for value, flag in ((1.0, 0.0), (math.nan, 1.0), (math.inf, 1.0)):
            around = torch.full((4,), 7.0, dtype=dtype)  # a write that is too wide reaches the neighbours
            around[1] = 0.0
            arguments = {"grads": [torch.ones(3)]} if op == "check_finite_" else CALLS[op]()
            first = next(iter(arguments.values())) if op != "combine_" else arguments["lefts"]
            first[0].view(-1)[0] = value
            getattr(functional, op)(**arguments, found_inf=around[1])
            assert around.tolist() == [7.0, flag, 7.0, 7.0], f"{op}, {value}"


@pytest.mark.parametrize("dtype", [torch.float32, *DTYPES], ids=str)
def test_a_norm_is_rounded_to_the_dtype_it_is_written_in(backend: str, dtype: torch.dtype) -> None:
    grads = [torch.randn(5, 3), torch.randn(7).to(torch.bfloat16)]
    expected = functional.grad_norm(grads)
    around = torch.full((4,), 7.0, dtype=dtype)
    functional.grad_norm_(around[1], grads)
    assert_same_bits("norm and its neighbours", [around], [torch.tensor([7.0, expected.item(), 7.0, 7.0]).to(dtype)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_counters_of_few_digits_are_refused(backend: str, dtype: torch.dtype) -> None:
    """bfloat16 counts to 256. The kernels had words of their own, after the first counters were advanced."""
    flag, count = torch.zeros(()), torch.zeros((), dtype=dtype)
    with pytest.raises(TypeError, match=rf"grad_norm_: skipped has dtype {dtype}.*supported are float32, float64"):
        functional.grad_norm_(torch.zeros(()), [torch.ones(3)], found_inf=flag, skipped=count)
    arguments: dict[str, Any] = CALLS["adamw_step_"]()
    arguments["state_steps"][1] = torch.tensor(2.0, dtype=dtype)
    with pytest.raises(TypeError, match=rf"adamw_step_: state_steps\[1\] has dtype {dtype}"):
        functional.adamw_step_(**arguments)
    assert arguments["state_steps"][0].item() == 2.0


def test_counters_may_be_float64(backend: str) -> None:
    flag, count = torch.ones(()), torch.tensor(3.0, dtype=torch.float64)
    functional.grad_norm_(torch.zeros(()), [torch.ones(3)], found_inf=flag, skipped=count)
    assert (flag.item(), count.item()) == (0.0, 4.0)
    arguments = CALLS["adamw_step_"]()
    arguments["state_steps"] = [step.double() for step in arguments["state_steps"]]
    functional.adamw_step_(**arguments)
    assert [step.item() for step in arguments["state_steps"]] == [3.0] * 3


# A weight that is not finite, with a gradient of 0: T_w g = |w| 0 is NaN. The adaptive operations report it; nothing else becomes NaN.
NORMS: dict[str, Callable[[list[Tensor], list[Tensor], Tensor], Tensor]] = {
    "grad_norm": lambda grads, params, flag: functional.grad_norm(grads, params, adaptive=True, eta=0.01, found_inf=flag),
    "centralize_": lambda grads, params, flag: functional.centralize_(grads, params, adaptive=True, eta=0.01, found_inf=flag),
    "direction_norm_": lambda grads, params, flag: functional.direction_norm_(
        grads, [torch.zeros_like(grad) for grad in grads], params, kind="vasso", adaptive=True, eta=0.01, found_inf=flag
    ),
}


def with_a_weight(value: float) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and gradients; the one weight that is ``value`` has a gradient of 0."""
    params, grads = [torch.linspace(-1, 1, 40), torch.ones(5)], [torch.linspace(1, 2, 40), torch.ones(5)]
    params[0][7], grads[0][7] = value, 0.0
    return params, grads


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_an_adaptive_norm_reports_a_weight_that_is_not_finite(backend: str, value: float) -> None:
    for op, norm_of in NORMS.items():
        params, grads = with_a_weight(value)
        flag = torch.zeros(())
        norm = norm_of(grads, params, flag)
        assert not math.isfinite(norm.item()), op
        assert flag.item() == 1.0, op
        for signals in ({"norm": norm}, {"norm": torch.tensor(1.0), "found_inf": flag}):  # each of the two skips the step
            before, old_params = [param.clone() for param in params], [torch.zeros_like(param) for param in params]
            functional.perturb_(params, grads, old_params, **signals, rho=0.5, adaptive=True, eta=0.01)
            assert_same_bits(f"{op}, params", params, before)
            assert_same_bits(f"{op}, old_params", old_params, before)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_perturbation_leaves_it_in_its_own_element(backend: str, value: float) -> None:
    """With a finite norm of the caller's own."""
    params, grads = with_a_weight(value)
    others, _ = with_a_weight(1.0)
    for given in (params, others):
        functional.perturb_(given, grads, [torch.zeros_like(p) for p in given], torch.tensor(2.0), rho=0.5, adaptive=True, eta=0.01)
    assert not math.isfinite(params[0][7].item())
    params[0][7] = others[0][7]
    assert_same_bits("all other weights", params, others)
    plain, _ = with_a_weight(value)
    before = [param.clone() for param in plain]
    norm = functional.grad_norm(grads, plain)  # not adaptive: weights are not in the norm
    functional.perturb_(plain, grads, [torch.zeros_like(p) for p in plain], norm, rho=0.5)
    assert math.isfinite(norm.item())
    assert_same_bits("the weight itself", [plain[0][7]], [before[0][7]])
