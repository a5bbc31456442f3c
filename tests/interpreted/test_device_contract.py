"""What a step asks of a device, counted without one: kernels launched, other operations of torch, numbers read back.

A twin of tests/gpu/test_no_waiting.py, where the device itself is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sam_kernels import _validate, functional, use_backend
from sam_kernels._tensor_list import TensorList
from sam_kernels.optim._engine import skip_warning
from sam_kernels.schedules import (
    AscentInfo,
    DecreasingRadius,
    Interval,
    LinearLambda,
    LinearRadius,
    LRProportional,
    Radius,
    Tail,
    _at_step,
)
from tests.helpers.compare import assert_same_bits
from tests.helpers.training import closure_of, everything, make

# What makes no work for a device: views, and memory that nobody fills.
FREE = ("aten.detach", "aten.view", "aten.select", "aten.reshape", "aten.alias", "aten.as_strided", "aten.empty", "aten.slice", "profiler.")
READS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero")


class Work(TorchDispatchMode):
    """Names of torch's operations that would be launches, and of those that would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(READS):
            self.reads.append(name)
        elif not name.startswith(FREE):
            self.operations.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels launched, in order. The interpreter's own operations on tensors are not the caller's."""
    from triton.runtime.interpreter import GridExecutor

    names: list[str] = []
    real = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(executor.fn.__name__)
        with torch.utils._python_dispatch._disable_current_modes():
            return real(executor, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    monkeypatch.setattr(skip_warning, "_is_at_hand", lambda flag: False)  # as of a device, though tensors are on the CPU here
    with use_backend("triton"):
        yield names


def work_of(kernels: list[str], call: Callable[[], object]) -> Work:
    kernels.clear()
    with Work() as work:
        call()
    return work


def halves(optimizer: Any) -> Callable[[], None]:
    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return step


@pytest.mark.parametrize(
    ("base", "options", "expected"),
    [
        ("sgd", {}, ["norm", "perturb", "norm", "sgd"]),  # the second norm: a check, or what gradients are clipped by
        ("sgd", {"adaptive": True}, ["norm", "perturb", "norm", "sgd"]),
        ("sgd", {"max_grad_norm": 1.0}, ["norm", "perturb", "norm", "sgd"]),
        ("sgd", {"check_finite": False}, ["norm", "perturb", "sgd"]),
        ("adamw", {}, ["norm", "perturb", "norm", "advance", "adamw"]),
    ],
    ids=["sgd", "sgd_adaptive", "sgd_clipped", "sgd_unchecked", "adamw"],
)
def test_a_steady_step_launches_a_handful_of_kernels_and_nothing_else(
    kernels: list[str], base: str, options: dict[str, Any], expected: list[str]
) -> None:
    """Norms are finished by their last programs. Nothing is read back: the host never waits."""
    model, optimizer = make(base, "cpu", **options)
    closure = closure_of(optimizer, model, set_to_none=False)
    for _ in range(3):
        optimizer.step(closure)
    work = work_of(kernels, halves(optimizer))
    assert kernels == [f"_{name}_kernel" for name in expected]
    assert work.operations == [], f"beside {kernels}"
    assert work.reads == []


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hyperparameters in tensors are taken as those of a device are, whose values are not looked at."""
    real = _validate.check_number_or_tensor

    def without_a_look(op: str, name: str, value: Any, **bounds: Any) -> Any:
        return value if isinstance(value, torch.Tensor) else real(op, name, value, **bounds)

    for module in (_validate, _at_step):
        monkeypatch.setattr(module, "check_number_or_tensor", without_a_look)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("base", "most"), [("sgd", 4), ("adamw", 5)])
def test_a_capturable_step_counts_itself_and_does_nothing_else_more(kernels: list[str], base: str, most: int) -> None:
    model, optimizer = make(base, "cpu", capturable=True)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    closure = closure_of(optimizer, model, set_to_none=False)
    for _ in range(3):
        optimizer.step(closure)
    work = work_of(kernels, halves(optimizer))
    assert len(kernels) <= most, kernels
    assert work.operations == ["aten.add_.Tensor"], f"beside {kernels}"
    assert work.reads == []


SCHEDULES: list[dict[str, Any]] = [
    {"lambd": "1/t"},
    {"lambd": "1-1/t"},
    {"rho": "0.1/k^0.5"},
    {"rho": DecreasingRadius(0.1)},
    {"rho": Interval(0.1, 2)},
    {"rho": Tail(LRProportional(0.1, 0.01, 0.2, 0.0), 1)},
    {"rho": LinearRadius(0.0, 0.1, 5), "lambd": LinearLambda(1.0, 0.0, 5)},
]


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_schedule_reads_nothing_back(kernels: list[str], schedule: dict[str, Any]) -> None:
    model, optimizer = make("sgd", "cpu", capturable=True, **schedule)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    closure = closure_of(optimizer, model, set_to_none=False)
    for _ in range(2):
        optimizer.step(closure)
    assert work_of(kernels, halves(optimizer)).reads == []


def lists(count: int) -> list[TensorList]:
    return [TensorList(torch.rand(size) for size in (3, 700, 1025)) for _ in range(count)]


def calls() -> dict[str, Callable[[], object]]:
    params, grads, old_params, buffers = lists(4)
    norm, found_inf, skipped = torch.ones(()), torch.zeros(()), torch.zeros(())
    images = TensorList([torch.rand(40, 3, 3, 3), torch.rand(2, 3, 3, 3), torch.rand(3, 700), torch.rand(7)])
    single, double = torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)
    return {
        "grad_norm_": lambda: functional.grad_norm_(norm, grads, found_inf=found_inf, skipped=skipped),
        "check_finite_": lambda: functional.check_finite_(grads, found_inf),
        "centralize_": lambda: functional.centralize_(images, found_inf=found_inf),
        "perturb_": lambda: functional.perturb_(params, grads, old_params, norm, rho=0.1, found_inf=found_inf),
        "perturb_ by tensors": lambda: functional.perturb_(params, grads, old_params, norm, rho=single, lambd=double),
        "random_perturb_ by tensors": lambda: functional.random_perturb_(
            params, old_params, seed=1, scale=double, distribution="rademacher"
        ),
        "sgd_step_ by tensors": lambda: functional.sgd_step_(params, grads, buffers, lr=double, momentum=0.9),
        "restore_": lambda: functional.restore_(params, old_params),
        "sgd_step_": lambda: functional.sgd_step_(
            params, grads, buffers, old_params=old_params, lr=0.1, momentum=0.9, norm=norm, max_norm=0.1, found_inf=found_inf
        ),
    }


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("op", calls())
def test_an_operation_reads_nothing_back(kernels: list[str], op: str) -> None:
    call = calls()[op]
    call()
    work = work_of(kernels, call)
    assert len(kernels) == {"centralize_": 4}.get(op, 1)  # of slices side by side, of long ones, of none; the norm
    assert work.reads == []


@pytest.mark.parametrize("bad_pass", [1, 2])
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_a_bad_pass_skips_the_step_without_being_read(kernels: list[str], base: str, bad_pass: int) -> None:
    model, optimizer = make(base, "cpu")
    closure = closure_of(optimizer, model, set_to_none=False)
    for _ in range(2):
        optimizer.step(closure)
    before = everything(model, optimizer)
    for number, half in enumerate((optimizer.first_step, optimizer.second_step), 1):
        model.factor.fill_(torch.inf if number == bad_pass else 1.0)
        closure()
        assert work_of(kernels, half).reads == []
    assert_same_bits("after a skipped step", everything(model, optimizer), before)
    assert optimizer.skipped_steps == 1


class OverNorm(Radius):
    def radius(self, info: AscentInfo) -> torch.Tensor:
        return (0.1 / info.norm).clamp(max=0.05)


@pytest.mark.usefixtures("unread")
def test_neither_does_a_radius_that_follows_the_norm(kernels: list[str]) -> None:
    """With steps that are counted by the host, too."""
    model, optimizer = make("sgd", "cpu", rho=OverNorm())
    closure = closure_of(optimizer, model, set_to_none=False)
    for _ in range(2):
        optimizer.step(closure)
    assert work_of(kernels, halves(optimizer)).reads == []
