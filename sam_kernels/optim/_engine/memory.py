"""Tensors that directions and descent rules keep for each parameter between steps: moving averages, the last orthogonal gradient.

They live outside ``optimizer.state``, where torch's Adam would take a parameter that has one for initialised, and travel in checkpoints
under the parameter's state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sam_kernels.optim._engine.lists import GroupLists
from sam_kernels.optim._shards.dtensor import as_owner, local_of
from sam_kernels.optim._types import StateDict

__all__ = ["ParamMemory"]


class ParamMemory:
    """By name, a tensor for each parameter that has one. ``names`` are those that the direction and the descent rule in use keep.

    ``spoiled``: () float32 on the device, set where the gradients that were kept last are those of a skipped step; None where they are not.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        # What is kept for a parameter goes with it.
        self._tensors: dict[str, MutableMapping[Tensor, Tensor]] = {name: WeakTensorKeyDictionary() for name in self.names}
        # What put_all was given last, until somebody asks for it by parameter: hashing a tensor is a call into Python.
        self._by_lists: dict[str, list[tuple[GroupLists, list[Tensor]]]] = {}
        self._version = object()  # another one whenever other tensors are kept; not a number, which a copy would share
        self.spoiled: Tensor | None = None

    def __getstate__(self) -> StateDict:
        is_spoiled = self.is_spoiled
        return {"names": self.names, "tensors": {name: {} if is_spoiled else dict(self._kept(name).items()) for name in self.names}}

    def __setstate__(self, state: StateDict) -> None:
        self.names, self._version, self.spoiled, self._by_lists = state["names"], object(), None, {}
        self._tensors = {
            name: WeakTensorKeyDictionary(kept) for name, kept in (state["tensors"] if "tensors" in state else state["_tensors"]).items()
        }

    def _kept(self, name: str) -> MutableMapping[Tensor, Tensor]:
        """What is kept, by parameter."""
        rows = self._by_lists.pop(name, None)
        if rows is not None:
            self._tensors[name] = WeakTensorKeyDictionary()
            for lists, tensors in rows:
                self._tensors[name].update(_owned(lists, tensors))
        return self._tensors[name]

    def known(self, name: str, lists: GroupLists) -> list[Tensor] | None:
        """What is kept for these parameters, if that was described for them; nothing is looked up."""
        known = lists.memory.get(name)
        return known[1] if known is not None and known[0] is self._version else None

    def of(self, name: str, lists: GroupLists) -> list[Tensor | None]:
        """What is kept for the parameters of ``lists``, None for one that has nothing; as operations take it where nothing is missing."""
        known = self.known(name, lists)
        if known is None:
            entries = self.entries(name, lists.owners)
            if any(entry is None for entry in entries):
                return [None if entry is None else local_of(entry) for entry in entries]
            # Described once: nobody else has these tensors, so they lie where they lay.
            known = lists.grads([local_of(entry) for entry in cast("list[Tensor]", entries)])
            lists.memory[name] = (self._version, known)
        return cast("list[Tensor | None]", known)

    def entries(self, name: str, params: Iterable[Tensor]) -> list[Tensor | None]:
        """What is kept for each parameter, looked up anew."""
        kept = self._kept(name)
        return [kept.get(param) for param in params]

    def has(self, name: str) -> bool:
        """Whether anything is kept under this name."""
        return len(self._kept(name)) > 0

    def of_or_zeros(self, name: str, lists: GroupLists) -> list[Tensor]:
        """As :meth:`of`, beginning with zeros."""
        entries = self.of(name, lists)
        if any(entry is None for entry in entries):
            zeros = [torch.zeros_like(param) if entry is None else entry for param, entry in zip(lists.params, entries, strict=True)]
            self.put(name, lists, zeros)
            entries = self.of(name, lists)
        return cast("list[Tensor]", entries)

    def put(self, name: str, lists: GroupLists, tensors: Iterable[Tensor]) -> None:
        """Keeps ``tensors``, one for each parameter of ``lists``; those of DTensors as DTensors, which checkpoints know how to shard."""
        self._kept(name).update(_owned(lists, tensors))
        self._version = object()

    def put_all(self, name: str, kept: Sequence[tuple[GroupLists, list[Tensor]]]) -> None:
        """Keeps these tensors, one for each parameter of each lists, and nothing for any other parameter."""
        self._by_lists[name], self._tensors[name] = list(kept), {}
        self._version = object()
        for lists, tensors in kept:
            lists.memory[name] = (self._version, tensors)

    @property
    def is_spoiled(self) -> bool:
        """Whether what is kept counts as nothing. Waits for the device."""
        return self.spoiled is not None and self.spoiled.item() != 0.0

    # --- checkpoints ---

    def saved(self, state_dict: StateDict, params: Sequence[Tensor], *, blanks: bool) -> StateDict:
        """``state_dict`` with what is kept.

        ``blanks``: a parameter that has nothing gets NaN, which nothing that is kept is. So has the checkpoint of an optimizer that made
        no step of its own all the keys that ``torch.distributed.checkpoint`` fills when it loads another's into it. A parameter without
        state of the base, where others have some, gets none: the base would take it for initialised.
        """
        if not self.names:
            return state_dict
        state = _copied(state_dict["state"])
        has_state = {param_id for param_id in _ids(state_dict) if param_id in state}
        is_spoiled = self.is_spoiled
        for param_id, param in zip(_ids(state_dict), params, strict=True):
            for name in self.names:
                kept = None if is_spoiled else self._kept(name).get(param)
                if kept is None and blanks and (param_id in has_state or not has_state):
                    kept = torch.full_like(param, torch.nan, requires_grad=False)
                if kept is not None:
                    state.setdefault(param_id, {})[name] = kept
        return {**state_dict, "state": state}

    def taken_out(self, state_dict: StateDict, params: Sequence[Tensor]) -> tuple[StateDict, ParamMemory]:
        """The base optimizer's part of a checkpoint, and what was kept as a memory of its own: nothing here changes before
        :meth:`replace`, since torch may still refuse the checkpoint."""
        found = ParamMemory(self.names)
        if not self.names or len(_ids(state_dict)) != len(params):  # torch says what is wrong
            return state_dict, found
        state = _copied(state_dict["state"])
        for param_id, param in zip(_ids(state_dict), params, strict=True):
            for name in self.names:
                kept = state.get(param_id, {}).pop(name, None)
                if kept is None or _is_blank(kept):
                    continue
                if kept.shape != param.shape:
                    raise ValueError(f"SAM: {name} in the checkpoint has shape {tuple(kept.shape)}, its parameter {tuple(param.shape)}")
                found._tensors[name][param] = torch.empty_like(param, dtype=kept.dtype, requires_grad=False).copy_(kept)
        emptied = [key for key, value in state.items() if isinstance(value, dict) and not value and state_dict["state"][key]]
        return {**state_dict, "state": {key: value for key, value in state.items() if key not in emptied}}, found

    def adopt(self, state: Mapping[Any, Any]) -> None:
        """Takes over what the base has loaded among its own state, out of a checkpoint that carries what is kept here."""
        found = ParamMemory(self.names)
        for param, entry in state.items():
            for name in self.names:
                if isinstance(param, Tensor) and isinstance(entry, dict) and name in entry:
                    kept = entry.pop(name)
                    if not _is_blank(kept):
                        found._tensors[name][param] = kept
        if any(map(found.has, self.names)):
            self.replace(found)

    def replace(self, other: ParamMemory) -> None:
        """What ``other`` keeps in the place of what is kept here."""
        self._tensors, self._by_lists = other._tensors, other._by_lists
        self._version, self.spoiled = object(), None


def _owned(lists: GroupLists, tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter with its tensor; that of a DTensor as a DTensor."""
    return ((owner, as_owner(owner, local_of(tensor))) for owner, tensor in zip(lists.owners, tensors, strict=True))


def _is_blank(kept: Tensor) -> bool:
    """Of a DTensor each rank answers for its own part; one without elements is none that is missing."""
    local = local_of(kept)
    return local.numel() > 0 and bool(local.isnan().all())


def _copied(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """As deep as parameters' entries are; a hook may have put other things beside them."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in state.items()}


def _ids(state_dict: StateDict) -> list[Any]:
    return list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
