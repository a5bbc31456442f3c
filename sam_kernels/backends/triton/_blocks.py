"""What every kernel is made of: finding its chunk, reading an operand as float32, writing it back with one rounding.

Pointers come as int64 from a table, so alignment is known only at run time: a chunk whose operands all start at a multiple of 16 bytes
takes the path without a mask, whose accesses are 16 bytes wide; whatever is left of it, or lies askew, is masked. (A mask against a loaded
size makes every access scalar.) Masked blocks are half as long: Triton lays blocks of one shape out alike, and a scalar access in the
layout of a 16-byte one is scattered, costs registers, and goes to a store through shared memory. (Norms keep one sum an element of a
block, so theirs are whole.)

Kernels of one shape differ in what they do to a block. They pass that as a jit function to the loops (:func:`for_blocks`, and those of
``_sums.py``), with its operands as one tuple of pointers and its other arguments as another. Write that tuple where it is passed: assigning
it to a name turns its constants into tensors, and so does returning it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import core

from sam_kernels.backends.triton._requirements import IS_INTERPRETED

__all__ = [
    "convert",
    "copy_block",
    "for_blocks",
    "grad_multiplier",
    "inverse_of",
    "is_finite",
    "is_skipped",
    "load",
    "load_float",
    "load_number",
    "load_where",
    "operands",
    "store",
    "take_chunk",
]

# The interpreter truncates float32 to bfloat16 and garbles subnormal bfloat16: there conversions are made of integer operations.
_BFLOAT16_BY_HAND = tl.constexpr(IS_INTERPRETED)


@triton.jit
def _operand(
    pointers,  # (R,) int64
    row,
    start,
    DTYPE: tl.constexpr,
):  # the address, the same as a pointer, as a pointer promised to be a multiple of 16 bytes
    """One operand of a chunk."""
    address = tl.load(pointers + row)
    plain = address.to(tl.pointer_type(DTYPE)) + start
    aligned = tl.multiple_of(address.to(tl.pointer_type(DTYPE)) + start, 16)
    return address, plain, aligned


@triton.jit
def _with(pointers, pointer):
    return pointers + (pointer,)  # noqa: RUF005 - triton 3.4 takes no star in a tuple


@triton.jit
def operands(
    pointers,  # of each operand (R,) int64, or None
    row,
    start,  # element, int64
    DTYPES: tl.constexpr,
):  # all addresses joined by or, the operands as pointers, as pointers promised to be multiples of 16 bytes
    """The operands of a chunk. In the place of one that is None is the first, which is always there."""
    addresses, first, aligned_first = _operand(pointers[0], row, start, DTYPES[0])
    plain, aligned = (first,), (aligned_first,)
    for i in tl.static_range(1, len(DTYPES)):
        if pointers[i] is None:
            plain, aligned = _with(plain, first), _with(aligned, aligned_first)
        else:
            address, pointer, aligned_pointer = _operand(pointers[i], row, start, DTYPES[i])
            plain, aligned = _with(plain, pointer), _with(aligned, aligned_pointer)
            addresses = addresses | address
    return addresses, plain, aligned


@triton.jit
def take_chunk(
    pointers,  # of each operand (R,) int64, or None
    numels,  # (R,) int64
    work_rows,  # (C,) int32
    work_chunks,  # (C,) int32
    chunk_size,  # elements
    DTYPES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # row, first element (int64), elements (int32), those of them that take no mask, and two tuples of pointers as of operands()
    """The chunk of this program. Chunks are numbered in 32 bits, elements in 64."""
    program = tl.program_id(0)
    row = tl.load(work_rows + program)
    start = tl.load(work_chunks + program).to(tl.int64) * chunk_size
    count = tl.minimum(tl.load(numels + row) - start, chunk_size).to(tl.int32)
    addresses, plain, aligned = operands(pointers, row, start, DTYPES)
    full = tl.where((addresses & 15) == 0, count // BLOCK_SIZE * BLOCK_SIZE, 0)
    return row, start, count, full, plain, aligned


@triton.jit
def for_blocks(BODY: tl.constexpr, plain, aligned, full, count, options, BLOCK_SIZE: tl.constexpr):
    """Calls ``BODY(*pointers, block, count, *options, BLOCK_SIZE, MASKED)`` for each block of a chunk: whole ones up to ``full``, half
    ones under a mask from there on."""
    HALF: tl.constexpr = BLOCK_SIZE // 2
    for block in range(0, full, BLOCK_SIZE):
        BODY(*aligned, block, count, *options, BLOCK_SIZE, False)
    for block in range(full, count, HALF):
        BODY(*plain, block, count, *options, HALF, True)


@triton.jit
def load(pointer, offsets, count, MASKED: tl.constexpr):
    """A block in its storage type; 0 beyond count."""
    if MASKED:
        return tl.load(pointer + offsets, mask=offsets < count, other=0.0)
    else:
        return tl.load(pointer + offsets)


@triton.jit
def load_float(pointer, offsets, count, MASKED: tl.constexpr):
    """A block as float32."""
    return convert(load(pointer, offsets, count, MASKED), tl.float32)


@triton.jit
def load_where(pointer, offsets, mask):
    """A block of any shape as float32; 0 outside of the mask."""
    return convert(tl.load(pointer + offsets, mask=mask, other=0.0), tl.float32)


@triton.jit
def load_number(number):  # float32, or a pointer to () float32 or float64
    """A hyperparameter: an argument of the launch, or read from memory in its own precision."""
    number = core.to_tensor(number)  # the interpreter hands on a number of Python's; tl has the function from triton 3.7 on
    if number.dtype.is_ptr():
        return tl.load(number)
    else:
        return number


@triton.jit
def store(pointer, offsets, count, value, MASKED: tl.constexpr):
    """A block, rounded once (to nearest even) to the storage type."""
    value = convert(value, pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + offsets, value, mask=offsets < count)
    else:
        tl.store(pointer + offsets, value)


@triton.jit
def convert(value, DTYPE: tl.constexpr):
    """To another type, rounded to nearest even."""
    if value.dtype == DTYPE:
        return value
    elif _BFLOAT16_BY_HAND and value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(DTYPE)
    elif _BFLOAT16_BY_HAND and DTYPE == tl.bfloat16:
        bits = value.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(value == value, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


@triton.jit
def is_finite(value):
    """Neither infinite nor NaN, by the largest float32."""
    return tl.abs(value) <= 3.4028234663852886e38


@triton.jit
def is_skipped(norm, found_inf):  # pointers to () float32, or None
    """Whether a step is skipped: the norm is not finite, or somebody found so before."""
    skipped = False
    if norm is not None:
        skipped = skipped | ~is_finite(tl.load(norm))
    if found_inf is not None:
        skipped = skipped | (tl.load(found_inf) != 0.0)
    return skipped


@triton.jit
def copy_block(destination, source, block, count, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr):
    """A block without arithmetic, bit for bit where the types agree."""
    offsets = block + tl.arange(0, BLOCK_SIZE)
    store(destination, offsets, count, load(source, offsets, count, MASKED), MASKED)


@triton.jit
def inverse_of(grad_scale):  # pointer to () float32, or None
    """1 / grad_scale, 1 without one."""
    inverse = 1.0
    if grad_scale is not None:
        inverse = tl.div_rn(1.0, tl.load(grad_scale).to(tl.float32))
    return inverse


@triton.jit
def grad_multiplier(grad_scale, norm, max_norm, MAXIMIZE: tl.constexpr):
    """What a gradient is multiplied by before anything else: 1 / grad_scale, the sign of maximize and, with a max_norm, the clip factor
    min(1, max_norm / (norm + 1e-6)) of ``torch.nn.utils.clip_grad_norm_`` on the unscaled norm."""
    multiplier = inverse_of(grad_scale)
    if max_norm is not None:
        factor = tl.div_rn(max_norm, tl.load(norm).to(tl.float32) * multiplier + 1e-6)
        multiplier = multiplier * tl.minimum(factor, 1.0)
    if MAXIMIZE:
        multiplier = -multiplier
    return multiplier
