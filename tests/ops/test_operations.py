"""The classes of ``sam_kernels.operations`` agree with the public functions, the operators' schemas and every backend."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from sam_kernels import functional
from sam_kernels._backend import Backend
from sam_kernels.operations import (
    Access,
    AdamWStep,
    Centralize,
    CheckFinite,
    Combine,
    DirectionNorm,
    GradDots,
    GradNorms,
    Operands,
    Operation,
    Perturb,
    RandomPerturb,
    Restore,
    SgdStep,
)
from tests.helpers.backends import OPERATIONS

PATHS = ("native.cpu", "native.cuda", "triton", "foreach")
# Fields that are no keyword of the public function, and where it takes them from
DERIVED = {
    ("sgd_step_", "first_step"): "entries of momentum_buffers that are None",
    ("direction_norm_", "first_step"): "entries of ema that are None",
    ("perturb_", "grad_weight"): "kind, sigma, lmbda",
    ("perturb_", "ema_weight"): "kind, sigma, lmbda",
    ("grad_norms", "group_sizes"): "the lengths of grad_groups",
    ("grad_norms", "out"): "norm of grad_norm_",
}
# Arguments of the public function that are neither a role nor a field
PUBLIC_ONLY = {
    ("adamw_step_", "state_steps"): "counters, in the operands",
    ("perturb_", "kind"): "grad_weight, ema_weight",
    ("perturb_", "sigma"): "grad_weight, ema_weight",
    ("perturb_", "lmbda"): "grad_weight, ema_weight",
    ("direction_norm_", "found_inf"): "set by the public function, which has the norm of all parts",
    ("grad_norms", "grad_groups"): "grads",
    ("grad_norms", "norm"): "out",
}
FUNCTIONS = {name: (name,) for name in OPERATIONS} | {"grad_norms": ("grad_norms", "grad_norm", "grad_norm_")}

every_operation = pytest.mark.parametrize("name", OPERATIONS)


def parameters_of(name: str) -> dict[str, inspect.Parameter]:
    """Those of all public functions that one operation is behind."""
    return {
        parameter.name: parameter
        for function in FUNCTIONS[name]
        for parameter in inspect.signature(getattr(functional, function)).parameters.values()
    }


def mutated_by(function: str) -> set[str]:
    """The arguments that the operator's schema marks as written."""
    schema = getattr(torch.ops.sam_kernels, function).default._schema
    return {argument.name for argument in schema.arguments if argument.alias_info is not None and argument.alias_info.is_write}


def test_there_are_operations() -> None:
    assert len(OPERATIONS) >= 11


@pytest.mark.parametrize("path", PATHS)
def test_a_backend_has_a_function_of_the_same_name_for_every_operation(path: str) -> None:
    """Also one without a device here. A backend whose needs are missing may have none."""
    try:
        module = importlib.import_module(f"sam_kernels.backends.{path}")
    except ImportError as error:
        pytest.skip(f"backend {path}: {error}")
    backend: Backend = module.BACKEND
    if backend.reason_missing is not None and not backend.operations:
        pytest.skip(f"backend {path}: {backend.reason_missing}")
    assert {kind.name: function.__name__ for kind, function in backend.operations.items()} == {name: name for name in OPERATIONS}
    for function in backend.operations.values():
        assert list(inspect.signature(function).parameters) == ["op", "lists"], function


@every_operation
def test_the_public_function_takes_the_roles_and_the_fields(name: str) -> None:
    kind, parameters = OPERATIONS[name], parameters_of(name)
    assert callable(getattr(functional, name))
    assert [role for role in kind.roles if role not in parameters] == []
    fields = {field.name: field for field in dataclasses.fields(kind)}
    derived = {field for operation, field in DERIVED if operation == name}
    assert fields.keys() - parameters.keys() == derived
    own = {argument for operation, argument in PUBLIC_ONLY if operation == name}
    assert parameters.keys() - kind.roles.keys() - fields.keys() == own
    for field in fields.keys() - derived:
        default = inspect.Parameter.empty if fields[field].default is dataclasses.MISSING else fields[field].default
        assert repr(parameters[field].default) == repr(default), f"{field}: the public default is another"


@every_operation
def test_the_schema_marks_what_is_written(name: str) -> None:
    kind, mutated = OPERATIONS[name], set().union(*map(mutated_by, FUNCTIONS[name]))
    assert mutated & kind.roles.keys() == set(kind.written)
    also = {"adamw_step_": {"state_steps"}, "direction_norm_": {"found_inf"}, "grad_norms": {"norm"}}.get(name, set())
    assert mutated - kind.roles.keys() == {*kind.reports, *also}


@every_operation
def test_numbers_and_scalars_are_the_fields_of_these_types(name: str) -> None:
    """A field that is missing there would stay on another device than the lists."""
    kind = OPERATIONS[name]
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    assert set(kind.numbers) == {field for field, annotation in types.items() if annotation == "Number"}
    assert set(kind.scalars) == {field for field, annotation in types.items() if annotation in ("Tensor", "Tensor | None")}
    assert set(kind.reports) <= set(kind.scalars)


SWEEPS: list[tuple[Callable[..., dict[str, Access]], str, int]] = [
    (GradNorms.accesses, "grads", 1),
    (GradNorms.accesses, "grads params", 2),
    (CheckFinite.accesses, "grads", 1),
    (Centralize.accesses, "grads", 2),
    (Centralize.accesses, "grads params", 3),
    (DirectionNorm.accesses, "grads ema", 3),
    (DirectionNorm.accesses, "grads ema params", 4),
    (GradDots.accesses, "lefts rights", 2),
    (GradDots.accesses, "lefts rights origins", 3),
    (Combine.accesses, "outs lefts rights", 3),
    (Combine.accesses, "outs lefts rights origins", 4),
    (Perturb.accesses, "params grads old_params", 4),
    (Perturb.accesses, "params ema old_params", 4),
    (Perturb.accesses, "params grads old_params ema", 5),
    (partial(Perturb.accesses, from_old=True), "params grads old_params", 3),
    (partial(Perturb.accesses, from_old=True), "params grads old_params ema", 4),
    (RandomPerturb.accesses, "params old_params", 3),
    (partial(RandomPerturb.accesses, from_old=True), "params old_params", 2),
    (Restore.accesses, "params old_params", 2),
    (SgdStep.accesses, "params grads old_params momentum_buffers", 5),
    (SgdStep.accesses, "params grads momentum_buffers", 5),
    (SgdStep.accesses, "params grads old_params", 3),
    (SgdStep.accesses, "params grads", 3),
    (partial(SgdStep.accesses, to_old=True), "params grads old_params momentum_buffers", 6),
    (partial(SgdStep.accesses, to_old=True), "params grads old_params", 4),
    (AdamWStep.accesses, "params grads old_params exp_avgs exp_avg_sqs", 7),
    (AdamWStep.accesses, "params grads exp_avgs exp_avg_sqs", 7),
    (partial(AdamWStep.accesses, to_old=True), "params grads old_params exp_avgs exp_avg_sqs", 8),
]


@pytest.mark.parametrize(("accesses", "roles", "sweeps"), SWEEPS)
def test_sweeps_are_those_of_the_documentation(accesses: Callable[..., dict[str, Access]], roles: str, sweeps: int) -> None:
    found = accesses(roles.split())
    assert found.keys() == set(roles.split())
    assert sum(access.sweeps for access in found.values()) == sweeps
    if not isinstance(accesses, partial):
        kind: type[Operation] = accesses.__self__  # type: ignore[attr-defined]  # a class method
        assert kind.sweeps(roles.split()) == sweeps


def test_a_perturbation_from_the_backups_reads_them_and_writes_parameters_alone() -> None:
    given = ("params", "grads", "old_params")
    assert Perturb.accesses(given) == {"params": Access.UPDATED, "grads": Access.READ, "old_params": Access.WRITTEN}
    assert Perturb.accesses(given, from_old=True) == {"params": Access.WRITTEN, "grads": Access.READ, "old_params": Access.READ}


@pytest.mark.parametrize("kind", [SgdStep, AdamWStep])
def test_an_update_writes_backups_where_they_are_masters(kind: type[SgdStep | AdamWStep]) -> None:
    assert kind(lr=0.1, to_old=True).writes == kind.written
    assert set(kind.written) - set(kind(lr=0.1).writes) == {"old_params"}
    given = ("params", "grads", "old_params")
    assert kind.accesses(given) == {"params": Access.WRITTEN, "grads": Access.READ, "old_params": Access.READ}
    assert kind.accesses(given, to_old=True) == {"params": Access.WRITTEN, "grads": Access.READ, "old_params": Access.UPDATED}


@every_operation
def test_an_operation_cannot_be_changed(name: str) -> None:
    kind = OPERATIONS[name]
    given: dict[str, Any] = {field.name: None for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}
    op = kind(**given)
    for field in dataclasses.fields(kind):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(op, field.name, None)


def test_operands_hold_no_absent_role() -> None:
    lists = Operands({"params": [torch.ones(3)], "grads": None}, [4])
    assert list(lists) == ["params"]
    assert lists.get("grads") is None
    assert (lists.device, lists.indices) == (torch.device("cpu"), [4])


def test_scalars_go_to_the_device_of_the_lists() -> None:
    """A number on the CPU beside lists on a device is read, which waits for nothing."""
    cpu, meta = torch.device("cpu"), torch.device("meta")
    op = Perturb(norm=torch.tensor(2.0), rho=torch.tensor([0.5]), found_inf=torch.tensor(0.0))
    there = op.on(meta)
    assert (there.norm.device, there.rho, there.lambd, there.grad_scale) == (meta, 0.5, 1.0, None)
    assert there.found_inf is not None
    assert there.found_inf.device == meta
    here = op.on(cpu)
    assert here.norm is op.norm
    assert isinstance(here.rho, torch.Tensor)
    assert (here.rho.shape, here.rho.item()) == ((), 0.5)
    plain = Restore()
    assert plain.on(meta) is plain
