"""The helpers catch what they are for: planted errors of every kind fail, and the bounds are not wider than their derivation."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels.backends import foreach
from sam_kernels.operations import GradNorms, Operands
from sam_kernels.validation.bounds import bounds_of
from sam_kernels.validation.cases import CASES, DTYPES, guards_intact, make_tensor, rows_of
from sam_kernels.validation.check import build, check
from sam_kernels.validation.compare import compare, same_bits
from sam_kernels.validation.problem import run
from sam_kernels.validation.tolerance import Arithmetic, Rounded, norm_bound, ulp
from tests.helpers.backends import OPERATIONS
from tests.helpers.compare import assert_same_bits
from tests.helpers.pairwise import in_turns


def plant(monkeypatch: pytest.MonkeyPatch, name: str, after: Callable[[Operands], Any] = lambda lists: None, **wrong: Any) -> None:
    """The foreach backend's operation with wrong options, without a list that is None, or with something done to its lists afterwards."""
    kind = OPERATIONS[name]
    right = foreach.BACKEND.operations[kind]
    options = {option: value for option, value in wrong.items() if option not in kind.roles}

    def planted(op: Any, lists: Operands) -> Any:
        given = Operands({role: tensors for role, tensors in lists.items() if role not in wrong}, lists.indices)
        result = right(dataclasses.replace(op, **options), given)
        after(lists)
        return result

    monkeypatch.setitem(foreach.BACKEND.operations, kind, planted)


WRONG_KEYWORDS = [
    ("perturb_", "unified", {"lambd": 0.3 * (1 + 2e-6)}),
    ("perturb_", "adaptive_eta", {"eta": 0.0}),
    ("perturb_", "grad_scale", {"grad_scale": None}),
    ("perturb_", "eps", {"eps": 1e-12}),
    ("perturb_", "found_inf", {"found_inf": None}),
    ("perturb_", "from_old", {"from_old": False}),
    ("perturb_", "friendly", {"ema_weight": -1.142857 * (1 + 2e-6)}),
    ("perturb_", "vasso", {"ema": None}),
    ("centralize_", "adaptive", {"eta": 0.0}),
    ("centralize_", "adaptive", {"adaptive": False}),
    ("direction_norm_", "vasso", {"theta": 0.3 * (1 + 1e-6)}),
    ("direction_norm_", "friendly", {"sigma": 0.8 * (1 + 1e-6)}),
    ("direction_norm_", "friendly", {"lmbda": 0.7 * (1 + 1e-6)}),
    ("direction_norm_", "friendly", {"grad_scale": None}),
    ("direction_norm_", "friendly_adaptive", {"eta": 0.0}),
    ("direction_norm_", "vasso_first", {"first_step": True}),
    ("random_perturb_", "rademacher", {"seed": 2}),
    ("random_perturb_", "normal", {"scale": -0.3 * (1 + 1e-6)}),
    ("random_perturb_", "rademacher", {"distribution": "normal"}),
    ("sgd_step_", "momentum", {"dampening": 0.0}),
    ("sgd_step_", "momentum", {"weight_decay": 0.0}),
    ("sgd_step_", "momentum", {"maximize": False}),
    ("sgd_step_", "nesterov", {"nesterov": False}),
    ("sgd_step_", "first", {"first_step": False}),
    ("sgd_step_", "clip", {"max_norm": None}),
    ("sgd_step_", "momentum_old", {"old_params": None}),
    ("sgd_step_", "momentum", {"lr": 0.1 * (1 + 1e-5)}),
    ("adamw_step_", "adamw", {"decoupled": False}),
    ("adamw_step_", "adamw", {"eps": 1e-8}),
    ("adamw_step_", "adamw", {"betas": (0.8, 0.95 * (1 + 1e-6))}),
    ("adamw_step_", "clip", {"max_norm": None}),
    ("adamw_step_", "found_inf_old", {"found_inf": None}),
]


@pytest.mark.parametrize(("op", "option", "wrong"), WRONG_KEYWORDS)
def test_a_forgotten_or_inexact_keyword_is_caught(monkeypatch: pytest.MonkeyPatch, op: str, option: str, wrong: dict[str, Any]) -> None:
    assert check(op, ["foreach"], "float32", "odd_sizes", option)["foreach"].passed
    plant(monkeypatch, op, **wrong)
    assert not check(op, ["foreach"], "float32", "odd_sizes", option)["foreach"].passed


SIDE_EFFECTS: dict[str, Callable[[Operands], Any]] = {
    "a gradient was changed": lambda lists: lists["grads"][0].mul_(2),
    "old_params have a last bit too much": lambda lists: lists["old_params"][4].view(torch.int32)[3].add_(1),
    "written behind the end": lambda lists: lists["params"][1]._base[-1].fill_(0.0),
    "written before the start": lambda lists: lists["params"][1]._base[15].fill_(0.0),
    "one element is NaN": lambda lists: lists["params"][2][7].fill_(math.nan),
    "one element is 8 ulp off": lambda lists: lists["params"][2].view(torch.int32)[7].add_(8),
}


@pytest.mark.parametrize("what", SIDE_EFFECTS)
def test_a_side_effect_is_caught(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    plant(monkeypatch, "perturb_", SIDE_EFFECTS[what])
    assert not check("perturb_", ["foreach"], "float32", "odd_sizes", "sam")["foreach"].passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_truncation_instead_of_rounding_is_caught(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    assert check("sgd_step_", ["foreach"], name, "odd_sizes", "momentum")["foreach"].passed

    def truncate(destinations: Any, results: Any, skip: Any) -> None:
        for destination, result in zip(destinations, results, strict=True):
            nearest = result.to(destination.dtype)
            beyond = nearest.to(result.dtype).abs() > result.abs()
            destination.copy_(torch.where(beyond, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest))

    monkeypatch.setattr(foreach.ops, "write", truncate)
    assert not check("sgd_step_", ["foreach"], name, "odd_sizes", "momentum")["foreach"].passed


def test_a_dropped_gradient_element_shows_in_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    right = foreach.BACKEND.operations[GradNorms]

    def shortened(op: GradNorms, lists: Operands) -> Tensor:
        norms: Tensor = right(op, Operands({"grads": [g.reshape(-1)[:-1] for g in lists["grads"]]}, lists.indices))
        return norms

    monkeypatch.setitem(foreach.BACKEND.operations, GradNorms, shortened)
    assert not check("grad_norm", ["foreach"], "float32", "many_tiny", "plain")["foreach"].passed


def test_compare_names_list_index_and_element() -> None:
    expected = [torch.zeros(3, dtype=torch.float64), torch.ones(4, dtype=torch.float64)]
    actual = [torch.zeros(3), torch.ones(4)]
    actual[1][2] += 3 * 2**-23
    bounds = [torch.full((n,), 2.0**-23, dtype=torch.float64) for n in (3, 4)]
    worst = compare("params", actual, expected, bounds, expected)
    assert (worst.passed, worst.name, worst.index, worst.element, worst.error, worst.bound) == (False, "params", 1, 2, 3.0, 1.0)
    assert str(worst).startswith("params[1] element 2: 1.00000035")
    assert compare("params", actual, expected, [3 * bound for bound in bounds], expected).passed
    assert not compare("params", [actual[0], None], expected, bounds, expected).passed
    assert not compare("params", [torch.full((3,), math.nan), torch.ones(4)], expected, bounds, expected).passed
    with pytest.raises(AssertionError, match=r"old_params\[0\]: 1 bytes differ"):
        assert_same_bits("old_params", [torch.tensor([0.0])], [torch.tensor([-0.0])])


def test_ulp_and_same_bits() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for value in (1.0, 1.5, 3.0, 1000.0):
            x = torch.tensor(value, dtype=dtype)
            assert ulp(x.double(), dtype) == torch.nextafter(x, torch.tensor(math.inf, dtype=dtype)).double() - x.double()
    assert same_bits(torch.tensor([math.nan, -0.0, 1.0]), torch.tensor([-math.nan, 0.0, 1.0])).tolist() == [True, False, True]


def test_the_bound_is_two_ulp_of_the_largest_operand_where_the_step_is_small() -> None:
    """The usual perturbation: e is a twentieth of p. The bound is the last addition's ulp and little else."""
    problem = build("perturb_", "single", "float32", "unified")
    problem.lists["params"] = [torch.rand(128) / 2 + 1]  # far from a power of two, where the ulp changes
    bound = bounds_of(problem)["params"][0]
    largest = problem.double().lists["params"][0]
    assert largest is not None
    assert (bound <= 2 * ulp(largest, torch.float32)).all()
    assert (bound >= 0.5 * ulp(largest, torch.float32)).all()


@pytest.mark.parametrize(
    "formula",
    [
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a * b,
        lambda a, b: a / b,
        lambda a, b: (a * a).sqrt() / (0.1 + abs(b)) - a * b * 0.3,
    ],
)
def test_rounded_bounds_what_float32_does(formula: Callable[[Any, Any], Any]) -> None:
    """And is within a factor that counts as derived: not hundreds of times what is seen."""
    a, b = (torch.randn(100_000) for _ in range(2))
    arithmetic = Arithmetic.of(torch.zeros(a.shape, dtype=torch.bool))
    exact = formula(Rounded.exact(a.double(), arithmetic), Rounded.exact(b.double(), arithmetic))
    error = (formula(a, b).double() - exact.value).abs()
    assert (error <= exact.error).all()
    assert (error / exact.error).max() > 0.1


def test_rounded_has_no_bound_beyond_the_range() -> None:
    big = Rounded.exact(torch.tensor([1e30], dtype=torch.float64), Arithmetic.of(torch.tensor([False])))
    assert math.isinf((big * big).error.item())
    assert math.isinf((big * big).sqrt().error.item())
    assert math.isfinite((big + big).error.item())
    assert math.isfinite((Rounded.exact(big.value, Arithmetic.of(torch.tensor([True]))) * big.value).error.item())


def test_norm_bound_is_one_ulp_of_float32() -> None:
    assert norm_bound(torch.tensor(1.0, dtype=torch.float64), 10_000_000).item() < 2.0**-24


@pytest.mark.parametrize("layout", ["contiguous", "unaligned", "transposed", "strided", "channels_last", "expanded"])
def test_layouts_are_what_they_say(layout: str) -> None:
    values = torch.randn(4, 3, 2, 5, dtype=torch.float64)
    tensor = make_tensor(values, torch.float32, layout)
    assert tensor.shape == values.shape
    assert tensor.is_contiguous() == (layout in ("contiguous", "unaligned"))
    assert tensor.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
    assert (tensor.data_ptr() % 16 == 0) == (layout != "unaligned")
    assert (tensor.stride(0) == 0) == (layout == "expanded")
    assert (tensor == (values[:1] if layout == "expanded" else values).float()).all()
    assert guards_intact(tensor)
    base: Tensor = tensor._base  # type: ignore[assignment]
    base[-1] = 1.0
    assert not guards_intact(tensor)


def test_every_case_describes_every_dtype() -> None:
    for dtype in DTYPES:
        for case in CASES:
            kinds = {kind for row in rows_of(case, dtype) for kind in row.dtypes.values()}
            assert len(kinds) == (4 if dtype == "mixed" else 1), (case, dtype)


def test_outputs_are_poisoned_and_inputs_are_reproducible() -> None:
    first, again = (build("perturb_", "odd_sizes", "float32", "sam") for _ in range(2))
    assert all(t is not None and bool(t.isnan().all()) for t in first.lists["old_params"])
    assert all(t is not None and not bool(t.isnan().any()) for t in first.lists["params"])
    assert_same_bits("params", first.lists["params"], again.lists["params"])
    step = build("sgd_step_", "odd_sizes", "float32", "momentum_old")
    assert all(t is not None and bool(t.isnan().all()) for t in step.lists["params"])
    run(step)
    assert not any(t is None or bool(t.isnan().any()) for t in step.lists["params"])


def test_a_clone_keeps_layouts_guards_and_shared_memory() -> None:
    """Which is how a problem gets to a device."""
    problem = build("perturb_", "mixed_layouts", "float32", "unified")
    problem.lists["grads"][0] = problem.lists["params"][0][:1]
    copy = problem.clone()
    for name, tensors in problem.lists.items():
        for tensor, twin in zip(tensors, copy.lists[name], strict=True):
            assert (twin.shape, twin.stride(), twin.storage_offset()) == (tensor.shape, tensor.stride(), tensor.storage_offset())
            assert twin.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
            assert twin.untyped_storage().nbytes() == tensor.untyped_storage().nbytes()
    assert copy.lists["grads"][0].untyped_storage().data_ptr() == copy.lists["params"][0].untyped_storage().data_ptr()
    assert all(guards_intact(tensor) for tensor in copy.lists["params"][1:])
    copy.lists["params"][1]._base.fill_(0.0)
    assert not guards_intact(copy.lists["params"][1])


def test_what_takes_turns_meets_every_element_of_every_axis() -> None:
    rows = in_turns("ab", range(3), "xyz", [True, False])
    assert len(rows) == len(set(rows)) == 18
    for axis in (1, 2, 3):
        assert {(row[0], row[axis]) for row in rows} == {(value, each) for value in "ab" for each in {row[axis] for row in rows}}
