"""What the compilers make of every Triton kernel, on processors that need not be here; and that each rule finds its fault when planted."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench.byte_model import OPS
from sam_kernels.backends.triton._requirements import IS_INTERPRETED, REASON_MISSING, VERSION

REASON = REASON_MISSING or ("kernels are interpreted here, not compiled" if IS_INTERPRETED else None)
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

from bench.gpu import limits  # noqa: E402 - after the skip
from bench.machine_code import generated, instructions, page  # noqa: E402 - after the skip
from bench.machine_code.compiled import Code, compile_variant  # noqa: E402 - after the skip
from bench.machine_code.launches import Variant, covering, recorded, records_of, timed_call  # noqa: E402 - after the skip
from bench.machine_code.rules import RULES, violations  # noqa: E402 - after the skip
from bench.machine_code.targets import TARGETS, reason_missing  # noqa: E402 - after the skip
from tests.helpers.machine_code import triton_digest, with_every_pair  # noqa: E402 - after the skip
from tests.helpers.shared import made_together  # noqa: E402 - after the skip

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "sam_kernels.backends.triton"
SM_90 = TARGETS["sm_90"]


@cache
def codes_of(target: str, is_full: bool) -> list[Code]:
    """The code of every kernel for a target: a minute or two, where nothing is kept of an earlier run."""
    work = page.work_of([target])
    if target == page.MAIN and not is_full:
        chosen = set(with_every_pair([variant for variant, _, _ in work]))
        work = [piece for piece in work if piece[0] in chosen or piece[2]]
    return made_together(
        "triton",
        work,
        lambda piece: triton_digest(piece, module=piece[0].module, kernel=piece[0].kernel),
        lambda piece: compile_variant(piece[0], TARGETS[piece[1]], disassemble=piece[2]),
    )


@pytest.fixture(scope="module")
def variants() -> list[Variant]:
    return recorded()


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_keeps(is_full: bool, rule: str, target: str) -> None:
    if (reason := reason_missing(target)) is not None:
        pytest.skip(reason)
    found = codes_of(target, is_full)
    assert found
    assert [text for code in found for text in violations(code, rule)] == []


@pytest.mark.slow
@pytest.mark.parametrize("op", ["random_perturb_", "adamw_step_"])  # where they count most
def test_instructions_are_as_many_as_the_bars_count(op: str) -> None:
    """Up to what another version of Triton may change."""
    assert instructions.of_triton(op) == pytest.approx(limits.INSTRUCTIONS["triton"][op], rel=0.05)


@pytest.mark.slow
def test_the_page_is_up_to_date(is_full: bool) -> None:
    """Without --full: every number of the other targets, and of the main one that what was compiled lies within what is written."""
    pinned = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    if pinned[1] != VERSION:
        pytest.skip(f"the page is about triton {pinned[1]}, this is {VERSION}")
    written = generated.between_markers(generated.PAGE.read_text(encoding="utf-8"), page.PART)
    found = page.tables([code for name in TARGETS if reason_missing(name) is None for code in codes_of(name, is_full)])
    advice = f"docs/kernels.md is not what the code gives now; run: {page.COMMAND}"
    if is_full:
        assert written == found, advice
        return
    theirs, ours = sections_of(written), sections_of(found)
    others = theirs.keys() - {page.MAIN}
    assert {name: theirs[name] for name in others} == {name: text for name, text in ours.items() if name != page.MAIN}, advice
    rows = zip(rows_of(ours[page.MAIN]), rows_of(theirs[page.MAIN]), strict=True)
    assert [f"{row} beside {wider}" for row, wider in rows if not lies_within(row, wider)] == [], advice
    numbers = Counter((f"`{variant.kernel}`", variant.dtype or "–") for variant in recorded())
    assert numbers == {(row[0], row[1]): int(row[2]) for row in rows_of(theirs[page.MAIN])}, advice


def sections_of(tables: str) -> dict[str, str]:
    """The table of each target by its name, and what stands before the first under no name."""
    first, *others = tables.strip().split("#### ")
    return {"": first.strip()} | {text.partition(":")[0]: text.partition("\n\n")[2].strip() for text in others}


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def lies_within(row: list[str], wider: list[str]) -> bool:
    """Kernel and storage are alike, a span of numbers lies within the other, of several widths each is one of the others."""
    (kernel, fused), (kernel_there, fused_there) = (((each[0], each[1]), each[10]) for each in (row, wider))
    spans = [span_of(ours) <= span_of(theirs) for ours, theirs in zip(row[3:4] + row[6:10], wider[3:4] + wider[6:10], strict=True)]
    widths = [widths_of(ours) <= widths_of(theirs) for ours, theirs in zip(row[4:6], wider[4:6], strict=True)]
    return kernel == kernel_there and fused in ("no", fused_there) and all(spans) and all(widths)


@dataclass(frozen=True)
class Span:
    first: float
    last: float

    def __le__(self, other: Span) -> bool:
        return other.first <= self.first and self.last <= other.last


def span_of(cell: str) -> Span:
    """ "–" alone is no number at all."""
    numbers = [float(number) for number in cell.split("–") if number] or [0.0]
    return Span(numbers[0], numbers[-1])


def widths_of(cell: str) -> set[str]:
    return set(re.findall(r"\d+", cell))


WIDER = ["`k`", "fp32", "5", "8–16", "128", "32, 16", "20–30", "0", "0–16", "1024–2048", "yes"]
WITHIN = ["`k`", "fp32", "2", "8", "128", "32", "20–24", "0", "16", "2048", "no"]


@pytest.mark.parametrize(
    ("column", "cell"), [(0, "`m`"), (1, "fp16"), (3, "4–8"), (4, "64"), (5, "8"), (6, "19–24"), (6, "24–31"), (7, "4"), (10, "maybe")]
)
def test_a_row_that_is_not_within_another_is_found(column: int, cell: str) -> None:
    assert lies_within(WITHIN, WIDER)
    assert not lies_within([*WITHIN[:column], cell, *WITHIN[column + 1 :]], WIDER)


def test_every_kernel_is_recorded(variants: list[Variant]) -> None:
    sources = (ROOT / "sam_kernels" / "backends" / "triton").glob("*.py")
    written = {name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE)}
    assert {variant.kernel for variant in variants} == written


def test_a_few_variants_cover_all(variants: list[Variant]) -> None:
    few = covering(variants)
    assert len(few) < len(variants) / 4
    for features_of in (_kernel_and_dtype, _constants, _types):
        assert set().union(*map(features_of, few)) == set().union(*map(features_of, variants))


def _kernel_and_dtype(variant: Variant) -> set[Any]:
    return {(variant.kernel, variant.dtype)}


def _constants(variant: Variant) -> set[Any]:
    return {(variant.kernel, name, str(value)) for name, value in variant.values}


def _types(variant: Variant) -> set[Any]:
    return {(variant.kernel, *argument) for argument in variant.signature}


@pytest.mark.parametrize("op", OPS)
def test_a_kernel_moves_the_bytes_of_the_model(op: str) -> None:
    (variant,) = [variant for variant in records_of(timed_call(op)) if variant.walks_chunks]
    code = compile_variant(variant, SM_90)
    assert code.bytes_per_element == 4 * OPS[op].passes


@dataclass(frozen=True)
class Fault:
    """A line of the backend and what it is changed to; a kernel in which that is to be found, and by which rule."""

    file: str
    old: str
    new: str
    kernel: str
    rule: str
    constants: dict[str, str] = field(default_factory=dict)  # of the variant


_START = "tl.load(work_chunks + program).to(tl.int64) * chunk_size"
_NARROW_START = _START.replace(".to(tl.int64)", "")
_SAVE = "store(old_param, offsets, count, stored, MASKED)"
FAULTS = {
    "no operand is known to be aligned": Fault(
        "_blocks.py", "tl.multiple_of(address.to(tl.pointer_type(DTYPE)) + start, 16)", "plain", "_perturb_kernel", "full_blocks_are_wide"
    ),
    "one operand is not": Fault(
        "_blocks.py",
        "_with(plain, pointer), _with(aligned, aligned_pointer)",
        "_with(plain, pointer), _with(aligned, pointer)",
        "_perturb_kernel",
        "full_blocks_are_wide",
    ),
    "full blocks are masked": Fault(
        "norm.py", "ADAPTIVE, SCALED, False)", "ADAPTIVE, SCALED, True)", "_norm_kernel", "full_blocks_are_wide"
    ),
    "full blocks forget an operand": Fault("perturb.py", _SAVE, f"if MASKED: {_SAVE}", "_perturb_kernel", "masked_blocks_do_the_same"),
    "a start in 32 bits": Fault("_blocks.py", _START, _NARROW_START, "_perturb_kernel", "addresses_are_64_bit"),
    "extended too late": Fault("_blocks.py", _START, f"({_NARROW_START}).to(tl.int64)", "_sgd_kernel", "addresses_are_64_bit"),
    "a number in float64": Fault("perturb.py", "p + d * scale", "p + d * scale.to(tl.float64)", "_perturb_kernel", "no_double"),
    "a number read as float64 and left so": Fault(
        "perturb.py", "load_number(rho).to(tl.float32)", "load_number(rho)", "_perturb_kernel", "no_double", {"one_minus_lambd": "None"}
    ),
}


def planted(folder: Path, fault: Fault) -> str:
    """A copy of the backend under another name, with one fault in it."""
    name = f"planted_{folder.name}"
    shutil.copytree(ROOT / "sam_kernels" / "backends" / "triton", folder / name)
    for path in (folder / name).rglob("*.py"):
        path.write_text(path.read_text(encoding="utf-8").replace(PACKAGE, name), encoding="utf-8")
    path = folder / name / fault.file
    text = path.read_text(encoding="utf-8")
    assert fault.old in text, f"{fault.file} has changed: plant the fault anew"
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    return name


def one(variants: list[Variant], kernel: str, dtype: str, **constants: str) -> Variant:
    """The first variant of a kernel with these storage types."""
    wanted = constants.items()
    return next(v for v in variants if (v.kernel, v.dtype) == (kernel, dtype) and wanted <= {n: str(c) for n, c in v.values}.items())


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(variants: list[Variant], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    variant = one(variants, fault.kernel, "fp32", **fault.constants)
    assert violations(compile_variant(variant, SM_90, disassemble=True)) == []
    monkeypatch.syspath_prepend(tmp_path)
    faulty = replace(variant, module=variant.module.replace(PACKAGE, planted(tmp_path, fault)))
    assert violations(compile_variant(faulty, SM_90), fault.rule)


def with_constants(variant: Variant, **values: Any) -> Variant:
    return replace(variant, constants=tuple((name, values.get(name, value)) for name, value in variant.constants))


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("nothing_is_contracted", lambda variant: replace(variant, fp_fusion=True)),
        ("nothing_is_spilled", lambda variant: with_constants(replace(variant, num_warps=1), BLOCK_SIZE=4096)),
        ("enough_threads_fit", lambda variant: with_constants(variant, BLOCK_SIZE=8192)),
        ("no_element_changes_hands", lambda variant: with_constants(variant, BLOCK_SIZE=2048)),
        ("full_blocks_are_wide", lambda variant: with_constants(variant, BLOCK_SIZE=256)),
    ],
)
def test_a_wrong_setting_is_found(variants: list[Variant], rule: str, change: Callable[[Variant], Variant]) -> None:
    variant = one(variants, "_adamw_kernel", "mixed", **{"DTYPES[0]": "fp32", "DTYPES[1]": "bf16"})
    assert violations(compile_variant(variant, SM_90), rule) == []
    assert violations(compile_variant(change(variant), SM_90), rule)


def test_amd_accesses_are_counted(variants: list[Variant]) -> None:
    """Four elements of a 16-bit type a thread, as with as many wavefronts of 64 threads as there are warps of 32, are too few."""
    if (reason := reason_missing("gfx942")) is not None:
        pytest.skip(reason)
    variant = one(variants, "_adamw_kernel", "bf16")
    assert violations(compile_variant(variant, TARGETS["gfx942"])) == []
    assert violations(compile_variant(replace(variant, num_warps=8), TARGETS["gfx942"]), "full_blocks_are_wide")
