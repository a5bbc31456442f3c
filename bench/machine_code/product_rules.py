"""What must hold for the code of the kernels per sample, and their table in docs/kernels.md."""

from __future__ import annotations

from collections.abc import Sequence

from bench.machine_code.products import NVIDIA, Product

__all__ = ["PART", "RULES", "table", "violations"]

PART = "machine code of products"
SHARED = 99 * 1024  # a block's on sm_86, sm_89 and sm_120; more on the others
_UNITS = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}
_TYPES = {"bf16": ("bf16.bf16", "kind::f16"), "fp16": ("f16.f16", "kind::f16"), "tf32": ("tf32.tf32", "kind::tf32")}
_LEAST_ROWS = 64  # of a tile, for wgmma and tcgen05
_FEW_DOUBLES = 4  # of a product of two sums, added to a square norm
_ADDS_IN_DOUBLE = "_finish_kernel"


def _rows(code: Product) -> int:
    found = code.constants
    return int(str(found.get("BLOCK_T", found.get("BLOCK_P", 0))))


def _products_are_where_they_belong(code: Product) -> list[str]:
    """On the tensor cores, in the type that was asked for, by the target's own instruction where the tile is large enough; of kind ieee
    as fused float32 multiplications, and no others."""
    wanted = set()
    for kind in set(code.kinds) - {"ieee"}:
        unit = _UNITS[code.target.name] if _rows(code) >= _LEAST_ROWS else "mma.sync"
        wanted.add((unit, _TYPES[kind][unit == "tcgen05.mma"]))
    missing = [pair for pair in wanted if not any(name.startswith(pair[0]) and f".{pair[1]}" in name for name in code.matrix)]
    foreign = [name for name in code.matrix if not any(name.startswith(unit) and f".{types}" in name for unit, types in wanted)]
    found = [f"no {unit} of {types}: {dict(code.matrix)}" for unit, types in missing] + [f"{name}: not asked for" for name in foreign]
    if "ieee" in code.kinds and not code.multiplications:
        found.append("no float32 multiplications")
    return found


def turns_operands(code: Product) -> bool:
    """Whether its operands have to be transposed on the way: wgmma and tcgen05 read tf32 along the sum alone, which the direct form's
    positions are not. Triton does that as it copies, element by element."""
    return code.variant.kernel == "_direct_kernel" and code.kinds == ["tf32"] and code.target.name != "sm_80" and _rows(code) >= _LEAST_ROWS


def _operands_come_16_bytes_at_a_time(code: Product) -> list[str]:
    """Straight into shared memory where there are products. Elsewhere as loads; beside float32 those of 16 bits have 8 bytes. (Indices,
    and what a whole program needs once, are narrow.)"""
    if code.kinds:
        least = 32 if turns_operands(code) else 128
        narrow = {bits: n for bits, n in code.copies.items() if bits < least}
        loads = [key for key in code.accesses if key[0] == "load"]
        found = [f"copies of {narrow} bits"] if narrow else []
        found += [f"operands are loaded, not copied: {loads}"] if loads or not code.copies else []
        return found
    pointers = {kind for name, kind in code.variant.signature if name in ("inputs", "grads", "normalized", "partial") and kind[0] == "*"}
    least = 64 if len(pointers) > 1 else 128
    widths = sorted({bits for kind, _, bits in code.accesses if kind == "load"})
    odd = [bits for bits in widths if bits < least and not (code.variant.kernel in ("_runs_kernel", "_one_position_kernel") and bits == 32)]
    if code.variant.kernel == _ADDS_IN_DOUBLE:
        return []
    return [f"loads of {odd} bits"] if odd else [] if widths and widths[-1] == 128 else [f"loads of {widths} bits"]


def _no_local_memory(code: Product) -> list[str]:
    return [f"{code.local} bytes of local memory a thread"] if code.local else []


def _a_block_fits_everywhere(code: Product) -> list[str]:
    return [f"{code.shared} bytes of shared memory, more than {SHARED}"] if code.shared > SHARED else []


def _enough_threads_fit(code: Product) -> list[str]:
    """Products: two warps for each of the four units that multiply, at least, as one waits for the other's operands. Elsewhere half of
    all threads, for the memory."""
    least = 256 if code.kinds else code.target.threads // 2
    if code.resident_threads >= least:
        return []
    return [f"{code.registers} registers, {code.shared} bytes shared: {code.resident_threads} threads resident, fewer than {least}"]


def _no_double(code: Product) -> list[str]:
    """float64 adds up what programs found, nothing else."""
    if code.variant.kernel == _ADDS_IN_DOUBLE:
        return []
    most = _FEW_DOUBLES if code.variant.kernel == "_one_position_kernel" else 0
    return [f"{code.doubles} instructions in float64, more than {most}"] if code.doubles > most else []


_ALL = (
    _products_are_where_they_belong,
    _operands_come_16_bytes_at_a_time,
    _no_local_memory,
    _a_block_fits_everywhere,
    _enough_threads_fit,
    _no_double,
)
RULES = {rule.__name__.removeprefix("_"): rule for rule in _ALL}


def violations(code: Product, rule: str | None = None) -> list[str]:
    """What is wrong with the code, by one rule or by all."""
    found = [text for name, check in RULES.items() if rule in (None, name) for text in check(code)]
    return [f"{code.target.name} {code.variant}: {text}" for text in found]


def _operands(code: Product) -> str:
    kinds = dict.fromkeys(kind[1:] for name, kind in code.variant.signature if name in ("inputs", "grads", "normalized") and kind[0] == "*")
    return ", ".join(kinds) or "–"


def _instructions(code: Product) -> str:
    if code.kinds and not code.matrix:
        return "FFMA"
    names = {
        ".".join([name.split(".")[0], *(part for part in name.split(".") if part[0] == "m" and part[1:2].isdigit())])
        for name in code.matrix
    }
    kinds = {part for name in code.matrix for part in name.split(".") if part.startswith("kind::")}
    return " ".join(sorted(names) + sorted(kinds)) or "–"


def _bits(code: Product) -> str:
    found = set(code.copies) | {bits for kind, _, bits in code.accesses if kind == "load" and bits > 32}
    return ", ".join(map(str, sorted(found, reverse=True))) or "32"


_HEADINGS = ("kernel", "operands", "as", "tile", "warps", "multiplied by", "bits", "registers", "local", "shared", "threads")


def _row(code: Product) -> str:
    stores = code.variant.kernel == "_direct_kernel" and "products" not in code.constants
    cells = [
        f"`{code.variant.kernel}`{' with products' if stores else ''}",
        _operands(code),
        ", ".join(dict.fromkeys(code.kinds)) or "–",
        code.tile,
        *map(str, (code.variant.num_warps, _instructions(code), _bits(code))),
        *map(str, (code.registers, code.local, code.shared, code.resident_threads)),
    ]
    return "| " + " | ".join(cells) + " |"


def table(codes: Sequence[Product]) -> str:
    """A table a target."""
    import triton

    wrong = [text for code in codes for text in violations(code)]
    verdict = "Every rule holds." if not wrong else "Broken:\n\n" + "\n".join(f"* {text}" for text in wrong)
    parts = [f"Triton {triton.__version__}. {verdict}"]
    for name in NVIDIA:
        rows = dict.fromkeys(_row(code) for code in codes if code.target.name == name)
        if rows:
            lines = ["| " + " | ".join(_HEADINGS) + " |", "|---|---|---|---|---:|---|---:|" + "---:|" * 4]
            parts.append("\n".join([f"#### {name}\n", *lines, *rows]))
    return "\n\n".join(parts) + "\n"
