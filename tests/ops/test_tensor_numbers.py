"""Numbers that change from step to step, given as tensors: the same bits as the numbers they hold, whatever their kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import _validate, functional
from sam_kernels.operations import number_on
from sam_kernels.validation.check import build
from sam_kernels.validation.options import SCHEDULED
from sam_kernels.validation.problem import Problem, run
from tests.helpers.compare import assert_same_bits

# Of every operation the keyword sets in which each number counts for something of its own.
CALLS = [
    ("perturb_", "unified"), ("perturb_", "nearly_sam"), ("perturb_", "grad_scale_adaptive"), ("perturb_", "vasso"),
    ("combine_", "plain"), ("combine_", "into_origins"), ("random_perturb_", "rademacher"), ("random_perturb_", "normal_from_old"),
    ("sgd_step_", "plain"), ("sgd_step_", "nesterov_old"), ("sgd_step_", "first_mixed"),
    ("adamw_step_", "adamw_old"), ("adamw_step_", "adam"), ("adamw_step_", "clip_grad_scale"),
]  # fmt: skip
KINDS: dict[str, Callable[[float], Tensor]] = {
    "float64": lambda value: torch.tensor(value, dtype=torch.float64),
    "float32": lambda value: torch.tensor(value, dtype=torch.float32),
    "bfloat16": lambda value: torch.tensor(value, dtype=torch.bfloat16),
    "float16": lambda value: torch.tensor(value, dtype=torch.float16),
    "one_element": lambda value: torch.tensor([value], dtype=torch.float64),
    "a_view": lambda value: torch.tensor([0.0, value, 0.0], dtype=torch.float64)[1],
    "requires_grad": lambda value: torch.tensor(value, dtype=torch.float64, requires_grad=True),
}


def with_numbers(problem: Problem, change: Callable[[Any], Any]) -> Problem:
    """The problem in memory of its own, its scheduled numbers changed."""
    copy = problem.clone()
    copy.kwargs |= {name: change(copy.kwargs[name]) for name in SCHEDULED if name in copy.kwargs}
    return copy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("op", "option"), CALLS)
def test_a_tensor_is_the_number_it_holds(backend: str, op: str, option: str, kind: str) -> None:
    for dtype in ("float32", "bfloat16"):
        problem = build(op, "mixed_layouts" if op == "perturb_" else "single", dtype, option)
        tensors = with_numbers(problem, KINDS[kind])
        numbers = with_numbers(tensors, lambda tensor: tensor.item())
        kept = {name: tensors.kwargs[name].clone() for name in SCHEDULED if name in tensors.kwargs}
        run(tensors)
        run(numbers)
        for name, expected in numbers.lists.items():
            assert_same_bits(f"{dtype}, {name}", tensors.lists[name], expected)
        assert_same_bits("the numbers themselves", [tensors.kwargs[name] for name in kept], list(kept.values()))
        written, before = (next(iter(given.lists.values()))[0] for given in (tensors, problem))
        assert not torch.equal(written, before)  # type: ignore[arg-type]


def test_a_tensor_is_read_anew_at_every_call(backend: str) -> None:
    lr, params, grads = torch.tensor(0.5), [torch.ones(3)], [torch.ones(3)]
    for value in (0.5, 0.25):
        lr.fill_(value)
        functional.sgd_step_(params, grads, None, lr=lr)
    assert params[0].tolist() == [0.25] * 3


# Where no device is, one that holds no values stands for it: whoever reads from it fails.
DEVICE = torch.device("meta")


def test_the_value_of_a_tensor_on_a_device_is_not_looked_at() -> None:
    out_of_range = torch.full((), -1.0, device=DEVICE)
    assert _validate.check_number_or_tensor("sgd_step_", "lr", out_of_range, low=0.0) is out_of_range
    with pytest.raises(TypeError, match=r"sgd_step_: lr must be a number or a dense floating-point tensor .*int64"):
        _validate.check_number_or_tensor("sgd_step_", "lr", out_of_range.to(torch.int64), low=0.0)
    with pytest.raises(ValueError, match=r"sgd_step_: lr must be a number or a tensor that holds one, got .*shape \(2,\) on meta"):
        _validate.check_number_or_tensor("sgd_step_", "lr", torch.ones(2, device=DEVICE), low=0.0)


def test_what_backends_are_given() -> None:
    """A number, or a () tensor on the device of the tensors beside it."""
    assert number_on(0.1, DEVICE) == 0.1
    on_the_host = torch.tensor([0.5])
    assert number_on(on_the_host, DEVICE) == 0.5
    here: Any = number_on(on_the_host, torch.device("cpu"))
    assert (here.shape, here.data_ptr()) == ((), on_the_host.data_ptr())
    there: Any = number_on(torch.ones(1, dtype=torch.float64, device=DEVICE), DEVICE)
    assert (there.shape, there.device, there.dtype) == ((), DEVICE, torch.float64)
