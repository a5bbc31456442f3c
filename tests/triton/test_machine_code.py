"""What the compilers make of every Triton kernel, on processors that need not be here; and that each rule finds its fault when planted."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.byte_model import OPS
from sam_kernels.backends import triton as backend

REASON = backend.REASON_MISSING or ("kernels are interpreted here, not compiled" if backend.IS_INTERPRETED else None)
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

from bench.machine_code import page  # noqa: E402
from bench.machine_code.compiled import Code, compile_variant  # noqa: E402
from bench.machine_code.launches import Variant, covering, recorded, records_of, timed_call  # noqa: E402
from bench.machine_code.rules import RULES, violations  # noqa: E402
from bench.machine_code.targets import TARGETS  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "sam_kernels.backends.triton"
SM_90 = TARGETS["sm_90"]


@pytest.fixture(scope="module")
def codes() -> list[Code]:
    """The code of every kernel for every target: one to three minutes."""
    return page.codes_of(TARGETS)


@pytest.fixture(scope="module")
def variants() -> list[Variant]:
    return recorded()


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_every_kernel_keeps(codes: list[Code], rule: str) -> None:
    assert [text for code in codes for text in violations(code, rule)] == []


@pytest.mark.slow
def test_the_page_is_up_to_date(codes: list[Code]) -> None:
    pinned = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    if backend.VERSION != pinned[1]:
        pytest.skip(f"the page is about triton {pinned[1]}, this is {backend.VERSION}")
    written = page.between_markers(page.PAGE.read_text(encoding="utf-8"))
    assert written == page.tables(codes), f"docs/kernels.md is not what the code gives now; run: {page.COMMAND}"


def test_every_kernel_is_recorded(variants: list[Variant]) -> None:
    sources = (ROOT / "sam_kernels" / "backends" / "triton").glob("*.py")
    written = {name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE)}
    assert {variant.kernel for variant in variants} == written


def test_a_few_variants_cover_all(variants: list[Variant]) -> None:
    few = covering(variants)
    assert len(few) < len(variants) / 4
    for feature in (
        lambda v: (v.kernel, v.dtype),
        lambda v: {(v.kernel, str(c)) for c in v.constants},
        lambda v: {(v.kernel, a) for a in v.signature},
    ):
        assert _all_of(feature, few) == _all_of(feature, variants)


def _all_of(feature: Callable[[Variant], Any], variants: list[Variant]) -> set[Any]:
    found = (feature(variant) for variant in variants)
    return {item for value in found for item in (value if isinstance(value, set) else {value})}


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_moves_the_bytes_of_the_model(op: str) -> None:
    (variant,) = [variant for variant in records_of(timed_call(op)) if variant.walks_chunks]
    code = compile_variant(variant, SM_90)
    assert max(loop.bytes_per_element for loop in code.full_loops) == 4 * OPS[op].passes


def planted(folder: Path, file: str, old: str, new: str) -> str:
    """A copy of the backend under another name, with one change in it."""
    name = f"planted_{folder.name.replace('-', '_')}"
    shutil.copytree(ROOT / "sam_kernels" / "backends" / "triton", folder / name)
    for path in (folder / name).glob("*.py"):
        path.write_text(path.read_text(encoding="utf-8").replace(PACKAGE, name), encoding="utf-8")
    path = folder / name / file
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{file} has changed: plant the fault anew"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return name


def one(variants: list[Variant], kernel: str, dtype: str, **constants: Any) -> Variant:
    return next(v for v in variants if (v.kernel, v.dtype) == (kernel, dtype) and constants.items() <= dict(v.constants).items())


FAULTS = {
    "no operand is known to be aligned": (
        "_blocks.py", "tl.multiple_of(address.to(tl.pointer_type(DTYPE)) + start, 16)", "address.to(tl.pointer_type(DTYPE)) + start",
        "_perturb_kernel", "full_blocks_are_wide",
    ),
    "one operand is not": ("perturb.py", "_perturb_block(aligned_param, aligned_grad,", "_perturb_block(aligned_param, grad,", "_perturb_kernel", "full_blocks_are_wide"),
    "a load is masked for nothing": (
        "norm.py", "(aligned_grad, aligned_param, block + offsets, count, eta, factor, sums, ADAPTIVE, SCALED, False)",
        "(aligned_grad, aligned_param, block + offsets, count, eta, factor, sums, ADAPTIVE, SCALED, True)", "_norm_kernel", "full_blocks_are_wide",
    ),
    "full blocks forget an operand": (
        "perturb.py", "        store(old_param, offsets, count, stored, MASKED)", "        if MASKED:\n            store(old_param, offsets, count, stored, MASKED)",
        "_perturb_kernel", "masked_blocks_do_the_same",
    ),
    "a chunk's start in 32 bits": ("_blocks.py", ".to(tl.int64) * CHUNK_SIZE", " * CHUNK_SIZE", "_perturb_kernel", "addresses_are_64_bit"),
    "extended too late": ("_blocks.py", ".to(tl.int64) * CHUNK_SIZE", ".to(tl.int32) * CHUNK_SIZE).to(tl.int64", "_sgd_kernel", "addresses_are_64_bit"),
    "a number in float64": ("perturb.py", "p + g * scale", "p + g * scale.to(tl.float64)", "_perturb_kernel", "no_double"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(variants: list[Variant], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, old, new, kernel, rule = FAULTS[fault]
    if fault == "extended too late":
        old, new = "tl.load(work_chunks + program)" + old, "(tl.load(work_chunks + program)" + new + ")"
    variant = one(variants, kernel, "fp32")
    assert violations(compile_variant(variant, SM_90, disassemble=True)) == []
    monkeypatch.syspath_prepend(tmp_path)
    name = planted(tmp_path, file, old, new)
    faulty = compile_variant(replace(variant, module=variant.module.replace(PACKAGE, name)), SM_90)
    assert violations(faulty, rule)


def with_constants(variant: Variant, **values: Any) -> Variant:
    return replace(variant, constants=tuple((name, values.get(name, value)) for name, value in variant.constants))


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("nothing_is_contracted", lambda variant: replace(variant, fp_fusion=True)),
        ("nothing_is_spilled", lambda variant: with_constants(replace(variant, num_warps=1), BLOCK_SIZE=8192)),
        ("half_of_the_threads_fit", lambda variant: with_constants(variant, BLOCK_SIZE=8192)),
        ("no_element_changes_hands", lambda variant: with_constants(variant, BLOCK_SIZE=2048)),
        ("full_blocks_are_wide", lambda variant: with_constants(variant, BLOCK_SIZE=256)),
    ],
)
def test_a_wrong_setting_is_found(variants: list[Variant], rule: str, change: Callable[[Variant], Variant]) -> None:
    variant = one(variants, "_adamw_kernel", "mixed", PARAM=one(variants, "_copy_kernel", "fp32").constant("SOURCE"))
    assert violations(compile_variant(variant, SM_90), rule) == []
    assert violations(compile_variant(change(variant), SM_90), rule)


def test_amd_accesses_are_counted(variants: list[Variant]) -> None:
    """Four elements of a 16-bit type a thread, as with as many wavefronts of 64 threads as there are warps of 32, are too few."""
    variant = one(variants, "_adamw_kernel", "bf16")
    assert violations(compile_variant(variant, TARGETS["gfx942"])) == []
    assert violations(compile_variant(replace(variant, num_warps=8), TARGETS["gfx942"]), "full_blocks_are_wide")
