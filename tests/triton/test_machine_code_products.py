"""What the compiler makes of the kernels per sample on NVIDIA's processors; and that each rule finds its fault when planted."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sam_kernels.backends.triton._requirements import IS_INTERPRETED, REASON_MISSING, VERSION

REASON = REASON_MISSING or ("kernels are interpreted here, not compiled" if IS_INTERPRETED else None)
if REASON is not None:
    pytest.skip(REASON, allow_module_level=True)

from bench.machine_code import generated  # noqa: E402 - after the skip
from bench.machine_code.launches import Variant, records_of  # noqa: E402 - after the skip
from bench.machine_code.product_rules import PART, RULES, table, violations  # noqa: E402 - after the skip
from bench.machine_code.products import NVIDIA, Product, compile_product, recorded, work_of  # noqa: E402 - after the skip
from bench.machine_code.targets import TARGETS  # noqa: E402 - after the skip
from sam_kernels.functional import per_sample  # noqa: E402 - after the skip
from tests.helpers.machine_code import triton_digest  # noqa: E402 - after the skip
from tests.helpers.shared import made_together  # noqa: E402 - after the skip
from tests.triton.test_machine_code import PACKAGE, ROOT, Fault, planted, with_constants  # noqa: E402 - after the skip

SM_90 = TARGETS["sm_90"]


@pytest.fixture(scope="module")
def codes(variants: list[Variant]) -> list[Product]:
    """One to two minutes, where nothing is kept of an earlier run."""
    return made_together(
        "products",
        work_of(variants),
        lambda work: triton_digest(work, module=work[0].module, kernel=work[0].kernel),
        lambda work: compile_product(work[0], TARGETS[work[1]]),
    )


@pytest.fixture(scope="module")
def variants() -> list[Variant]:
    return recorded()


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("target", NVIDIA)
def test_every_kernel_keeps(codes: list[Product], rule: str, target: str) -> None:
    found = [code for code in codes if code.target.name == target]
    assert found
    assert [text for code in found for text in violations(code, rule)] == []


@pytest.mark.slow
def test_the_page_is_up_to_date(codes: list[Product]) -> None:
    pinned = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert pinned is not None
    if pinned[1] != VERSION:
        pytest.skip(f"the page is about triton {pinned[1]}, this is {VERSION}")
    written = generated.between_markers(generated.PAGE.read_text(encoding="utf-8"), PART)
    command = "python -m bench.machine_code --products --write docs/kernels.md"
    assert written == table(codes), f"docs/kernels.md is not what the code gives now; run: {command}"


def test_every_kernel_is_recorded(variants: list[Variant]) -> None:
    sources = (ROOT / "sam_kernels" / "backends" / "triton" / "per_sample").glob("*.py")
    written = {name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(encoding="utf-8"), re.MULTILINE)}
    assert {variant.kernel for variant in variants} == written


@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_a_bias_compiles_no_other_kernel(tokens: int) -> None:
    a, norms = torch.zeros(2, tokens, 32), torch.zeros(2, dtype=torch.float64)
    without, with_bias = (
        records_of(lambda bias=bias: per_sample.linear_square_norms_(norms, a, a, bias=bias, method="gram")) for bias in (False, True)
    )
    assert without == with_bias
    assert all("bias" not in dict(v.constants) and dict(v.signature).get("bias", "fp32") == "fp32" for v in without)


def one(variants: list[Variant], kernel: str, **constants: object) -> Variant:
    return next(v for v in variants if v.kernel == kernel and constants.items() <= dict(v.constants).items())


GRAM_BF16 = {"INPUTS_KIND": "bf16", "BLOCK_T": 64}
FAULTS = {
    "tf32 outside of the tensor cores": Fault(
        "_dots.py", '"tf32" if KIND == "tf32" else "ieee"', '"ieee"', "_direct_kernel", "products_are_where_they_belong", {"KIND": "tf32"}
    ),
    "ieee on them": Fault(
        "_dots.py", '"tf32" if KIND == "tf32" else "ieee"', '"tf32"', "_direct_kernel", "products_are_where_they_belong", {"KIND": "ieee"}
    ),
    "16 bits widened": Fault(
        "_dots.py", "convert(x, tl.bfloat16)", "convert(x, tl.float32)", "_gram_kernel", "products_are_where_they_belong", GRAM_BF16
    ),
    "a row that starts askew": Fault(
        "gram.py", "inputs + first * in_features", "inputs + first * in_features + 1", "_gram_kernel",
        "operands_come_16_bytes_at_a_time", GRAM_BF16,
    ),
    "a mask that differs element by element": Fault(
        "affine.py", "(rows < positions)[:, None] & is_column[None, :]", "place < channels * positions - 1", "_columns_kernel",
        "operands_come_16_bytes_at_a_time", {},
    ),
    "a number in float64": Fault(
        "affine.py", "bias_sums + g\n", "bias_sums + (g.to(tl.float64) * 1.1).to(tl.float32)\n", "_rows_kernel", "no_double", {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(variants: list[Variant], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = replace(FAULTS[name], file=f"per_sample/{FAULTS[name].file}")
    variant = one(variants, fault.kernel, **fault.constants)
    assert violations(compile_product(variant, SM_90), fault.rule) == []
    monkeypatch.syspath_prepend(tmp_path)
    faulty = replace(variant, module=variant.module.replace(PACKAGE, planted(tmp_path, fault)))
    assert violations(compile_product(faulty, SM_90), fault.rule)


@pytest.mark.parametrize(
    ("rule", "kernel", "constants", "change"),
    [
        (
            "no_local_memory",
            "_gram_kernel",
            {"INPUTS_KIND": "ieee", "BLOCK_T": 64},
            lambda variant: with_constants(replace(variant, num_warps=8), BLOCK_T=128),
        ),
        ("a_block_fits_everywhere", "_gram_kernel", GRAM_BF16, lambda variant: replace(variant, num_stages=8)),
        ("enough_threads_fit", "_rows_kernel", {}, lambda variant: with_constants(variant, BLOCK_C=16)),
    ],
)
def test_a_wrong_setting_is_found(
    variants: list[Variant], rule: str, kernel: str, constants: dict[str, object], change: Callable[[Variant], Variant]
) -> None:
    variant = one(variants, kernel, **constants)
    assert violations(compile_product(variant, SM_90), rule) == []
    assert violations(compile_product(change(variant), SM_90), rule)
