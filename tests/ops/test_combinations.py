"""Inner products and weighted sums: what the rules made of them rely on."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from sam_kernels import _dispatch, functional
from sam_kernels._tensor_list import TensorList
from sam_kernels.validation.backends import backend_of
from sam_kernels.validation.check import check
from sam_kernels.validation.roundings import roundings_of
from sam_kernels.validation.tolerance import norm_bound
from tests.helpers.backends import OPERATIONS, require_dtype, widest
from tests.helpers.compare import assert_same_bits

SIZES = (300, 1, 70)


def randoms(count: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    return [[torch.randn(size).to(dtype) for size in SIZES] for _ in range(count)]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1).double() for tensor in tensors])


def test_gsam_takes_out_the_component_along_the_perturbed_gradient(backend: str) -> None:
    """g_p - alpha g_orthogonal in two passes: what is left of -alpha g is orthogonal to g_p."""
    grads, perturbed = randoms(2)
    alpha = 0.4
    _, product, square = functional.grad_dots(grads, perturbed)
    out = [torch.full_like(g, math.nan) for g in grads]
    functional.combine_(out, perturbed, grads, left_weight=1 + alpha * product / square, right_weight=-alpha)
    change = flat(out) - flat(perturbed)
    assert change.norm().item() > 0.1
    assert abs(change.dot(flat(perturbed)).item()) < 1e-5 * change.norm().item() * flat(perturbed).norm().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_difference_of_weights_is_exact(backend: str, dtype: torch.dtype) -> None:
    """p - x of perturbed and saved weights: Sterbenz. Neither a fused multiply-add nor another order of the additions would give it."""
    require_dtype(backend, dtype)
    (saved,) = randoms(1, dtype)
    near = [x * (1 + 1e-3) for x in saved]
    outs = [torch.full_like(x, math.nan) for x in saved]
    huge = [torch.full_like(x, 1e6) for x in saved]
    norm = functional.combine_(outs, huge, near, saved, left_weight=0.0, right_weight=1.0, origin_weight=-1.0)
    differences = [p - x for p, x in zip(near, saved, strict=True)]
    assert_same_bits("outs", outs, differences)
    roundings = roundings_of(backend_of(backend), "combine_", SIZES).terms
    exact = flat(differences).norm()
    assert abs(norm.double() - exact) <= norm_bound(exact, sum(SIZES), roundings) + torch.finfo(dtype).eps * exact


@pytest.mark.parametrize("name", ["lefts", "rights", "origins"])
@pytest.mark.parametrize("kind", [list, TensorList])
def test_in_place_has_the_bits_of_another_place(backend: str, name: str, kind: type[list[Tensor]]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = dict(zip(("lefts", "rights", "origins"), randoms(3, dtype), strict=True))
        given = {key: kind(tensors) for key, tensors in given.items()}
        weights = {"left_weight": 0.3, "right_weight": -1.7, "origin_weight": 0.6}
        elsewhere = kind([torch.full_like(x, math.nan) for x in given["lefts"]])
        norm = functional.combine_(elsewhere, **given, **weights)
        here = functional.combine_(given[name], **given, **weights)
        assert_same_bits("outs", given[name], elsewhere)
        assert_same_bits("norm", [here], [norm])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1.0])
@pytest.mark.parametrize("where", range(3))
def test_what_is_not_finite_sets_the_flag(backend: str, value: float, where: int) -> None:
    for is_set in (0.0, 1.0):
        given = randoms(3)
        given[where][2][5] = value
        flag = torch.tensor(is_set)
        sums = functional.grad_dots(*given, found_inf=flag)
        assert bool(sums.isfinite().all()) == math.isfinite(value)
        assert flag.item() == max(is_set, float(not math.isfinite(value)))
        flag = torch.tensor(is_set)
        outs = [torch.zeros(size) for size in SIZES]
        weights = {"left_weight": 0.5, "right_weight": 0.5, "origin_weight": 0.5}
        norm = functional.combine_(outs, *given, **weights, found_inf=flag)
        assert bool(norm.isfinite()) == math.isfinite(value)
        assert flag.item() == max(is_set, float(not math.isfinite(value)))
        assert all(bool(out.any()) != bool(is_set) for out in outs)


def test_a_set_flag_leaves_everything_as_it_is_but_the_norm(backend: str) -> None:
    lefts, rights = randoms(2)
    expected = functional.combine_([x.clone() for x in lefts], lefts, rights, left_weight=2.0, right_weight=3.0)
    before = [x.clone() for x in lefts]
    norm = functional.combine_(lefts, lefts, rights, left_weight=2.0, right_weight=3.0, found_inf=torch.tensor(1.0))
    assert_same_bits("norm", [norm], [expected])
    assert_same_bits("lefts", lefts, before)


@pytest.mark.parametrize("magnitude", [1e25, 1.0, 1e-30, 1e-40])
@pytest.mark.parametrize("other", [1e25, 1.0, 1e-30])
def test_over_the_whole_range_of_float32(backend: str, magnitude: float, other: float) -> None:
    """Squares and products far outside of float32 are not: the sums are float64."""
    left, right = torch.full((10_000,), magnitude), torch.full((10_000,), -other)
    flag = torch.tensor(0.0)
    sums = functional.grad_dots([left], [right], found_inf=flag)
    a, b = left[0].double(), right[0].double()
    within = ((roundings_of(backend_of(backend), "grad_dots", [10_000]).terms or 0) + 2) * 2**-24
    torch.testing.assert_close(sums, 10_000 * torch.stack([a * a, a * b, b * b]), rtol=within, atol=0)
    assert flag.item() == 0.0
    out = [torch.zeros(10_000)]
    norm = functional.combine_(out, [left], [right], left_weight=0.5, right_weight=0.25)
    exact = (left.double() / 2 + right.double() / 4).norm()
    bound = norm_bound(exact, 10_000, roundings_of(backend_of(backend), "combine_", [10_000]).terms) + 2**-23 * exact
    assert (norm.double() - exact).abs() <= bound + 100 * 2**-149  # a result below the normal numbers has fewer digits


def test_dtypes_of_the_results(backend: str) -> None:
    wide = widest(backend)
    for dtype in (torch.bfloat16, torch.float32, wide):
        lefts, outs = [torch.ones(3), torch.ones(5)], [torch.zeros(3), torch.zeros(5, dtype=dtype)]
        sums = functional.grad_dots(lefts, outs)
        assert (sums.dtype, sums.shape) == (torch.float64, (3,))
        norm = functional.combine_(outs, lefts, lefts, left_weight=1.0, right_weight=1.0)
        assert (norm.dtype, norm.shape) == (wide if dtype is wide else torch.float32, ())
        assert norm.item() == pytest.approx(32**0.5, rel=1e-6)


def test_rows_of_several_backends_are_one_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device, where float64 rows go to another backend than the others."""
    usual, other = _dispatch.select("cpu"), backend_of("foreach")
    monkeypatch.setattr(_dispatch, "select", lambda device, dtypes=(): other if torch.float64 in dtypes else usual)
    lefts, rights = ([*tensors, torch.randn(40, dtype=torch.float64)] for tensors in randoms(2))
    left, right = flat(lefts), flat(rights)
    flag = torch.tensor(0.0)
    expected = torch.stack([left.dot(left), left.dot(right), right.dot(right)])
    torch.testing.assert_close(functional.grad_dots(lefts, rights, found_inf=flag), expected, rtol=1e-6, atol=1e-6)
    outs = [torch.zeros_like(x) for x in lefts]
    norm = functional.combine_(outs, lefts, rights, left_weight=0.5, right_weight=2.0, found_inf=flag)
    torch.testing.assert_close(norm, (0.5 * left + 2.0 * right).norm(), rtol=1e-6, atol=0)
    assert flag.item() == 0.0
    lefts[-1][3] = math.inf
    functional.combine_(outs, lefts, rights, left_weight=0.5, right_weight=2.0, found_inf=flag)
    assert flag.item() == 1.0
    functional.grad_dots(lefts, rights, found_inf=flag.zero_())
    assert flag.item() == 1.0


def test_parameters_that_require_gradients_know_that_they_were_written(backend: str) -> None:
    param, grad = torch.ones(5, requires_grad=True), torch.ones(5)
    version = param._version
    norm = functional.combine_([param], [param], [grad], left_weight=1.0, right_weight=-0.5)
    assert param._version > version
    assert param.is_leaf
    assert not norm.requires_grad
    assert param.tolist() == [0.5] * 5


@pytest.mark.parametrize("rho", [-0.05, torch.tensor(-0.05)])
def test_a_negative_radius_steps_against_the_gradient(backend: str, rho: float | Tensor) -> None:
    """The extragradient method (arXiv 2401.08060): x - rho g."""
    (params, grads), olds = randoms(2), [torch.zeros(size) for size in SIZES]
    expected = flat(params) - 0.05 * flat(grads)
    functional.perturb_(params, grads, olds, torch.tensor(3.0), rho=rho, lambd=0.0)
    torch.testing.assert_close(flat(params), expected, rtol=0, atol=1e-6)
    functional.restore_(params, olds)
    functional.perturb_(params, grads, olds, functional.grad_norm(grads), rho=rho)
    assert (flat(params) - flat(olds)).dot(flat(grads)).item() == pytest.approx(-0.05 * flat(grads).norm().item(), rel=1e-4)


WRONG = {
    "a sum": ("grad_dots", "origins", lambda call, op, lists: call(op, lists) * torch.tensor([1.0, 1.0, 1.0 + 1e-5])),
    "another sum": ("grad_dots", "plain", lambda call, op, lists: call(op, lists) * torch.tensor([1.0 + 1e-5, 1.0, 1.0])),
    "products": ("grad_dots", "plain", lambda call, op, lists: call(op, lists) * torch.tensor([1.0, 1.0 + 1e-4, 1.0])),
    "a weight": ("combine_", "origins", lambda call, op, lists: call(dataclasses.replace(op, origin_weight=0.9 + 1e-6), lists)),
    "a norm": ("combine_", "plain", lambda call, op, lists: call(op, lists) * (1 + 1e-6)),
    "written": ("combine_", "found_inf", lambda call, op, lists: call(dataclasses.replace(op, found_inf=None), lists)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_result_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The derived bounds are not so wide that they hold for anything."""
    op, option, wrong = WRONG[name]
    kind, functions = OPERATIONS[op], backend_of("foreach").operations
    assert check(op, ["foreach"], "float32", "odd_sizes", option)["foreach"].passed
    monkeypatch.setitem(functions, kind, functools.partial(wrong, functions[kind]))
    assert not check(op, ["foreach"], "float32", "odd_sizes", option)["foreach"].passed
