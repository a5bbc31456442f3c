"""The last program of a launch finds what the others have stored: in the order of instructions, for processors that need not be here."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sam_kernels.backends.triton._requirements import IS_INTERPRETED, REASON_MISSING

REASON = REASON_MISSING or ("kernels are interpreted here, not compiled" if IS_INTERPRETED else None)
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

from bench.machine_code.compiled import build  # noqa: E402 - after the skip
from bench.machine_code.launches import Variant, records_of  # noqa: E402 - after the skip
from bench.machine_code.targets import TARGETS  # noqa: E402 - after the skip
from sam_kernels import functional  # noqa: E402 - after the skip
from tests.triton.test_machine_code import PACKAGE, Fault, planted  # noqa: E402 - after the skip

ROWS = [torch.ones(4096), torch.ones(100)]
CALLS = {
    "_norm_kernel": lambda: functional.grad_norm_(torch.zeros(()), ROWS, found_inf=torch.zeros(()), skipped=torch.zeros(())),
    "_direction_kernel": lambda: functional.direction_norm_(ROWS, [row.clone() for row in ROWS], kind="vasso"),
    "_combine_kernel": lambda: functional.combine_(ROWS, ROWS, ROWS, left_weight=0.5, right_weight=0.5, found_inf=torch.zeros(())),
}
_ATOMIC, _STORE, _BARRIER = r"atom\.global\.(\S+)", r"st\.global", r"bar\.sync"
_SUM = r"ld\.global\.cg\.b32"


def wrong_order(ptx: str) -> list[str]:
    """What is missing: a barrier, a ticket that releases and acquires for the whole device, a barrier, loads past the first-level cache."""
    marks = re.findall(rf"{_ATOMIC}|({_STORE})|({_BARRIER})|({_SUM})|(ld\.global\.b32)", ptx)
    kinds = ["atomic " + atomic if atomic else next(filter(None, rest)) for atomic, *rest in marks]
    tickets = [i for i, kind in enumerate(kinds) if "acq_rel" in kind]
    if len(tickets) != 1 or "gpu" not in kinds[tickets[0]]:
        return ["one ticket with release and acquire semantics for the whole device"]
    before, after = kinds[: tickets[0]], kinds[tickets[0] + 1 :]
    stored = max((i for i, kind in enumerate(before) if kind == "st.global"), default=-1)
    sums = [i for i, kind in enumerate(after) if "ld.global.cg" in kind]
    found = [] if "bar.sync" in before[stored + 1 :] and stored >= 0 else ["a barrier between the sum and the ticket"]
    found += [] if sums and "bar.sync" in after[: sums[0]] else ["sums read past the first-level cache, after a barrier"]
    return found


@pytest.fixture(scope="module")
def variants() -> dict[str, Variant]:
    return {variant.kernel: variant for variant in records_of(*CALLS.values())}


def ptx_of(variant: Variant, target: str = "sm_90") -> str:
    text: str = build(variant, TARGETS[target]).asm["ptx"]
    return text


@pytest.mark.parametrize("kernel", CALLS)
def test_sums_are_stored_before_the_ticket_and_read_after_it(variants: dict[str, Variant], kernel: str) -> None:
    assert wrong_order(ptx_of(variants[kernel])) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")', 'tl.atomic_add(counter, 1, sem="relaxed", scope="gpu")'),
        ('tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")', 'tl.atomic_add(counter, 1, sem="acq_rel", scope="cta")'),
        (', cache_modifier=".cg")', ")"),
    ],
    ids=["a relaxed ticket", "a ticket of the block", "sums out of any cache"],
)
def test_a_planted_fault_is_found(
    variants: dict[str, Variant], old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    variant = variants["_norm_kernel"]
    name = planted(tmp_path, Fault("_finish.py", old, new, variant.kernel, ""))
    assert wrong_order(ptx_of(replace(variant, module=variant.module.replace(PACKAGE, name))))
