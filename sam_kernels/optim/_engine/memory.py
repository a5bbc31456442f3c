"""Tensors that are kept for each parameter between steps: moving averages of a direction, the last orthogonal gradient, float32 masters.

They live outside ``optimizer.state``, where torch's Adam would take a parameter that has one for initialised, and travel in checkpoints
under the parameter's state.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sam_kernels.optim._engine.lists import GroupLists
from sam_kernels.optim._shards.dtensor import as_owner, local_of
from sam_kernels.optim._types import StateDict

__all__ = ["MASTER", "NARROW", "ParamMemory"]

NARROW = (torch.bfloat16, torch.float16)  # dtypes of parameters that can have masters
MASTER = "master_param"  # the name of float32 masters, in checkpoints too


class ParamMemory:
    """By name, a tensor for each parameter that has one. ``names`` are those that the direction and the descent rule in use keep; the
    optimizer keeps its own under :data:`MASTER`, with ``has_masters``.

    ``spoiled``: () float32 on the device, set where the gradients that were kept last are those of a skipped step; None where they are not.
    """

    def __init__(self, names: Sequence[str] = (), *, has_masters: bool = False) -> None:
        self.names = tuple(names)
        self.has_masters = has_masters
        # What is kept for a parameter goes with it.
        self._tensors: dict[str, MutableMapping[Tensor, Tensor]] = {name: WeakTensorKeyDictionary() for name in self.all_names}
        # What put_all was given last, until somebody asks for it by parameter: hashing a tensor is a call into Python.
        self._by_lists: dict[str, list[tuple[GroupLists, list[Tensor]]]] = {}
        # By name: another one whenever other tensors are kept; not a number, which a copy would share.
        self._versions: dict[str, object] = {}
        self.spoiled: Tensor | None = None

    @property
    def all_names(self) -> tuple[str, ...]:
        """Those of a direction, of a descent rule and of the optimizer itself."""
        return (*self.names, MASTER) if self.has_masters else self.names

    def emptied(self) -> ParamMemory:
        """A memory of the same names, which keeps nothing."""
        return ParamMemory(self.names, has_masters=self.has_masters)

    def __getstate__(self) -> StateDict:
        tensors = {name: {} if self._is_spoiled(name) else dict(self._kept(name).items()) for name in self.all_names}
        return {"names": self.names, "has_masters": self.has_masters, "tensors": tensors}

    def __setstate__(self, state: StateDict) -> None:
        self.names, self.has_masters = state["names"], state.get("has_masters", False)  # earlier versions have none
        self._versions, self.spoiled, self._by_lists = {}, None, {}
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
        return known[1] if known is not None and known[0] is self.version(name) else None

    def of(self, name: str, lists: GroupLists) -> list[Tensor | None]:
        """What is kept for the parameters of ``lists``, None for one that has nothing; as operations take it where nothing is missing."""
        known = self.known(name, lists)
        if known is None:
            entries = self.entries(name, lists.owners)
            if any(entry is None for entry in entries):
                return [None if entry is None else local_of(entry) for entry in entries]
            # Described once: nobody else has these tensors, so they lie where they lay.
            known = lists.grads([local_of(entry) for entry in cast("list[Tensor]", entries)])
            lists.memory[name] = (self.version(name), known)
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
        self._versions[name] = object()

    def put_all(self, name: str, kept: Sequence[tuple[GroupLists, list[Tensor]]]) -> None:
        """Keeps these tensors, one for each parameter of each lists, and nothing for any other parameter."""
        self._by_lists[name], self._tensors[name] = list(kept), {}
        self._versions[name] = object()
        for lists, tensors in kept:
            lists.memory[name] = (self.version(name), tensors)

    def version(self, name: str) -> object:
        """Another object whenever other tensors are kept under this name."""
        return self._versions.setdefault(name, object())

    @property
    def is_spoiled(self) -> bool:
        """Whether what is kept counts as nothing. Waits for the device."""
        return self.spoiled is not None and self.spoiled.item() != 0.0

    def _is_spoiled(self, name: str) -> bool:
        return name != MASTER and self.is_spoiled

    # --- checkpoints ---

    def saved(
        self, state_dict: StateDict, params: Sequence[Tensor], *, blanks: bool, without: Collection[tuple[int, str]] = ()
    ) -> StateDict:
        """``state_dict`` with what is kept, but for the names in ``without``, each with the number of the parameter.

        ``blanks``: a parameter that has nothing gets NaN, which nothing that is kept is. So has the checkpoint of an optimizer that made
        no step of its own all the keys that ``torch.distributed.checkpoint`` fills when it loads another's into it. A master that is not
        there yet is what it would be made. A parameter without state of the base, where others have some, gets none: the base would take
        it for initialised.
        """
        if not self.all_names:
            return state_dict
        state = _copied(state_dict["state"])
        has_state = {param_id for param_id in _ids(state_dict) if param_id in state}
        are_spoiled = {name: self._is_spoiled(name) for name in self.all_names}
        for i, (param_id, param) in enumerate(zip(_ids(state_dict), params, strict=True)):
            for name in [name for name in self.all_names if (i, name) not in without]:
                kept = None if are_spoiled[name] else self._kept(name).get(param)
                if kept is None and (blanks or name == MASTER) and (param_id in has_state or not has_state):
                    kept = _blank(name, param)
                if kept is not None:
                    state.setdefault(param_id, {})[name] = kept
        return {**state_dict, "state": state}

    def taken_out(self, state_dict: StateDict, params: Sequence[Tensor]) -> tuple[StateDict, ParamMemory]:
        """The base optimizer's part of a checkpoint, and what was kept as a memory of its own: nothing here changes before
        :meth:`replace`, since torch may still refuse the checkpoint. Masters are taken out by an optimizer that has none, too."""
        found, names = self.emptied(), self.all_names
        if len(_ids(state_dict)) != len(params):  # torch says what is wrong
            return state_dict, found
        state = _copied(state_dict["state"])
        for param_id, param in zip(_ids(state_dict), params, strict=True):
            entry = state.get(param_id)
            if not isinstance(entry, dict):  # ZeRO has None for what other ranks have
                continue
            for name in dict.fromkeys((*names, MASTER)):
                kept = entry.pop(name, None)
                if kept is None or name not in names or (name == MASTER and param.dtype not in NARROW) or _is_blank(kept):
                    continue
                if kept.shape != param.shape:
                    raise ValueError(f"SAM: {name} in the checkpoint has shape {tuple(kept.shape)}, its parameter {tuple(param.shape)}")
                dtype = torch.float32 if name == MASTER else kept.dtype
                found._tensors[name][param] = torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(kept)
        emptied = [key for key, value in state.items() if isinstance(value, dict) and not value and state_dict["state"][key]]
        return {**state_dict, "state": {key: value for key, value in state.items() if key not in emptied}}, found

    def warn_of_masters(self, state_dict: StateDict, params: Sequence[Tensor]) -> None:
        """Warns where masters are made from 16-bit parameters, or dropped, because only one of checkpoint and optimizer has them."""
        entries = [state_dict["state"].get(param_id) for param_id in _ids(state_dict)]
        pairs = [(each, param) for each, param in zip(entries, params, strict=False) if isinstance(each, dict) and each]
        count = sum(MASTER in entry for entry, _ in pairs)
        dropped = sum(MASTER in entry and not (self.has_masters and param.dtype in NARROW) for entry, param in pairs)
        missing = sum(MASTER not in entry and param.dtype in NARROW for entry, param in pairs) if self.has_masters else 0
        if missing:
            narrow = sum(param.dtype in NARROW for _, param in pairs)
            message = (
                f"SAM: the checkpoint has no float32 masters of {missing} of {narrow} 16-bit parameters, so they are made from the weights "
                "as they are at the next step"
            )
        elif dropped:
            why = (
                "the parameters are no 16-bit parameters here" if self.has_masters else "an optimizer without master_weights=True has none"
            )
            message = (
                f"SAM: the checkpoint has float32 masters of {count} parameters, of which {dropped} are dropped, since {why}: training "
                "goes on from the weights"
            )
        else:
            return
        warnings.warn(message, UserWarning, stacklevel=4)

    def adopt(self, state: Mapping[Any, Any]) -> None:
        """Takes over what the base has loaded among its own state, out of a checkpoint that carries what is kept here."""
        found = self.emptied()
        for param, entry in state.items():
            for name in self.all_names:
                if isinstance(param, Tensor) and isinstance(entry, dict) and name in entry:
                    kept = entry.pop(name)
                    if not _is_blank(kept):
                        found._tensors[name][param] = kept
        if any(map(found.has, self.all_names)):
            self.replace(found)

    def strip(self, state: Mapping[Any, Any]) -> None:
        """Takes what is kept out of the state that the base has loaded."""
        for entry in state.values():
            for name in (*self.names, MASTER) if isinstance(entry, dict) else ():
                entry.pop(name, None)

    def replace(self, other: ParamMemory) -> None:
        """What ``other`` keeps in the place of what is kept here."""
        self._tensors, self._by_lists = other._tensors, other._by_lists
        self._versions, self.spoiled = {}, None


def _owned(lists: GroupLists, tensors: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter with its tensor; that of a DTensor as a DTensor."""
    return ((owner, as_owner(owner, local_of(tensor))) for owner, tensor in zip(lists.owners, tensors, strict=True))


def _is_blank(kept: Tensor) -> bool:
    """Of a DTensor each rank answers for its own part; one without elements is none that is missing."""
    local = local_of(kept)
    return local.numel() > 0 and bool(local.isnan().all())


def _blank(name: str, param: Tensor) -> Tensor | None:
    if name != MASTER:
        return torch.full_like(param, torch.nan, requires_grad=False)
    is_missing = param.requires_grad and param.dtype in NARROW
    return as_owner(param, local_of(param).detach().to(torch.float32)) if is_missing else None


def _copied(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """As deep as parameters' entries are; a hook may have put other things beside them."""
    return {key: dict(value) if isinstance(value, dict) else value for key, value in state.items()}


def _ids(state_dict: StateDict) -> list[Any]:
    return list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
