"""Stochastic rounding to bfloat16: of the perturbed weights, and of updates; the seeds of both."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from sam_kernels._validate import describe
from sam_kernels.optim._engine.lists import GroupLists, Key, param_name
from sam_kernels.optim._engine.update import is_fused_type
from sam_kernels.optim._seeds import derived_seed
from sam_kernels.optim._types import ParamGroup

__all__ = ["NO_ROUNDING", "Rounding", "check_rounding", "part_seed"]

_ASCENT, _UPDATE = 1, 2  # the kinds of seeds


@dataclass(frozen=True, slots=True)
class Rounding:
    """What is rounded stochastically. Seeds are functions of the step, the micro-batch and the list, so that a run that is continued from a
    checkpoint, and every replica, draws the same numbers."""

    of_ascent: bool = False
    of_update: bool = False

    def ascent_seed(self, lists: GroupLists, key: Key, t: Any, micro_batch: int) -> int | None:
        """The ``rounding_seed`` of a perturbation; None where it is rounded to nearest."""
        return part_seed(lists, derived_seed(_ASCENT, int(t), micro_batch, *key)) if self.of_ascent else None

    def update_seed(self, lists: GroupLists, key: Key, t: Any, uncounted: int) -> int | None:
        """The ``rounding_seed`` of an update. ``uncounted``: plain steps since the optimizer was made, which t does not count."""
        return part_seed(lists, derived_seed(_UPDATE, int(t), uncounted, *key)) if self.of_update else None


NO_ROUNDING = Rounding()


def part_seed(lists: GroupLists, seed: int) -> int:
    """Random numbers are a function of an element's place in its list, so that each part of a tensor needs a seed of its own."""
    return seed if lists.layout.part == 0 else derived_seed(seed, lists.layout.part)


def check_rounding(stochastic_rounding: Any, *, base: Optimizer, has_masters: bool, capturable: bool) -> Rounding:
    """Checks the option of :class:`sam_kernels.SAM`. Raises TypeError or ValueError."""
    if not isinstance(stochastic_rounding, bool) and stochastic_rounding != "update":
        raise TypeError(f"SAM: stochastic_rounding must be True, False or 'update', got {describe(stochastic_rounding)}")
    rounding = Rounding(bool(stochastic_rounding), stochastic_rounding == "update")
    if not rounding.of_ascent:
        return NO_ROUNDING
    if capturable:
        raise ValueError("SAM: stochastic_rounding with capturable=True: a graph would draw the same numbers at each replay; leave one out")
    if rounding.of_update and has_masters:
        raise ValueError(
            "SAM: stochastic_rounding='update' with master_weights=True: masters are updated in float32, with nothing to round; "
            "stochastic_rounding=True is for the perturbed weights"
        )
    if rounding.of_update and not is_fused_type(base):
        raise ValueError(
            f"SAM: stochastic_rounding='update': {type(base).__name__} rounds its update by itself; use SGD, Adam or AdamW, or "
            "stochastic_rounding=True for the perturbed weights alone"
        )
    _check_dtypes(base.param_groups)
    return rounding


def _check_dtypes(groups: Sequence[ParamGroup]) -> None:
    """Raises ValueError for a float16 parameter; warns where none is bfloat16."""
    dtypes = set()
    for i, group in enumerate(groups):
        for j, param in enumerate(group["params"]):
            dtypes.add(param.dtype)
            if param.dtype is torch.float16:
                raise ValueError(
                    f"SAM: stochastic_rounding: parameter {param_name(group, i, j)} is float16; stochastic rounding is for bfloat16, whose "
                    "bits are a float32's upper ones; convert the model to bfloat16, or leave stochastic_rounding out"
                )
    if dtypes and torch.bfloat16 not in dtypes:
        warnings.warn(
            "SAM: stochastic_rounding has nothing to do: no parameter is bfloat16; leave it out, or convert the model first",
            UserWarning,
            stacklevel=4,
        )
