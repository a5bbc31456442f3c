"""Saved tensors that may be read before their node runs, inside checkpoints too.

A checkpoint (``use_reentrant=False``) is a pair of hooks on saved tensors, which gives each tensor once in a backward pass: to the node
that saved it. A rule of ``_node_rules.py`` reads the tensors just before the node does. In calls of modules with such nodes a second pair
of hooks lies over the checkpoint's: it stores what the checkpoint's hook makes of a tensor, and keeps a tensor that a rule has read for
the node.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["Rereadable", "reading", "top_hooks"]

# The pair of hooks (checkpoint, save_on_cpu) that tensors are saved with now, or None. Not public; without it ``None`` is never the answer.
top_hooks: Callable[[bool], Any] = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)
_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: 0)  # -1 outside of a backward pass


class _Thread(threading.local):
    """A backward pass runs in a thread for each device."""

    def __init__(self) -> None:
        self.read: list[_Held] | None = None  # what a rule has read; None: no rule is running
        self.kept: list[weakref.ref[_Held]] = []  # what rules have read in this pass: a node need not ask for all of it, nor run
        self.opened: list[tuple[object, nn.Module, saved_tensors_hooks]] = []  # by whom, and in the call of which module


_thread = _Thread()


class _Held:
    """What the hook below has made of a tensor, and the tensor itself from its first reading to its node's."""

    __slots__ = ("__weakref__", "packed", "tensor")

    def __init__(self, packed: Any) -> None:
        self.packed = packed
        self.tensor: Tensor | None = None


class _Pack:
    def __init__(self, below: Callable[[Tensor], Any]) -> None:
        self._below = below

    def __call__(self, tensor: Tensor) -> _Held:
        return _Held(self._below(tensor))


class _Unpack:
    def __init__(self, below: Callable[[Any], Tensor]) -> None:
        self._below = below

    def __call__(self, held: _Held) -> Tensor:
        tensor = self._below(held.packed) if held.tensor is None else held.tensor
        if _thread.read is None:
            held.tensor = None
        elif held.tensor is None:
            held.tensor = tensor
            _thread.read.append(held)
        return tensor


@contextmanager
def reading() -> Iterator[None]:
    """While a rule reads saved tensors."""
    before, _thread.read = _thread.read, []
    try:
        yield
    finally:
        _thread.kept += map(weakref.ref, _thread.read)
        _thread.read = before
        if _graph_task() == -1:  # the backward pass is over
            _forget()


def _forget() -> None:
    for ref in _thread.kept:
        held = ref()
        if held is not None:
            held.tensor = None
    _thread.kept.clear()


class Rereadable:
    """Hooks of modules in whose calls saved tensors may be read by rules. Without hooks on saved tensors it does nothing."""

    def __init__(self) -> None:
        self.may_be_needed = True  # until a forward pass has shown that there are no hooks on saved tensors
        self._is_needed: bool | None = None  # None: no module was called

    def enter(self, module: nn.Module, *_: Any) -> None:
        """A pre-hook."""
        hooks = top_hooks(False)
        self._is_needed = bool(self._is_needed) or hooks is not None
        if not isinstance(hooks, tuple) or isinstance(hooks[0], _Pack):
            return
        over = saved_tensors_hooks(_Pack(hooks[0]), _Unpack(hooks[1]))
        over.__enter__()
        _thread.opened.append((self, module, over))

    def leave(self, module: nn.Module, *_: Any) -> None:
        """A hook that is always called."""
        if _thread.opened and _thread.opened[-1][0] is self and _thread.opened[-1][1] is module:
            _thread.opened.pop()[2].__exit__()

    def stop(self) -> None:
        """At the end of a pass: takes off the hooks that an interrupt has left."""
        self.may_be_needed = self._is_needed is not False
        _forget()
        while _thread.opened and _thread.opened[-1][0] is self:
            _thread.opened.pop()[2].__exit__()
