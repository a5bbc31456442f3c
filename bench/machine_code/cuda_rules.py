"""What must hold for the machine code of every CUDA kernel. A rule returns what is wrong, so that it can be shown to fail."""

from __future__ import annotations

from bench.machine_code.cuda import Kernel
from bench.machine_code.targets import TARGETS

__all__ = ["RULES", "least_threads", "resident_threads", "violations"]

UNIFORM = ("fp32", "bf16", "fp16")
_COPY = (1, 1)  # what a skipped step does: restores, or saves
# (16-byte loads, 16-byte stores) in the main loops where all operands have one type of at most 32 bits: as many as an operation has
# operands, or several times as many where a loop takes several packs.
_LOOPS = {
    "copy": {_COPY},
    "check": {(4, 0)},  # four packs of g
    "norm": {(2, 0)},  # two packs of g; adaptive: g, p
    "perturb": {_COPY, (2, 2)},  # p, g; old_p, p
    "perturb_variant": {_COPY, (3, 2)},  # p, g, m; old_p, p
    "random_normal": {(4, 8)},  # the four words of a counter: p; old_p, p each
    "random_rademacher": {(4, 8)},
    "centralize": {(1, 0), (2, 0), (2, 1)},  # of a tensor without slices, and the sum of one: g; without slices, adaptive: g, p; g, p; g
    "grad_dots": {(2, 0), (3, 0)},  # l, r; l, r, o
    "combine": {(2, 1), (3, 1)},  # l, r; out. l, r, o; out
    "direction": {(2, 1), (3, 1)},  # the first: g, p; m. Later: g, m, p; m
    "sgd": {_COPY, (2, 1), (2, 2), (3, 2)},  # without momentum: p, g; p. The first: p, g; p, m. Later: p, g, m; p, m
    "adamw": {_COPY, (4, 3)},  # p, g, m, v; p, m, v
}
_LOOPS |= {f"{update}_variant": _LOOPS[update] for update in ("sgd", "adamw")}  # of several types: and old_p
# Beside these: stochastic rounding, four words of a counter.
_ROUNDED = {
    ("perturb_variant", "bf16"): {(12, 8)},
    ("sgd_variant", "bf16"): {(8, 4), (8, 8), (12, 8)},
    ("adamw_variant", "bf16"): {(16, 12)},
}
_FINISHED = ("centralize", "combine", "direction", "grad_dots", "norm")  # by their last block
# Widths that the packs of a row of several types have: a pack has 16 bytes of the type of the arithmetic.
_MIXED_WIDTHS = {"mixed": {128, 64}, "fp64": {128, 64, 32}}


def least_threads(kernel: Kernel) -> int:
    """Threads that must be resident on a multiprocessor, of 2,048."""
    if kernel.op in ("copy", "check", "norm", "perturb"):
        return 2048 if kernel.storage in UNIFORM else 1024  # several types: the addresses and types of all operands are kept
    if kernel.op == "sgd":
        if kernel.storage == "fp32":
            return 1536 if kernel.arch == "sm_100" else 2048  # sm_100: ptxas takes more registers for the same
        return 1536 if kernel.storage in UNIFORM else 1024  # two results of eight elements are float until they are paired
    if kernel.op == "adamw":
        return 512 if kernel.storage == "fp64" else 1024  # a root and a division for each element, in double
    if kernel.op in ("sgd_variant", "adamw_variant"):
        return 512  # as below
    if kernel.op == "perturb_variant":
        return 1024 if kernel.storage in ("fp32", "fp16") else 512  # the others may be rounded stochastically
    if kernel.op == "random_rademacher":
        return 1024 if kernel.storage in ("fp32", "mixed") else 512  # a thread has the words of 16 elements at hand; others: of 8 or 32
    if kernel.op == "random_normal":
        return 512
    return 1024  # centralize, combine, direction: sums in float64; grad_dots: twelve sums. advance and finish are small


def resident_threads(kernel: Kernel) -> int:
    return TARGETS[kernel.arch].resident_threads(kernel.registers, kernel.shared, kernel.threads)


def _nothing_is_spilled(kernel: Kernel) -> list[str]:
    if kernel.stack == kernel.spilled == kernel.local_accesses == 0:
        return []
    return [f"{kernel.stack} bytes of stack, {kernel.spilled} spilled, {kernel.local_accesses} accesses to local memory"]


def _enough_threads_fit(kernel: Kernel) -> list[str]:
    found, least = resident_threads(kernel), least_threads(kernel)
    return [] if found >= least else [f"{kernel.registers} registers: {found} threads resident, fewer than {least}"]


def _operands_are_wide(kernel: Kernel) -> list[str]:
    """In the main loops each operand is loaded and stored by packs, of one access each."""
    if kernel.op not in _LOOPS:
        return []
    wanted = _LOOPS[kernel.op] | _ROUNDED.get((kernel.op, kernel.storage), set())
    widths = {bits for loop in kernel.wide_loops for bits in loop.loads | loop.stores}
    expected = _MIXED_WIDTHS.get(kernel.storage, {128})
    wrong = [] if widths == expected else [f"main loops access {sorted(widths)} bits at a time, expected {sorted(expected)}"]
    shapes = {(loop.loads[128], loop.stores[128]) for loop in kernel.wide_loops}
    if kernel.storage in UNIFORM:
        return wrong if shapes == wanted else [*wrong, f"main loops of {sorted(shapes)} 16-byte (loads, stores), expected {sorted(wanted)}"]
    for which, kind in enumerate(("loads", "stores")):  # an operand has an access for each of the types it may be of
        most, least = (max((shape[which] for shape in found), default=0) for found in (shapes, wanted))
        wrong += [] if most >= least else [f"at most {most} 16-byte {kind} in a main loop, expected {least} or more"]
    return wrong


def _no_double_in_main_loops(kernel: Kernel) -> list[str]:
    """Where no operand is float64. Scalars are made in it once a block, and so are sums of threads. Sums of what is written in the same
    pass are float64 all the way."""
    if kernel.op in ("centralize", "combine", "direction") or kernel.storage == "fp64":
        return []
    doubles = sum(loop.doubles for loop in kernel.wide_loops)
    return [f"{doubles} instructions in float64 in main loops"] if doubles else []


def _only_tickets_are_atomic(kernel: Kernel) -> list[str]:
    """Blocks count themselves where the last of them adds up what all have found. Nothing that is computed is atomic."""
    tickets = 1 if kernel.op in _FINISHED else 0
    return [] if kernel.atomics == tickets else [f"{kernel.atomics} atomic operations, expected {tickets}"]


def _arguments_fit(kernel: Kernel) -> list[str]:
    most = kernel.table or 4096
    return [f"{kernel.arguments} bytes of arguments, more than {most}"] if kernel.arguments > most else []


def _arithmetic_is_ieee(kernel: Kernel) -> list[str]:
    """Divisions and roots are rounded to nearest, denormals kept, and a multiplication and an addition are fused where the source says so:
    in the norm and in inner products. (Adam's counters and weights by sharpness: what CUDA's pow, exp and log are made of.)"""
    if kernel.op == "advance" or kernel.op.startswith("sharpness"):
        return []
    fused = [] if kernel.op in ("norm", "grad_dots") else kernel.fused
    return [f"{name} in PTX" for name in (*kernel.approximate, *fused)]


_CHECKS = (
    _nothing_is_spilled,
    _enough_threads_fit,
    _operands_are_wide,
    _no_double_in_main_loops,
    _only_tickets_are_atomic,
    _arguments_fit,
    _arithmetic_is_ieee,
)
RULES = {check.__name__.removeprefix("_"): check for check in _CHECKS}


def violations(kernel: Kernel, rule: str | None = None) -> list[str]:
    """What is wrong with a kernel, by one rule or by all."""
    return [f"{kernel}: {text}" for name, check in RULES.items() if rule in (None, name) for text in check(kernel)]
