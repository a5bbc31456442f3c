"""Parameters of modules without a rule: where their values meet the batch, found in autograd's graph.

A value that is computed from parameters alone has no batch: the parameter itself, ``1 + weight``, a standardised kernel, positions of shape
(1, T). It meets the batch in the first node whose output has it. The gradient of that node's output has a row for each sample, from which
the node's rule (``_node_rules.py``) makes every sample's gradient towards the value; autograd takes those back to the parameter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils.checkpoint import CheckpointError

from sam_kernels._sharding import is_dtensor
from sam_kernels.per_sample._call import Call
from sam_kernels.per_sample._node_rules import BATCH_NORMS, ELEMENTWISE, NODE_RULES, is_entered, merged
from sam_kernels.per_sample._rereading import reading
from sam_kernels.per_sample._shards import WholeParams
from sam_kernels.per_sample._terms import Outer

__all__ = ["Loose", "Read", "reads_in"]

Users = Mapping[Any, Sequence[tuple[Any, int, int]]]  # by node: each user, the number of its input, and that of the node's output
_PythonNode: Any = torch.autograd.function.BackwardCFunction
_Leaf: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]  # not declared


@dataclass
class Loose:
    """A module whose parameters are to be looked for in the graph. ``error`` makes the exception, with the reason why they are not found.
    ``is_alias``: the parameters are those of layers elsewhere that have rules; the module may only hold them."""

    name: str
    module: nn.Module
    params: Mapping[str, nn.Parameter]
    error: Callable[[str], Exception]
    is_alias: bool = False

    def is_read(self, calls: Sequence[Call], readers: Mapping[int, Sequence[Any]]) -> bool:
        """Whether the graph is to be searched: always, but for aliases all of whose reads are those of recorded calls."""
        if not self.is_alias:
            return True
        counted = Counter(id(param) for call in calls for param in call.params.values())
        return any(len(readers.get(id(param), ())) != counted[id(param)] for param in self.params.values())


def without_batch(call: Call, batch: int) -> Loose:
    """A layer whose output has no batch: all samples share it, or the batch is one dimension with something else."""
    return Loose(call.name, call.module, call.params, lambda why: call.no_batch(batch, why))


def reads_in(root: Any, loose: Sequence[Loose], batch: int, leads: Mapping[Any, bool], whole: WholeParams) -> list[Read]:
    """The reads of all parameters of these modules. ``leads``: whether a node leads to the output of a recorded call.

    Raises the module's error where a value goes into a node that has no rule.
    """
    users = _users_in(root)
    leaves = {id(node.variable): node for node in users if type(node) is _Leaf}
    may_hide = any(isinstance(node, _PythonNode) for node in (root, *users))
    found: list[Read] = []
    seen: set[int] = set()
    for each in loose:
        for name, param in each.params.items():
            wholes = whole.of(param)
            read = [leaves[id(each)] for each in wholes if id(each) in leaves]
            if not wholes and whole.may_be_among(leaves):
                raise each.error(f"{name}: its module was not called, so that it is not known what its shards were gathered into")
            if not read and may_hide:
                raise each.error(f"{name}: the losses do not show that they depend on it, and come through a function that may hide it")
            if id(param) in seen:
                continue
            seen.add(id(param))
            try:
                for leaf in read:  # none: the losses do not depend on it
                    found += _reads_of(f"{name} of {each.name}", each.module, param, leaf, users, batch, leads)
            except _NoWay as error:
                raise each.error(f"{name}: {error}") from None
    return found


def raise_if_read(error: CheckpointError, reads: Sequence[Read]) -> None:
    """Raise NotImplementedError where the tensors of a checkpoint, which it gives once, were those that a read needs too."""
    if reads and "unpacked once" in str(error):
        names = sorted({read.name for read in reads})
        raise NotImplementedError(
            f"GradNorms: {', '.join(names)}: one of them has no rule and meets the batch inside a checkpoint, but outside the calls of "
            "modules in it, where a checkpoint gives its tensors once. Put the checkpoint around a module, checkpoint(block, x) rather "
            "than around a function; or the parameter into a small module of its own, whose forward uses it; or run the forward pass "
            "without checkpoints. (Where checkpoints were switched on after the engine's first forward pass, a new engine may be enough.)"
        ) from error


class _NoWay(Exception):
    pass


def _users_in(root: Any) -> dict[Any, list[tuple[Any, int, int]]]:
    """All edges of the graph, the other way round."""
    users: dict[Any, list[tuple[Any, int, int]]] = {}
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        for i, (child, nr) in enumerate(node.next_functions):
            if child is None:
                continue
            users.setdefault(child, []).append((node, i, nr))
            if child not in seen:
                seen.add(child)
                stack.append(child)
    return users


class Read(Call):
    """A node in which a value of one parameter meets the batch, in the place of a call of the parameter's module."""

    def __init__(
        self,
        name: str,  # of the parameter, for messages
        module: nn.Module,
        param: nn.Parameter,
        leaf: Any,  # of the parameter, or of what its shards were gathered into
        node: Any,
        index: int,
        value: tuple[Any, int, torch.Size],  # the node that makes the value, the number of its output, the value's shape
        batch: int,
    ) -> None:
        self.name, self.module, self.params = name, module, {"value": param}
        self.rule = self._rule
        self.places, self.span, self.extent, self.extents = {}, None, None, ()
        self.batch_dim, self.merged, self.reads_once = 0, None, False
        self.nodes, self.output_nrs = [node], [0]
        self.leaf, self._node, self._index, self._value = leaf, node, index, value
        self._batch = batch
        shape = node._input_metadata[0].shape
        self._shapes = [torch.Size((batch, shape[0] // batch, *shape[1:]))]
        self._grads: list[Tensor | None] = [None]
        self._awaited = 0
        self._training = [(module, module.training)]

    @property
    def is_recomputed(self) -> bool:
        return False

    @property
    def is_sharded(self) -> bool:
        """Whether values are there during the backward pass alone: behind it, what shards were gathered into is freed."""
        return is_dtensor(self.params["value"])

    @property
    def is_merged(self) -> bool:
        """Whether dimension 0 of the node's output is more than the batch."""
        return self._shapes[0][1] != 1

    @property
    def takes_statistics(self) -> bool:
        """Whether the node takes its statistics from the batch."""
        return type(self._node).__name__ in BATCH_NORMS and bool(self._node._saved_training)

    @property
    def signature(self) -> tuple[Any, ...]:
        return self.name, type(self._node), *self._shapes

    @property
    def kind(self) -> Hashable:
        return self.name, type(self._node), self._training[0][1], tuple(map(len, self._shapes))

    @property
    def cannot_wait(self) -> bool:
        return True  # the node's saved tensors are there until the backward pass is past it

    def operands(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        grad, self._grads = self._grads[0], []
        return (), {}, None if grad is None else grad.flatten(0, 1)

    def as_it_was(self) -> Any:
        return reading()

    def _rule(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], grad: Tensor) -> dict[str, Any]:
        node, nr, shape = self._value
        if self.is_sharded and self.leaf.variable.untyped_storage().nbytes() == 0:
            raise NotImplementedError("its value meets the batch while its shards are not gathered, outside of its fully_shard module")
        found = merged(NODE_RULES[type(self._node).__name__](self._node, self._index, shape, grad), self._batch)
        param = self.params["value"]
        if type(node) is _Leaf:
            return {"value": found}
        if isinstance(found, Outer) and _is_transposed_leaf(node):
            return {"value": Outer(found.right, found.left)}
        grads = found if isinstance(found, Tensor) else found.sample_grads(slice(None), shape)
        below = _embedding_below(node)
        if below is None:
            return {"value": self._taken_back(grads, (node, nr), self.leaf.variable)}
        if below is not node:
            grads = self._taken_back(grads, (node, nr), GradientEdge(below, 0))
        grads = grads.reshape(len(grads), *below._input_metadata[0].shape)
        return {"value": NODE_RULES["EmbeddingBackward0"](below, 0, param.shape, grads)}

    @staticmethod
    def _taken_back(grads: Tensor, edge: tuple[Any, int], to: Any) -> Tensor:
        made: Any = torch.autograd.grad([GradientEdge(*edge)], [to], [grads], is_grads_batched=True, retain_graph=True)
        result: Tensor = made[0]
        return result


def _is_transposed_leaf(node: Any) -> bool:
    return type(node).__name__ == "TBackward0" and type(node.next_functions[0][0]) is _Leaf


def _embedding_below(node: Any) -> Any:
    """The node of an embedding at the beginning of a chain of nodes with one input each: its gradients need not have all its rows."""
    while type(node).__name__ != "EmbeddingBackward0":
        children = [child for child, _ in node.next_functions if child is not None]
        if len(children) != 1 or type(children[0]) is _Leaf:
            return None
        node = children[0]
    return node if type(node.next_functions[0][0]) is _Leaf else None


def _is_broadcast(node: Any, users: Users) -> bool:
    """Whether rows of an embedding, or a function of them, are added to more dimensions than theirs: positions, not samples."""
    if type(node).__name__ != "EmbeddingBackward0":
        return False
    rank = len(node._input_metadata[0].shape)
    while True:
        using = [user for user, _, _ in users.get(node, ())]
        if any(type(user).__name__ in ELEMENTWISE and len(user._input_metadata[0].shape) > rank for user in using):
            return True
        if len(using) != 1 or sum(child is not None for child, _ in using[0].next_functions) != 1:
            return False
        node = using[0]


def _reads_of(
    name: str, module: nn.Module, param: nn.Parameter, leaf: Any, users: Users, batch: int, leads: Mapping[Any, bool]
) -> Iterator[Read]:
    """Every node in which a value of ``param`` meets the batch."""
    stack, seen = [(leaf, 0, param.shape)], {(leaf, 0)}
    while stack:
        node, nr, shape = stack.pop()
        if node not in users:
            raise _NoWay("the losses depend on it past the batch, as a penalty does")
        for user, index, used_nr in users[node]:
            if used_nr != nr:
                continue
            kind = type(user).__name__
            if kind in NODE_RULES and is_entered(user, index, shape, batch) and not _is_broadcast(user, users):
                yield Read(name, module, param, leaf, user, index, (node, nr, shape), batch)
            elif leads[user] or not hasattr(user, "_input_metadata"):
                output = tuple(user._input_metadata[0].shape)
                raise _NoWay(f"a value of shape {tuple(shape)} goes into {kind}, whose output has shape {output}")
            else:
                for i, metadata in enumerate(user._input_metadata):
                    if (user, i) not in seen:
                        seen.add((user, i))
                        stack.append((user, i, torch.Size(metadata.shape)))
