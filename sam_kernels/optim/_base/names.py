"""Whose state a checkpoint holds: names of direction, descent rule and base optimizer, and of the optimizer that weights samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.optim import Optimizer

from sam_kernels.optim._types import ParamGroup, StateDict

__all__ = ["Names", "beta_key"]

_DEFAULTS = {"direction": "gradient", "descent": "plain"}
_MARK = "sam_saved_by:"
_MASTERS = "/master_weights"  # at the end of a mark


def beta_key(base: Optimizer, groups: Sequence[ParamGroup]) -> str | None:
    """The key of RW-SAM's β in a checkpoint of RW-SAM around such a base; None where ``groups`` have something else under that key."""
    key = "sam_beta" if "beta" in base.defaults else "beta"
    return None if any(key in group for group in groups) else key


@dataclass(frozen=True, slots=True)
class Names:
    """Whose state it is: what is kept for one direction, or by one base optimizer, means nothing to another.

    Every saved group has a mark: a key that is made of all names. ``torch.distributed.checkpoint.load`` writes into live tensors and looks
    for keys alone; it refuses the checkpoint of another optimizer before it reads anything, since the mark is not in there.

    Attributes:
        keys: where the names of direction and descent rule lie in a group.
        weighted: name of the optimizer, where that is one that weights samples ("RWSAM"); empty otherwise. Checkpoints of before have a
            mark without it, and are told apart by β.
        beta: where β lies in a group of such an optimizer; None where that cannot be told from an option of somebody else.
        has_masters: the mark says so, since ``torch.distributed.checkpoint.load`` would leave masters out without a word; :meth:`remove`
            takes either.
    """

    direction: str
    descent: str
    base: str
    keys: Mapping[str, str]
    weighted: str
    beta: str | None
    has_masters: bool

    @property
    def mark(self) -> str:
        """The key by which a checkpoint of this optimizer is recognised."""
        return f"{self._mark_without_masters}{_MASTERS if self.has_masters else ''}"

    @property
    def _mark_without_masters(self) -> str:
        return f"{self._mark_of_before}/{self.weighted}" if self.weighted else self._mark_of_before

    @property
    def _mark_of_before(self) -> str:
        return f"{_MARK}{self.direction}/{self.descent}/{self.base}"

    def marked_as(self, groups: Sequence[ParamGroup]) -> Names:
        """These names, with masters where the marks in ``groups`` have them."""
        marks = [key for group in groups for key in group if isinstance(key, str) and key.startswith(_MARK)]
        return replace(self, has_masters=any(mark.endswith(_MASTERS) for mark in marks)) if marks else self

    def is_own(self, key: str) -> bool:
        """Whether ``key`` of a saved group is a name, a mark or a β, of whatever optimizer."""
        return key in self.keys.values() or key.startswith(_MARK) or key == self.beta

    def split(self, key: str) -> tuple[str, str]:
        """``<parameter>.<key of a group>`` in two: names of parameters have dots, and those in a mark may."""
        name, dot, mark = key.partition(f".{_MARK}")
        if dot:
            return name, _MARK + mark
        name, _, key = key.rpartition(".")
        return name, key

    def added(self, state_dict: StateDict) -> StateDict:
        """``state_dict`` with the names in each group. The usual direction and descent rule are named by the mark alone."""
        names: dict[str, Any] = {self.keys[part]: name for part, name in self._both() if name != _DEFAULTS[part]}
        names[self.mark] = True
        return {**state_dict, "param_groups": [{**group, **names} for group in state_dict["param_groups"]]}

    def removed(self, state_dict: StateDict, step_key: str) -> StateDict:
        """The way back. Raises ValueError where they are others. The base optimizer's own checkpoint has none, and fits all."""
        groups = [dict(group) for group in state_dict["param_groups"]]
        for group in groups:
            self.remove(group, is_ours=step_key in group)
        return {**state_dict, "param_groups": groups}

    def remove(self, group: ParamGroup, *, is_ours: bool) -> None:
        """Takes the names out of a group. ``is_ours``: what goes unsaid is the usual name, otherwise any."""
        for part, name in self._both():
            saved = group.get(self.keys[part], _DEFAULTS[part] if is_ours else name)
            if saved != name:
                raise ValueError(f"SAM: the checkpoint is of {part} {saved!r}, this optimizer has {part} {name!r}")
        marks = [key for key in group if isinstance(key, str) and key.startswith(_MARK)]
        if is_ours or marks:
            self._check_beta(group)
        for mark in marks:
            if mark.removesuffix(_MASTERS) not in (self._mark_without_masters, self._mark_of_before):
                raise ValueError(
                    f"SAM: the checkpoint is of {mark.removeprefix(_MARK)} (direction/descent rule/base optimizer), this optimizer is "
                    f"{self.mark.removeprefix(_MARK)}; to load the values that both have, take {mark!r} out of its param_groups"
                )
        for key in (*self.keys.values(), *marks):
            group.pop(key, None)

    def _check_beta(self, group: ParamGroup) -> None:
        if self.weighted and self.beta not in group:
            raise ValueError(
                f"{self.weighted}: the checkpoint has no {self.beta!r} in its param_groups: it is of an optimizer that does not weight "
                f"samples; to load the values that both have, put {self.beta!r} into each of them (None: this optimizer's own)"
            )
        if not self.weighted and self.beta in group:
            raise ValueError(
                f"SAM: the checkpoint has {self.beta!r} in its param_groups: it is of RWSAM, and this optimizer does not weight samples; "
                f"to load the values that both have, take {self.beta!r} and the key that begins with {_MARK!r} out of each of them"
            )

    def _both(self) -> tuple[tuple[str, str], tuple[str, str]]:
        return ("direction", self.direction), ("descent", self.descent)
