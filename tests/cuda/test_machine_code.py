"""What nvcc makes of every CUDA kernel, for processors that need not be here; and that each rule finds its fault when planted."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from bench.gpu import limits
from bench.machine_code import _sass, cuda, cuda_page, generated, instructions
from bench.machine_code.cuda import ARCHITECTURES, Kernel
from bench.machine_code.cuda_rules import RULES, least_threads, resident_threads, violations
from tests.helpers.machine_code import cuda_kernels

if (REASON := cuda.reason_missing()) is not None:
    pytest.skip(REASON, allow_module_level=True)

ROOT = cuda.ROOT
STORAGE = ("fp32", "bf16", "fp16", "mixed", "fp64")
TABLES = (4096, 32764)
OPS = ("adamw", "centralize", "check", "combine", "copy", "direction", "grad_dots", "norm", "perturb", "perturb_variant")
OPS += ("random_normal", "random_rademacher", "sgd")
VARIANTS = ("adamw_variant", "sgd_variant")  # of what may be bfloat16 or have float32 masters


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """Every kernel for every architecture this nvcc knows."""
    return cuda_kernels(cuda.toolkit()[2])


def of(kernels: list[Kernel], arch: str) -> list[Kernel]:
    if arch not in cuda.toolkit()[2]:
        pytest.skip(f"nvcc {cuda.toolkit()[1]} does not know {arch}")
    return [kernel for kernel in kernels if kernel.arch == arch]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_is_there(kernels: list[Kernel], arch: str) -> None:
    found = sorted((kernel.op, kernel.storage, kernel.table) for kernel in of(kernels, arch))
    alone = ("finish", "finish_dots", "sharpness_draw", "sharpness_rank", "sharpness_weights")
    others = [("advance", "", 4096), *((op, "", 0) for op in alone)]
    made = [*product(OPS, STORAGE, TABLES), *product(VARIANTS, ("bf16", "mixed", "fp64"), TABLES)]
    assert found == sorted(made + others)


def test_every_source_is_compiled() -> None:
    with_kernels = {path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu")} - {"device"}
    assert set(cuda.SOURCES) == with_kernels


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_keeps(kernels: list[Kernel], rule: str, arch: str) -> None:
    assert [text for kernel in of(kernels, arch) for text in violations(kernel, rule)] == []


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_common_passes_fill_the_processor(kernels: list[Kernel], arch: str) -> None:
    """What waits for the memory alone has all the threads there can be."""
    ops = {"norm", "check", "perturb", "copy"}
    full = [kernel for kernel in of(kernels, arch) if kernel.op in ops and kernel.storage in ("fp32", "bf16", "fp16")]
    full += [kernel for kernel in of(kernels, arch) if (kernel.op, kernel.storage) == ("sgd", "fp32") and arch != "sm_100"]
    assert len(full) >= 4 * 3 * 2
    for kernel in full:
        assert least_threads(kernel) == 2048, kernel
        assert resident_threads(kernel) == 2048, kernel
        assert kernel.registers <= 32, kernel


@pytest.mark.slow
@pytest.mark.parametrize("op", instructions.SOURCES)
def test_instructions_are_as_many_as_the_bars_count(kernels: list[Kernel], op: str) -> None:
    """Up to what another version of nvcc may change."""
    of(kernels, instructions.ARCH)  # or skip
    assert instructions.of_kernels(op, kernels) == pytest.approx(limits.INSTRUCTIONS["native"][op], rel=0.05, abs=0.1)


@pytest.mark.slow
def test_the_page_is_up_to_date(kernels: list[Kernel]) -> None:
    written = generated.between_markers(generated.PAGE.read_text(encoding="utf-8"), cuda_page.PART)
    about = re.match(r"nvcc (\S+),", written)
    assert about is not None
    if about[1] != cuda.toolkit()[1]:
        pytest.skip(f"the page is about nvcc {about[1]}, this is {cuda.toolkit()[1]}")
    assert written == cuda_page.table(kernels), f"docs/kernels.md is not what the code gives now; run: {cuda_page.COMMAND}"


def test_the_flags_keep_the_arithmetic() -> None:
    flags = cuda.flags()
    assert "--fmad=false" in flags
    assert not [flag for flag in flags if re.search(r"fast.math|ftz|prec-(div|sqrt)", flag)]  # all off, as they are unless asked for


@dataclass(frozen=True)
class Fault:
    """A line of csrc/cuda and what it is changed to; the source whose kernels show it, and by which rule."""

    file: str
    old: str
    new: str
    source: str
    rule: str


FAULTS = {
    "more threads than there are registers for": Fault(
        "launch.cuh", "Op::kBlocks < kMostBlocks ? Op::kBlocks : kMostBlocks", "4", "norm", "nothing_is_spilled"
    ),
    "fewer threads than could be": Fault(
        "launch.cuh", "Op::kBlocks < kMostBlocks ? Op::kBlocks : kMostBlocks", "1", "check", "enough_threads_fit"
    ),
    "packs aligned as single elements": Fault(
        "values.cuh", "alignas(sizeof(S) * kCount) Pack", "alignas(sizeof(S)) Pack", "copy", "operands_are_wide"
    ),
    "packs moved element by element": Fault(
        "access.cuh",
        "body(Width<kWidth>{}, i);",
        "for (int j = 0; j < kWidth; ++j) body(Width<1>{}, i + j);",
        "perturb",
        "operands_are_wide",
    ),
    "an operand is forgotten": Fault("direction.cu", "store<A, kCount>(ema, i, m);", "", "direction", "operands_are_wide"),
    "packs of mixed rows taken apart by reference": Fault(
        "access.cuh",
        "widen<T>(read_pack<BFloat16, kCount>(operand, i))",
        "widen<T>(*at<const Pack<BFloat16, kCount>, BFloat16>(operand, i))",
        "copy",
        "operands_are_wide",
    ),
    "a number in float64": Fault(
        "perturb.cu",
        "sam::perturb(p.data[j], g.data[j], scale, scaling)",
        "T(sam::perturb(double(p.data[j]), double(g.data[j]), double(scale), scaling.template as<double>()))",
        "perturb",
        "no_double_in_main_loops",
    ),
    "an atomic addition": Fault("check.cu", "*found_inf = 1.0f;", "::atomicAdd(found_inf, 1.0f);", "check", "only_tickets_are_atomic"),
    "no place left for options": Fault(  # the other kernels' launcher asserts it
        "multi_tensor.cuh", "(kArgumentBytes - kOptionBytes - 16)", "(kArgumentBytes - 16)", "advance", "arguments_fit"
    ),
    "an approximate division": Fault(
        "../common/formulas.h", "(exp_avg / denominator)", "T(__fdividef(exp_avg, denominator))", "adamw", "arithmetic_is_ieee"
    ),
    "a fused multiply-add": Fault(
        "../common/formulas.h", "return param + grad * scale;", "return fma(grad, scale, param);", "perturb", "arithmetic_is_ieee"
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc" / "cuda" / fault.file
    text = path.read_text(encoding="utf-8")
    assert fault.old in text, f"{fault.file} has changed: plant the fault anew"
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    found = [text for kernel in cuda_kernels(["sm_90"], [fault.source], tmp_path) for text in violations(kernel, fault.rule)]
    assert found


LISTING = """
	Function : kernel
        /*0000*/                   LDC R1, c[0x0][0x28] ;                /* 0x00000a00ff017b82 */
        /*0010*/                   LDG.E.128 R4, [R2.64] ;               /* 0x1 */
        /*0020*/                   F2F.F64.F32 R6, R4 ;                  /* 0x2 */
        /*0030*/               @P1 STG.E.U16 [R2.64], R4 ;               /* 0x3 */
        /*0040*/              @!P0 BRA 0x10 ;                            /* 0x4 */
        /*0050*/                   LDG.E.LTC128B R4, [R2.64] ;           /* 0x5 */
        /*0060*/               @P1 BRA 0x0 ;                             /* 0x6 */
        /*0070*/                   EXIT ;                                /* 0x7 */
        /*0080*/                   BRA 0x80;                             /* 0x8 */
"""


def test_loops_are_found() -> None:
    """The inner one of two alone; what follows it in the outer one is none of it."""
    ((name, code),) = _sass.functions(LISTING)
    assert name == "kernel"
    (loop,) = _sass.loops(code)
    assert (loop.loads, loop.stores, loop.doubles) == ({128: 1}, {16: 1}, 1)


@pytest.mark.parametrize(
    ("opcode", "local", "atomic", "double"),
    [
        ("LDL.LU", True, False, False),
        ("STL.64", True, False, False),
        ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", False, True, False),
        ("ATOMG.E.ADD", False, True, False),
        ("DADD", False, False, True),
        ("F2F.F32.F64", False, False, True),
        ("MUFU.RCP64H", False, False, True),
        ("LDG.E.64", False, False, False),
        ("F2FP.BF16.PACK_AB", False, False, False),
        ("REDUX", False, False, False),
    ],
)
def test_instructions_are_known(opcode: str, local: bool, atomic: bool, double: bool) -> None:
    assert (_sass.is_local(opcode), _sass.is_atomic(opcode), _sass.is_double(opcode)) == (local, atomic, double)
