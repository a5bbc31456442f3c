"""What must hold for the code of every kernel. A rule returns what is wrong, so that it can be shown to fail on a planted fault."""

from __future__ import annotations

from collections import Counter

from bench.machine_code.compiled import Code

__all__ = ["RULES", "violations"]

_WAITING = 16  # bytes of an address or two
_ADD_IN_DOUBLE = ("_finish_dots_kernel",)
_SCALARS = 4  # instructions: of perturb, whose rho and lambd are read, lambd is taken from 1, and all three are rounded


def _full_blocks_are_wide(code: Code) -> list[str]:
    """All that blocks without a mask (of slices: whole blocks) load and store goes 16 bytes at a time; beside a type of 32 bits, one of
    16 bits 8 at a time."""
    found = []
    for kind in ("load", "store"):
        wanted, got = code.wanted(kind), code.got(kind)
        if wanted != got:
            found.append(f"full blocks should {kind} {dict(wanted)} (bits: bytes a thread), and do {dict(got)}")
    narrowest, widest = (
        ([limit(bits for kind in ("load", "store") for bits in code.wanted(kind)) for limit in (min, max)]) if code.main_loops else (0, 0)
    )
    if widest != 128 or narrowest < (64 if code.variant.dtype == "mixed" else 128):
        found.append(f"blocks are too small: accesses of {narrowest} to {widest} bits")
    if not code.main_loops:
        found.append("no loop goes without a mask, or over whole blocks of slices")
    if code.disassembled is not None:
        # ptxas repeats the bodies of loops that it unrolls, some of them under a predicate; and it must not split what is wide.
        for kind in ("load", "store"):
            wide, least = (sum(counted[kind, under, 128] for under in (False, True)) for counted in (code.disassembled, code.accesses))
            if wide < least:
                found.append(f"ptxas made {wide} wide {kind}s of {least}")
    return found


def _masked_blocks_do_the_same(code: Code) -> list[str]:
    """Every loop without a mask has a twin with one that touches the same operands, and so has one over whole blocks of slices."""
    full = Counter(frozenset(loop.counts().items()) for loop in code.main_loops)
    masked = Counter(frozenset(loop.counts().items()) for loop in code.loops if loop not in code.main_loops)
    return [] if full == masked else [f"loops without a mask access {dict(full)}, those with one {dict(masked)}"]


def _addresses_are_64_bit(code: Code) -> list[str]:
    return code.wrong_addresses


def _no_double(code: Code) -> list[str]:
    """None, but for hyperparameters that lie in memory as float64: once a program, far from any element. And where sums of chunks are added
    up to a result in float64."""
    if code.variant.kernel in _ADD_IN_DOUBLE:
        return []
    most = _SCALARS if any(kind == "*fp64" for _, kind in code.variant.signature) else 0
    return [f"{code.doubles} instructions in float64, more than {most}"] if code.doubles > most else []


def _nothing_is_contracted(code: Code) -> list[str]:
    """A multiplication and an addition are fused where the source says so, nowhere else."""
    found = [f"{name} without a rounding: may be contracted" for name in code.loose_arithmetic]
    if code.variant.fp_fusion:
        found.append("compiled with contraction on")
    if code.has_fma and not code.asks_for_fma:
        found.append("fused multiply-adds that nobody asked for")
    return found


def _nothing_is_spilled(code: Code) -> list[str]:
    """No local memory, but for an address or two that wait there for the loop to end."""
    if not code.hot_spills and code.scratch <= _WAITING:
        return []
    return [f"{code.scratch} bytes of local memory a thread, used {code.hot_spills} times in loops"]


def _enough_threads_fit(code: Code) -> list[str]:
    # Random numbers: the words of eight counters for each thread, or accesses of 16-bit types would not be 16 bytes. A quarter is enough:
    # their arithmetic, not the memory, is what such a pass waits for. Slices: elements wait in registers for their mean.
    least = code.target.threads // (4 if code.variant.draws or code.variant.holds_slices else 2)
    if code.resident_threads >= least:
        return []
    return [f"{code.registers} registers, {code.shared} bytes shared: {code.resident_threads} threads resident, fewer than {least}"]


def _no_element_changes_hands(code: Code) -> list[str]:
    """Shared memory is for one number a warp, when sums are put together (of each slice in a block): no operand goes through it from thread
    to thread.

    Random numbers do: Triton makes them one lane a thread, while wide accesses want four or eight neighbours, and it does not lay a whole
    Philox out anew. One block of words at a time, then.
    """
    constants = dict(code.variant.constants)
    words = 4 * constants["BLOCK_SIZE"] // 4 if code.variant.draws else 0
    slices = constants["BLOCK_SIZE"] // constants["COLUMNS"] if code.variant.holds_slices else 1
    number = 8 if code.variant.kernel in _ADD_IN_DOUBLE else 4
    most = max(words, number * slices * code.threads // code.target.warp_size)
    return [f"{code.shared} bytes of shared memory, more than {most}"] if code.shared > most else []


_FOR_ALL = (_no_double, _nothing_is_contracted, _nothing_is_spilled, _enough_threads_fit, _no_element_changes_hands)
_FOR_CHUNKS = (_full_blocks_are_wide, _masked_blocks_do_the_same, _addresses_are_64_bit)  # not for finishing norms and counting steps
RULES = {rule.__name__.removeprefix("_"): rule for rule in (*_FOR_CHUNKS, *_FOR_ALL)}


def violations(code: Code, rule: str | None = None) -> list[str]:
    """What is wrong with the code, by one rule or by all that apply, each with the variant and the target it was found in."""
    chosen = [*_FOR_CHUNKS, *_FOR_ALL] if code.variant.walks_chunks else list(_FOR_ALL)
    found = [text for check in chosen if rule is None or check is RULES[rule] for text in check(code)]
    return [f"{code.target.name} {code.variant}: {text}" for text in found]
