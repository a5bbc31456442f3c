"""The methods that are measured, and who takes part in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bench.byte_model import family_passes
from bench.family import lean, ours, packages, published
from bench.family.options import LOOK_EVERY
from bench.providers.base import Base, Provider, Stepper

__all__ = ["METHODS", "Method"]


@dataclass(frozen=True)
class Method:
    """``every``: the steps of a cycle, which is what is timed. ``more_lists``: the lists held beside SAM's, at most. ``copied``:
    sweeps of a step that copy the first gradients, which the benchmark keeps. After a backward pass the optimizer takes them over."""

    name: str
    title: str
    providers: tuple[Provider, ...]
    more_lists: int
    every: int = 1
    copied: int = 0

    def passes(self, base: str) -> int:
        return family_passes(self.name, base, self.every)

    def timed(self) -> dict[str, Provider]:
        """By name, as ``bench.steps`` times them."""
        return {
            provider.name: provider if self.every == 1 else replace(provider, make=_Cycles(provider, self.every))
            for provider in self.providers
        }


@dataclass(frozen=True)
class _Cycles:
    provider: Provider
    every: int

    def __call__(self, params: Sequence[torch.nn.Parameter], base: Base) -> Stepper:
        return _Cycle(self.provider.make(params, base), self.every)


class _Cycle:
    def __init__(self, stepper: Stepper, every: int) -> None:
        self.stepper = stepper
        self.every = every

    def first_step(self) -> None:
        """The whole cycle is in :meth:`second_step`."""

    def second_step(self) -> None:
        for _ in range(self.every):
            self.stepper.first_step()
            self.stepper.second_step()


METHODS = {
    method.name: method
    for method in (
        Method("vasso", "VaSSO", (*ours.VASSO, *published.VASSO, *lean.VASSO), more_lists=1),
        Method("fsam", "F-SAM", (*ours.FRIENDLY, *published.FRIENDLY, *packages.FRIENDLY, *lean.FRIENDLY), more_lists=2),
        Method("gsam", "GSAM", (*ours.GSAM, *packages.GSAM), more_lists=3, copied=2),
        Method("wsam", "WSAM", (*ours.WSAM, *packages.WSAM), more_lists=3, copied=2),
        Method(
            "looksam",
            f"LookSAM, a cycle of {LOOK_EVERY} steps",
            (*ours.LOOKSAM, *packages.LOOKSAM),
            more_lists=3,
            every=LOOK_EVERY,
            copied=2,
        ),
    )
}
