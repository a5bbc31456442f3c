"""What is kept of a compiled kernel is launched as Triton would launch it, and never for arguments that Triton compiles anew for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import functional
from sam_kernels.backends.triton._requirements import IS_INTERPRETED, REASON_MISSING

REASON = REASON_MISSING or ("kernels are interpreted here, not compiled" if IS_INTERPRETED else None)
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

from bench import offline  # noqa: E402 - after the skip
from sam_kernels.backends.triton import _launch  # noqa: E402 - after the skip


def perturb(*, norm: Tensor | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> None:
    lists = [[torch.ones(5, dtype=dtype)] for _ in range(3)]
    functional.perturb_(*lists, torch.ones(()) if norm is None else norm, **{"rho": 0.1, **options})


def test_arguments_are_those_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(offline._Launcher, "__call__", lambda launcher, *args: found.append(args))
    lists = [[torch.ones(5)] for _ in range(3)]
    norm, rho = torch.ones(()), torch.tensor(0.1)
    with offline.compiling_only():
        for lambd in (0.5, 0.25):
            functional.perturb_(*lists, norm, rho=rho, lambd=lambd, eta=0.01, adaptive=True)
        assert len(_launch._compiled) == 1
    by_triton, by_us = found
    assert len(by_triton) == len(by_us)
    differing = [(a, b) for a, b in zip(by_triton, by_us, strict=True) if not (a is b or (not isinstance(a, Tensor) and a == b))]
    assert (0.5, 0.25) in differing
    tables = [(a, b) for a, b in differing if isinstance(a, Tensor)]  # made anew for lists that are not trusted
    assert all(a.shape == b.shape and a.dtype is b.dtype for a, b in tables)


@pytest.mark.parametrize(
    "other",
    [
        {"norm": torch.ones(2)[1]},  # no multiple of 16 bytes
        {"dtype": torch.bfloat16},
        {"rho": torch.tensor(0.1)},
        {"adaptive": True},
        {"found_inf": torch.zeros(())},
        {"rounding_seed": 7, "dtype": torch.bfloat16},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_triton_looks_at_is_told_apart(other: dict[str, Any]) -> None:
    with offline.compiling_only():
        perturb()
        before = set(_launch._compiled)
        perturb(**other)
        kept = set(_launch._compiled)
        perturb(**other)
        assert set(_launch._compiled) == kept
    assert len(kept - before) == 1
