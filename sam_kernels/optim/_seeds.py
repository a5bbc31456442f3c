"""Seeds for the random numbers of one step out of the optimizer's own: a run that is continued from a checkpoint draws the same ones."""

from __future__ import annotations

__all__ = ["derived_seed"]

_MASK = (1 << 64) - 1


def derived_seed(seed: int, *numbers: int) -> int:
    """An integer in [0, 2^64) for each sequence of numbers, by the mixer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    for number in numbers:
        seed = _mixed((seed + (number + 1) * 0x9E3779B97F4A7C15) & _MASK)
    return seed


def _mixed(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
