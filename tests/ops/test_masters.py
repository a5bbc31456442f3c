"""float32 masters of 16-bit parameters: every operation computes with the master's value, and rounds it to the parameter once."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import functional
from sam_kernels._tensor_list import TensorList
from sam_kernels.validation.backends import backend_of
from tests.helpers.compare import assert_same_bits
from tests.helpers.compiling import compiled

NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
SIZES = (5, 1030, 300)
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "maximize": True}
ADAM = {"lr": 0.1, "weight_decay": 0.1, "maximize": True}
ONE = torch.tensor(1.0)
SEED = 2**40 + 3


def randoms() -> list[Tensor]:
    return [torch.randn(size) for size in SIZES]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def poisoned(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [torch.full_like(tensor, math.nan, dtype=dtype) for tensor in tensors]


def rounded(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype) for tensor in tensors]


def update(op: str, params: list[Tensor], grads: list[Tensor], **options: Any) -> list[Tensor]:
    """A step with the same state every time; returns the state after it."""
    generator = torch.Generator().manual_seed(3)
    first, second = ([torch.randn(size, generator=generator) for size in SIZES] for _ in range(2))
    if op == "sgd_step_":
        functional.sgd_step_(params, grads, first, **{**SGD, **options})  # type: ignore[arg-type]  # no buffer is None
        return first
    squares, steps = [tensor.square() for tensor in second], [torch.tensor(3.0) for _ in SIZES]
    functional.adamw_step_(params, grads, first, squares, steps, **{**ADAM, **options})
    return [*first, *squares, *steps]


UPDATES = pytest.mark.parametrize("op", ["sgd_step_", "adamw_step_"])


@NARROW
@UPDATES
def test_masters_take_the_float32_step_and_parameters_are_their_rounding(backend: str, op: str, dtype: torch.dtype) -> None:
    masters, grads = randoms(), rounded(randoms(), dtype)
    expected = copies(masters)
    state = update(op, expected, rounded(grads, torch.float32))
    params = poisoned(masters, dtype)
    found = update(op, params, grads, old_params=masters, to_old=True)
    assert_same_bits("masters", masters, expected)
    assert_same_bits("state", found, state)
    assert_same_bits("params", params, rounded(masters, dtype))


@NARROW
@pytest.mark.parametrize("options", [{}, {"adaptive": True, "eta": 0.01}, {"found_inf": torch.tensor(1.0)}], ids=str)
def test_the_ascent_from_masters_is_rounded_once(backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    masters, grads = randoms(), rounded(randoms(), dtype)
    expected, params, before = poisoned(masters, torch.float32), poisoned(masters, dtype), copies(masters)
    functional.perturb_(expected, rounded(grads, torch.float32), masters, ONE, rho=0.3, lambd=0.4, from_old=True, **options)
    functional.perturb_(params, grads, masters, ONE, rho=0.3, lambd=0.4, from_old=True, **options)
    assert_same_bits("params", params, rounded(expected, dtype))
    assert_same_bits("masters", masters, before)
    functional.restore_(params, masters)
    assert_same_bits("restored", params, rounded(masters, dtype))
    functional.random_perturb_(params, masters, seed=1, scale=0.1, distribution="rademacher", from_old=True)
    functional.random_perturb_(expected, masters, seed=1, scale=0.1, distribution="rademacher", from_old=True)
    assert_same_bits("randomly perturbed", params, rounded(expected, dtype))


@NARROW
@UPDATES
@pytest.mark.parametrize("skip", [{"found_inf": torch.tensor(1.0)}, {"norm": torch.tensor(math.inf)}], ids=["found_inf", "norm"])
def test_a_skipped_step_rounds_the_masters(backend: str, op: str, dtype: torch.dtype, skip: dict[str, Tensor]) -> None:
    """To nearest, whatever the seed."""
    masters, grads = randoms(), poisoned(randoms(), dtype)
    before, params = copies(masters), poisoned(masters, dtype)
    seed = SEED if dtype is torch.bfloat16 else None
    state = update(op, params, grads, old_params=masters, to_old=True, rounding_seed=seed, **skip)
    assert_same_bits("masters", masters, before)
    assert_same_bits("params", params, rounded(before, dtype))
    untouched = update(op, copies(before), rounded(randoms(), torch.float32), **skip)
    assert_same_bits("state", state, untouched)


def test_a_buffer_beside_masters_is_float32(backend: str) -> None:
    masters, grads = randoms(), rounded(randoms(), torch.bfloat16)
    buffers: list[Tensor | None] = [None, torch.zeros(SIZES[1], dtype=torch.bfloat16), None]
    functional.sgd_step_(poisoned(masters, torch.bfloat16), grads, buffers, old_params=masters, to_old=True, lr=0.1, momentum=0.9)
    assert [None if buffer is None else buffer.dtype for buffer in buffers] == [torch.float32, torch.bfloat16, torch.float32]
    assert_same_bits("the first buffer", [buffers[0]], rounded(grads[:1], torch.float32))
    without: list[Tensor | None] = [None] * 3
    functional.sgd_step_(rounded(masters, torch.bfloat16), grads, without, old_params=masters, lr=0.1, momentum=0.9)
    assert {buffer.dtype for buffer in without if buffer is not None} == {torch.bfloat16}


@pytest.mark.parametrize("with_masters", [True, False])
def test_descent_and_ascent_round_by_the_same_words(backend: str, with_masters: bool) -> None:
    """A step by a power of two is the float32 sum that the ascent makes with rho = -lr. Another seed gives other bits. Without masters, one
    row is float32."""
    dtypes = [torch.bfloat16, torch.bfloat16 if with_masters else torch.float32, torch.bfloat16]
    masters = [master if with_masters else master.to(dtype) for master, dtype in zip(randoms(), dtypes, strict=True)]
    grads = rounded(randoms(), torch.bfloat16)
    ascended = [torch.zeros_like(master, dtype=dtype) for master, dtype in zip(masters, dtypes, strict=True)]
    functional.perturb_(ascended, grads, masters, ONE, rho=-(2.0**-5), lambd=0.0, from_old=True, rounding_seed=SEED)
    found = []
    for seed in (SEED, SEED + 1):
        stepped = poisoned(masters, torch.bfloat16) if with_masters else [torch.zeros_like(tensor) for tensor in ascended]
        functional.sgd_step_(stepped, grads, None, old_params=copies(masters), to_old=with_masters, lr=2.0**-5, rounding_seed=seed)
        found.append(stepped)
    assert_same_bits("params", found[0], ascended)
    assert not torch.equal(found[1][2], found[0][2])


@pytest.mark.parametrize("is_trusted", [False, True])
def test_rows_of_a_first_step_keep_their_words(backend: str, is_trusted: bool) -> None:
    """With zeros for buffers every row takes the plain step, whichever rows make their first."""
    masters, grads = randoms(), rounded(randoms(), torch.bfloat16)
    plain, mixed = poisoned(masters, torch.bfloat16), poisoned(masters, torch.bfloat16)
    functional.sgd_step_(plain, grads, None, old_params=copies(masters), to_old=True, lr=0.25, rounding_seed=SEED)
    olds, buffers = copies(masters), [torch.zeros(size) for size in SIZES]
    gaps: Any = TensorList(buffers) if is_trusted else [buffers[0], None, buffers[2]]
    lists = [TensorList(mixed), TensorList(grads), TensorList(olds)] if is_trusted else [mixed, grads, olds]
    functional.sgd_step_(lists[0], lists[1], gaps, old_params=lists[2], to_old=True, lr=0.25, momentum=0.5, rounding_seed=SEED)
    assert_same_bits("params", mixed, plain)


@UPDATES
def test_rounding_is_to_a_neighbour_of_the_master(backend: str, op: str) -> None:
    masters, grads = randoms(), rounded(randoms(), torch.bfloat16)
    expected, params = copies(masters), poisoned(masters, torch.bfloat16)
    update(op, expected, rounded(grads, torch.float32))
    update(op, params, grads, old_params=masters, to_old=True, rounding_seed=SEED)
    assert_same_bits("masters", masters, expected)  # are not rounded so
    for param, master in zip(params, masters, strict=True):
        below = (master.view(torch.int32) & -0x10000).view(torch.float32)
        above = ((master.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
        assert ((param.float() == below) | (param.float() == above)).all()
    assert not torch.equal(params[1], masters[1].to(torch.bfloat16))


@UPDATES
def test_a_float64_state_rounds_to_the_rounding_of_the_master(backend: str, op: str) -> None:
    if backend_of(backend).dtypes is not None:
        pytest.skip(f"backend {backend} has no kernels for float64")
    masters, grads = randoms(), rounded(randoms(), torch.bfloat16)
    params, states = poisoned(masters, torch.bfloat16), [[torch.rand(size, dtype=torch.float64) for size in SIZES] for _ in range(2)]
    if op == "sgd_step_":
        functional.sgd_step_(params, grads, states[0], old_params=masters, to_old=True, **SGD)  # type: ignore[arg-type]
    else:
        steps = [torch.tensor(0.0) for _ in SIZES]
        functional.adamw_step_(params, grads, *states, steps, old_params=masters, to_old=True, **ADAM)
    assert_same_bits("params", params, rounded(masters, torch.bfloat16))


def test_masters_laid_out_otherwise_than_their_parameters(backend: str) -> None:
    """They are computed in dense copies, and written back."""
    shape = (2, 3, 4, 5)
    master = torch.randn(shape).to(memory_format=torch.channels_last)
    grad, param, before = torch.randn(shape).to(torch.bfloat16), torch.zeros(shape, dtype=torch.bfloat16), master.clone()
    functional.sgd_step_([param], [grad], None, old_params=[master], to_old=True, lr=0.5)
    assert_same_bits("master", [master], [before - 0.5 * grad.float()])
    assert_same_bits("param", [param], [master.to(torch.bfloat16)])


@UPDATES
def test_without_to_old_backups_are_only_read(backend: str, op: str) -> None:
    """So they may share memory, with each other or with what is written."""
    params, grads = randoms(), randoms()
    expected = copies(params)
    update(op, expected, grads)
    update(op, params, grads, old_params=params)
    assert_same_bits("params", params, expected)


@pytest.mark.usefixtures("fresh_dynamo")
@UPDATES
def test_compiled_steps_write_masters(backend: str, op: str) -> None:
    """Functionalized, where what a schema does not mark is not written."""
    results = []
    for is_compiled in (True, False):
        torch.manual_seed(5)
        masters, grads = randoms(), rounded(randoms(), torch.bfloat16)
        params = poisoned(masters, torch.bfloat16)

        def step(params: list[Tensor], masters: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
            doubled = [master * 2 for master in masters]
            if op == "sgd_step_":
                buffers: list[Tensor | None] = [None, None, None]
                functional.sgd_step_(params, grads, buffers, old_params=doubled, to_old=True, rounding_seed=SEED, **SGD)
                state = [buffer for buffer in buffers if buffer is not None]
            else:
                state = [torch.zeros_like(master) for master in [*masters, *masters]]
                steps = [torch.zeros(()) for _ in masters]
                functional.adamw_step_(params, grads, state[:3], state[3:], steps, old_params=doubled, to_old=True, **ADAM)
            return [*doubled, *state]

        made = (compiled(step, "aot_eager") if is_compiled else step)(params, masters, grads)
        results.append([*params, *made])
    assert [tensor.dtype for tensor in results[0]] == [tensor.dtype for tensor in results[1]]
    assert_same_bits("compiled", *results)
