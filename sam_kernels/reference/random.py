"""Random numbers that are a function of (seed, row, element), and the perturbation made of them.

Sources: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), Box and Muller (1958).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "normals",
    "philox",
    "rademachers",
    "random_numbers",
    "random_perturb_",
    "randomly_perturbed",
    "rounded_stochastically",
    "rounding_words",
    "words_of",
]

Tensors = Sequence[Tensor]


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:  # (4, n) int64 in [0, 2^32), both
    """Philox4x32-10 of n counters."""
    mask = 0xFFFFFFFF

    def product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:  # the upper and the lower 32 bits of 64, which an int64 cannot hold
        partial = [a * ((b >> shift) & 0xFF) for shift in (0, 8, 16, 24)]  # a b = sum of partial[i] 2^(8 i), each below 2^40
        carried = partial[0]
        low = carried & 0xFF
        for i in (1, 2, 3):
            carried = (carried >> 8) + partial[i]
            low = low | (carried & 0xFF) << 8 * i
        return carried >> 8, low

    c0, c1, c2, c3 = counter
    for i in range(10):
        key0, key1 = (key[0] + i * 0x9E3779B9) & mask, (key[1] + i * 0xBB67AE85) & mask
        high0, low0 = product(0xD2511F53, c0)
        high1, low1 = product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
    return torch.stack([c0, c1, c2, c3])


def words_of(elements: Tensor, rows: Tensor, seed: int, stream: int) -> tuple[Tensor, Tensor]:
    """For each element (n,), of a row (n,), all words (4, n) of its counter, and which of them (n,) is its own."""
    counter = elements // 1024 * 256 + elements % 256
    words = philox(torch.stack([counter & 0xFFFFFFFF, counter >> 32, rows, torch.full_like(rows, stream)]), (seed & 0xFFFFFFFF, seed >> 32))
    return words, elements % 1024 // 256


def rademachers(words: Tensor, own: Tensor) -> Tensor:
    """-1 where bit 31 of the element's word is set, else 1."""
    return 1.0 - 2.0 * (words.gather(0, own[None])[0] >> 31).to(torch.float64)


def normals(words: Tensor, own: Tensor) -> Tensor:
    """Words 0 and 1 make two normals, words 2 and 3 two more."""
    a, b = (words.gather(0, (own // 2 * 2 + i)[None])[0] >> 8 for i in (0, 1))
    radius = torch.sqrt(-2 * torch.log((a + 1).to(torch.float64) * 2.0**-24))
    angle = 2 * math.pi * (b.to(torch.float64) * 2.0**-24)
    return radius * torch.where(own % 2 == 0, torch.cos(angle), torch.sin(angle))


def positions(tensors: Tensors) -> Tensor:  # the shape of the tensors
    """Each element's position in memory where the tensors fill theirs in one order, otherwise in C order."""
    first = tensors[0]
    numbers = torch.arange(first.numel())
    if all(t.is_contiguous() for t in tensors) or any(t.stride() != first.stride() for t in tensors):
        return numbers.view(first.shape)
    expected = 1
    for stride, size in sorted(zip(first.stride(), first.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return numbers.view(first.shape)
            expected *= size
    return numbers.as_strided(first.shape, first.stride())


def random_numbers(rows: Sequence[Tensors], seed: int, distribution: str) -> list[Tensor]:  # n float64, shaped as each row's tensors
    """z of every row, whose tensors decide in which order elements are counted."""
    elements = [positions(tensors) for tensors in rows]
    numels = [numbers.numel() for numbers in elements]
    if not sum(numels):
        return [numbers.to(torch.float64) for numbers in elements]
    flat = torch.cat([numbers.reshape(-1) for numbers in elements])
    words, own = words_of(flat, torch.arange(len(rows)).repeat_interleave(torch.tensor(numels)), seed, 0)
    z = (normals if distribution == "normal" else rademachers)(words, own)
    return [part.view(numbers.shape) for part, numbers in zip(torch.split(z, numels), elements, strict=True)]


def rounding_words(tensors: Tensors, row: int, seed: int) -> Tensor:  # the shape of the tensors, int64
    """The word of each element of one row by which a result is rounded."""
    elements = positions(tensors)
    words, own = words_of(elements.reshape(-1), torch.full((elements.numel(),), row), seed, 1)
    return words.gather(0, own[None])[0].view(elements.shape)


def rounded_stochastically(x: Tensor, words: Tensor) -> Tensor:  # float32; int64; bfloat16, all of one shape
    """The lower half of x's bits is cut off after the upper half of a random word was added to it."""
    bits = (x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF) + (words >> 16)
    upper = (bits >> 16).to(torch.int32) << 16
    return torch.where(x.isfinite(), upper.view(torch.float32), x).to(torch.bfloat16)


def randomly_perturbed(p: Tensor, z: Tensor, scale: float) -> Tensor:
    """p + scale z."""
    return p + scale * z


def random_perturb_(
    params: Tensors,  # n tensors
    old_params: Tensors,  # n tensors
    *,
    seed: int,
    scale: float,
    distribution: str,
    from_old: bool = False,
) -> None:
    """old_p <- p (unless ``from_old``), then p <- old_p + scale z."""
    rows = list(zip(params, old_params, strict=True))
    for (p, old_p), z in zip(rows, random_numbers(rows, seed, distribution), strict=True):
        if not from_old:
            old_p.copy_(p)
        p.copy_(randomly_perturbed(old_p, z, scale))
