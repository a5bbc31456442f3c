"""``master_weights=True``: steps are those of float32 parameters, and a 16-bit parameter is its master, rounded once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sam_kernels import SAM
from sam_kernels.optim._engine import masters
from tests.helpers.compare import assert_same_bits
from tests.optim.master_problem import assert_rounded, params_of, run, saved_masters_of

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
BASES: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": functools.partial(torch.optim.Adam, lr=0.1, weight_decay=0.1),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
    "amsgrad": functools.partial(torch.optim.AdamW, lr=0.1, amsgrad=True),  # not fused, as what follows
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.1),  # makes its state when it is constructed
}


@DTYPES
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("options", [{}, {"adaptive": True, "eta": 0.01, "max_grad_norm": 1.0}], ids=["sam", "asam"])
def test_steps_are_those_of_float32_parameters(base: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    expected, params = params_of(torch.float32), params_of(dtype)
    plain = SAM(expected, BASES[base], rho=0.5, lambd=0.7, **options)
    optimizer = SAM(params, BASES[base], rho=0.5, lambd=0.7, master_weights=True, **options)
    run(plain, expected)
    run(optimizer, params)
    assert_same_bits("masters", saved_masters_of(optimizer), expected)
    assert_rounded(params, saved_masters_of(optimizer))
    for param, right in zip(params, expected, strict=True):
        for key, value in plain.state[right].items():
            assert_same_bits(key, [optimizer.state[param][key]], [value])


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop])
def test_a_step_without_an_ascent_goes_to_the_masters(base: type[torch.optim.Optimizer]) -> None:
    """Updates of 1e-4 or less, of which bfloat16 would lose every one: next to 1 its numbers are 4e-3 apart."""
    expected, params = ([nn.Parameter(torch.ones(3, dtype=dtype))] for dtype in (torch.float32, torch.bfloat16))
    for each, has_masters in ((expected, False), (params, True)):
        optimizer = SAM(each, base, rho=0.0, lr=1e-5, master_weights=has_masters)
        for _ in range(400):
            each[0].grad = torch.full_like(each[0], 8.0)
            optimizer.step()
    assert params[0].max() < 1.0
    assert_same_bits("params", params, [param.to(torch.bfloat16) for param in expected])


@pytest.mark.parametrize("piece", [64, 2**20])
def test_masters_follow_what_is_written_in_any_slice(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masters, "_PIECE", piece)
    params = [nn.Parameter(torch.full(shape, 1.01, dtype=torch.bfloat16)) for shape in ((5, 100), (0, 3), ())]
    optimizer = SAM(params, torch.optim.SGD, lr=1e-4, rho=0.0, master_weights=True)

    def step() -> None:
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()

    step()
    before = [master.clone() for master in saved_masters_of(optimizer)]
    with torch.no_grad():
        params[0][1, 2] = params[0][4, 99] = 2.0
        params[2].fill_(3.0)
    with pytest.warns(UserWarning, match="2 of 3 parameters of a group were written"):
        step()
    expected = before[0].clone()
    expected[1, 2] = expected[4, 99] = 2.0
    assert_same_bits("masters", saved_masters_of(optimizer), [expected - 1e-4, before[1], torch.tensor(3.0) - 1e-4])
