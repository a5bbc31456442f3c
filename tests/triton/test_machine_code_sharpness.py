"""What the compiler makes of the kernels of weights by sharpness on NVIDIA's processors; and that each rule finds a planted fault."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sam_kernels.backends.triton._requirements import IS_INTERPRETED, REASON_MISSING

REASON = REASON_MISSING or ("kernels are interpreted here, not compiled" if IS_INTERPRETED else None)
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

from bench.machine_code import _ptx  # noqa: E402 - after the skip
from bench.machine_code.compiled import build  # noqa: E402 - after the skip
from bench.machine_code.launches import Variant, records_of  # noqa: E402 - after the skip
from bench.machine_code.products import NVIDIA  # noqa: E402 - after the skip
from bench.machine_code.targets import TARGETS, Target  # noqa: E402 - after the skip
from sam_kernels import functional  # noqa: E402 - after the skip
from tests.helpers.machine_code import triton_digest  # noqa: E402 - after the skip
from tests.helpers.shared import digest_of_files, made_together  # noqa: E402 - after the skip
from tests.triton.test_machine_code import PACKAGE, ROOT, Fault, planted, with_constants  # noqa: E402 - after the skip

LEAST_THREADS = 256  # two blocks, of which one waits while the other computes
# In float32: only conversions, moves and comparisons (CUDA's exponential looks at the upper half of a number so).
_SINGLE = re.compile(r"\b(?:add|sub|mul|fma|div|ex2|lg2|sqrt|rcp)(?:\.\w+)*\.f32\b")
_LOOSE = re.compile(r"\b(?:add|sub|mul)\.f64\b")  # without a word on rounding: ptxas may contract them


def calls() -> Iterator[Callable[[], object]]:
    for dtype in (torch.float32, torch.float64):
        norms = torch.ones(100, dtype=dtype)
        for beta in (0.5, torch.tensor(0.5), torch.tensor(0.5, dtype=torch.float64)):
            yield lambda norms=norms, beta=beta: functional.sharpness_weights(norms, beta=beta)
            for replacement in (True, False):
                yield lambda norms=norms, beta=beta, replacement=replacement: functional.sharpness_sample(
                    norms, 7, beta=beta, replacement=replacement, seed=2**63
                )


@pytest.fixture(scope="module")
def variants() -> list[Variant]:
    return records_of(*calls())


def violations(variant: Variant, target: Target) -> list[str]:
    compiled = build(variant, target)
    ptx, used = compiled.asm["ptx"], _ptx.resources(compiled.asm["cubin"])
    threads = target.resident_threads(used["REG"], compiled.metadata.shared, 32 * variant.num_warps)
    found = [f"{name}: arithmetic is float64" for name in sorted(set(_SINGLE.findall(ptx)))]
    found += [f"{used['STACK'] + used['LOCAL']} bytes of local memory"] if used["STACK"] + used["LOCAL"] else []
    found += [f"{threads} threads resident"] if threads < LEAST_THREADS else []
    found += ["atomics"] if re.search(r"\b(?:atom|red)\.", ptx) else []
    return found + (["products and sums are contracted"] if _LOOSE.search(ptx) else [])


def test_every_kernel_is_recorded(variants: list[Variant]) -> None:
    sources = (ROOT / "sam_kernels" / "backends" / "triton" / "sharpness").glob("*.py")
    written = {name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE)}
    assert {variant.kernel for variant in variants} == written


def test_neither_seed_nor_number_nor_size_compiles_another_kernel(variants: list[Variant]) -> None:
    def other() -> Iterator[Callable[[], object]]:
        for count, draws, seed, beta in ((1, 1, 0, 0.0), (16, 16, 1, 3.5), (1000, 17, 2**40, 1e300)):
            norms = torch.ones(count)
            yield lambda norms=norms, beta=beta: functional.sharpness_weights(norms, beta=beta)
            for replacement in (True, False):
                yield lambda norms=norms, draws=draws, seed=seed, beta=beta, replacement=replacement: functional.sharpness_sample(
                    norms, draws, beta=beta, replacement=replacement, seed=seed
                )

    assert set(records_of(*other())) <= set(variants)


@pytest.mark.slow
@pytest.mark.parametrize("target", NVIDIA)
def test_every_kernel_keeps_the_rules(variants: list[Variant], target: str) -> None:
    chosen = [v for v in variants if target == "sm_90" or dict(v.signature)["beta"] == "constexpr"]
    rules = digest_of_files([Path(__file__)])
    found = made_together(
        "sharpness",
        chosen,
        lambda variant: triton_digest(variant, target, rules, module=variant.module, kernel=variant.kernel),
        lambda variant: violations(variant, TARGETS[target]),
    )
    assert [f"{variant}: {text}" for variant, texts in zip(chosen, found, strict=True) for text in texts] == []


FAULTS = {
    "an exponential in float32": Fault(
        "_gibbs.py", "tl.exp(exponents(n, largest, beta))", "tl.exp(exponents(n, largest, beta).to(tl.float32))",
        "_weights_kernel", "float64",
    ),
    "a sum in float32": Fault(
        "_gibbs.py", "return tl.sum(sums)", "return tl.sum(sums.to(tl.float32)).to(tl.float64)", "_weights_kernel", "float64"
    ),
    "places by atomics": Fault(
        "sample.py", "tl.store(indices + place, mine, mask=is_drawn)", "tl.atomic_max(indices + place, mine, mask=is_drawn)",
        "_rank_kernel", "atomics",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(variants: list[Variant], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = replace(FAULTS[name], file=f"sharpness/{FAULTS[name].file}")
    variant = next(variant for variant in variants if variant.kernel == fault.kernel)
    monkeypatch.syspath_prepend(tmp_path)
    faulty = replace(variant, module=variant.module.replace(PACKAGE, planted(tmp_path, fault)))
    assert any(fault.rule in text for text in violations(faulty, TARGETS["sm_90"]))


def test_wrong_settings_are_found(variants: list[Variant]) -> None:
    variant = next(variant for variant in variants if variant.kernel == "_rank_kernel")
    assert any("local memory" in text for text in violations(with_constants(variant, BLOCK_SIZE=1024), TARGETS["sm_90"]))
    assert any("contracted" in text for text in violations(replace(variant, fp_fusion=True), TARGETS["sm_90"]))
