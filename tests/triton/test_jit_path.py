"""Triton's own launch path, from an operation to the launch, with the triton that is installed: what it cannot compile or bind fails here.

``make test`` runs this file with the pinned triton and with the oldest that is promised.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from sam_kernels.backends.triton._requirements import IS_INTERPRETED, REASON_MISSING, VERSION

REASON = REASON_MISSING or ("kernels are interpreted here, not compiled" if IS_INTERPRETED else None)
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

from bench.machine_code import launches, products  # noqa: E402 - after the skip
from bench.offline import compiling_only  # noqa: E402 - after the skip
from tests.helpers.pairwise import in_turns  # noqa: E402 - after the skip
from tests.optim.family import BASES, MEMBERS  # noqa: E402 - after the skip
from tests.triton.test_machine_code_sharpness import calls as sharpness_calls  # noqa: E402 - after the skip

STEPS = 3  # the first makes state, the second finds tables and averages of the first, the third is like all others


@pytest.fixture(autouse=True)
def _results_are_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels write nothing here, so what they are to write must not hold what was there before: it may be NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).zero_())


def test_the_version_that_was_asked_for() -> None:
    assert os.environ.get("SAM_KERNELS_EXPECT_TRITON", VERSION) == VERSION


@pytest.mark.parametrize("floor", ["lists", "per sample", "norms"])
def test_operations(floor: str) -> None:
    """So many calls that every kernel meets every dtype, and every argument every value and type."""
    calls = {"lists": launches.operation_calls, "per sample": products.calls, "norms": sharpness_calls}[floor]()
    few = launches.covering_calls(list(calls))
    with compiling_only() as launched:
        for call in few:
            launched.clear()
            call()
            assert launched


def plain(name: str, **options: Any) -> Callable[..., Any]:
    return lambda params, base, **kwargs: getattr(sam_kernels, name)(params, base, **{"rho": 0.05, **options, **kwargs})


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SAM": plain("SAM"),
    "USAM": plain("USAM"),
    "UnifiedSAM": plain("UnifiedSAM", lambd=0.5, max_grad_norm=1.0),
    "ASAM": plain("ASAM"),
    "capturable SAM": plain("SAM", capturable=True),
    **{name: member.make for name, member in MEMBERS.items()},
}


@pytest.mark.parametrize(("base", "name"), in_turns(("sgd-momentum", "adamw"), list(OPTIMIZERS)))
def test_steps(base: str, name: str) -> None:
    kind, options = BASES[base]
    if "sps" in name.lower():
        kind, options = BASES["sps-momentum"]
    assert_steps(lambda model: OPTIMIZERS[name](model.parameters(), kind, **options))


@pytest.mark.parametrize("norms", ["exact", "jvp"])
def test_steps_of_rwsam(norms: str) -> None:
    assert_steps(lambda model: sam_kernels.RWSAM(model, torch.optim.SGD, lr=0.1, rho=0.05, beta=0.5, norms=norms), is_reweighted=True)


def assert_steps(make: Callable[[Any], Any], *, is_reweighted: bool = False) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer, inputs = make(model), torch.randn(6, 8)

    def closure(batch: Tensor = inputs) -> Tensor:
        optimizer.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        return loss

    with compiling_only() as launched:
        found = []
        for _ in range(STEPS):
            launched.clear()
            if is_reweighted:
                optimizer.step(lambda: model(inputs).square().squeeze(1))
            else:
                optimizer.step(closure)
            found.append(list(launched))
    assert found[0]
    assert found[-1] == found[-2]
