"""Checks that ``losses[i]`` belongs to row i of the layers' outputs. Operations between the two may put rows into another order.

A walk through the graph finds the operations that could, and the indices that they saved clear most of them. Backward passes with other
seeds decide about the rest: scaling ``losses[i]`` by a power of two must scale row i of every gradient by it, exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from sam_kernels.per_sample._call import Call
from sam_kernels.per_sample._graph import REORDERING, Graph, edges_of, nodes_of
from sam_kernels.per_sample._graph_reads import Read

__all__ = ["check_order"]

# Nodes that put rows together. Looked for between the losses and the layers' outputs, where to make sure costs little.
_JOINING = nodes_of(
    "Cat Stack IndexPut IndexCopy IndexAdd Scatter ScatterAdd ScatterReduce MaskedScatter Put Repeat Rot90 AsStrided SliceScatter "
    "SelectScatter Embedding"
) | {"CopySlices"}
# Nodes that add up over a dimension, perhaps the first, or over all of them. Looked for there too.
_SUMMING = nodes_of("Sum Mean Softmax LogSoftmax Logsumexp Cumsum Var Std LinalgVectorNorm Amax Amin Max Min Prod")
_SUMMING |= nodes_of("Sum Mean Max Min Prod", "Backward1")
_PRODUCTS = nodes_of("Mm Bmm Addmm Baddbmm Cdist Mv Dot")
_TURNING = nodes_of("Transpose Permute T")
_VIEWING = nodes_of("View UnsafeView Clone")
_BASE = 8  # seeds are powers of two of so many kinds: 1/8 to 16, so that gradients of 16 bits stay in range
_CLOSE = 0.05  # of the largest element of a row; another row's seed is at least twice as large, or half


def check_order(
    losses: Tensor,
    calls: Sequence[Call],
    graph: Graph,
    *,
    mixes: str | None,  # a layer that takes statistics from the batch
) -> None:
    """Raise ValueError if the rows of a layer's output come to the losses in another order than the batch's.

    Costs nothing where no node between them can reorder rows. Otherwise backward passes: from the losses to the first layers, if all such
    nodes lie between these, and to all layers if not. Looks at nothing while a CUDA graph is captured.
    """
    if losses.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    batch = losses.shape[0]
    recorded = {node for call in calls for node in call.nodes if node is not None}
    tail, first = _tail(losses.grad_fn, recorded)
    doubtful = [node for node, user in tail if graph.leads[node] and not _keeps_rows(node, user, batch)]
    doubtful += [node for node, _ in tail if type(node).__name__ in _PRODUCTS and _is_of_two(node, graph)]
    if doubtful:
        _probe(losses, [call for call in calls if first & set(call.nodes)], first, doubtful)
    seen = {node for node, _ in tail}
    doubtful = [node for node in graph.reordering if node not in seen and graph.leads[node] and not _keeps_rows(node, None, batch)]
    if not doubtful:
        return
    if mixes is not None:
        raise ValueError(
            f"GradNorms: {_named(doubtful)} puts rows into another order between layers, and {mixes} takes its statistics from the batch, "
            "so that it cannot be told whether they come back: put the model into evaluation mode, or leave the order as it is"
        )
    _probe(losses, calls, recorded, doubtful)


def check_rows(
    losses: Tensor,
    calls: Sequence[Call],
    *,
    mixes: str | None,  # a layer that takes statistics from the batch
) -> None:
    """Raise ValueError unless row i of dimension 0 of what the calls make belongs to ``losses[i]``.

    For calls of which shapes alone tell which dimension is the batch. Costs a backward pass, and one for every three bits of a sample's
    number.
    """
    if losses.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if mixes is None:
        _probe(losses, calls, {node for call in calls for node in call.nodes if node is not None}, [])
        return
    for read in calls:
        if isinstance(read, Read) and read.is_merged:
            raise ValueError(
                f"GradNorms: {read.name} meets the batch in one dimension with something else, and {mixes} takes its statistics "
                "from the batch, so that it cannot be told whether rows belong to their samples: put the model into evaluation mode"
            )


def _tail(root: Any, recorded: Collection[Any]) -> tuple[list[tuple[Any, Any]], set[Any]]:
    """The nodes between the losses and the first recorded nodes, each with a node that uses it; and the first recorded nodes."""
    users = {root: None}
    for user, node in edges_of(root, recorded):
        users.setdefault(node, user)
    return [(node, user) for node, user in users.items() if node not in recorded], {node for node in users if node in recorded}


def _is_of_two(node: Any, graph: Graph) -> bool:
    """Whether both factors of a product come from layers, as in a product of every sample with every other."""
    return sum(child is not None and graph.leads.get(child, False) for child, _ in node.next_functions) > 1


def _keeps_rows(node: Any, user: Any, batch: int) -> bool:
    """Whether the rows (the first dimension) of the node's output are in the order of its input's, as far as the node shows it."""
    name = type(node).__name__
    if not any(name in names for names in (REORDERING, _JOINING, _TURNING, _SUMMING)):
        return True
    if name in _TURNING and (user is None or type(user).__name__ not in _VIEWING):
        return True  # the rows are still a dimension of their own, or a product takes them there
    try:
        return _is_known_to_keep(node, name, tuple(node._input_metadata[0].shape), batch)
    except (AttributeError, RuntimeError, IndexError):  # of another torch, or saved tensors that are gone: to be found out
        return False


def _is_known_to_keep(node: Any, name: str, shape: tuple[int, ...], batch: int) -> bool:  # of the output
    kind = name.removesuffix("Backward0")
    if name in _SUMMING:
        saved: Any = getattr(node, "_saved_dim", None)
        dims: tuple[int, ...] = (saved,) if isinstance(saved, int) else tuple(saved or ())
        gone = len(dims) if dims and not getattr(node, "_saved_keepdim", True) else 0
        return bool(dims) and all(_dim(dim, (*shape, *[1] * gone)) != 0 for dim in dims)
    if kind == "Transpose":
        return 0 not in (_dim(node._saved_dim0, shape), _dim(node._saved_dim1, shape))
    if kind == "Permute":
        return _dim(node._saved_dims[0], shape) == 0
    if kind == "Flip":
        return 0 not in [_dim(dim, shape) for dim in node._saved_dims] or not _has_batch(shape[0], batch)
    if kind == "Roll":
        return (bool(node._saved_dims) and 0 not in [_dim(dim, shape) for dim in node._saved_dims]) or not _has_batch(shape[0], batch)
    if kind == "Index":
        return _index_keeps(node._saved_indices, node._saved_self_sym_sizes[0], shape, batch)
    if kind == "Repeat":
        return bool(node._saved_repeats[0] == 1) or not _has_batch(shape[0], batch)
    if kind in ("IndexPut", "MaskedScatter", "Put", "Take", "MaskedSelect", "Embedding", "Rot90", "AsStrided", "T") or name == "CopySlices":
        return False
    if _dim(node._saved_dim, shape) != 0:
        return True
    if kind in ("Sort", "Topk", "Gather"):
        index = node._saved_index if kind == "Gather" else node._saved_indices
        rows = shape[0] if kind == "Sort" else node._saved_self.shape[0] if kind == "Gather" else node._saved_self_sym_sizes[0]
        return _same_samples(index.reshape(index.shape[0], -1), rows, batch)
    if kind == "IndexSelect":
        return _same_samples(node._saved_index.reshape(-1, 1), node._saved_self_sym_sizes[0], batch)
    return not _has_batch(shape[0], batch)  # Cat, Stack, and what scatters along the first dimension


def _index_keeps(indices: Sequence[Tensor | None], rows: int, shape: tuple[int, ...], batch: int) -> bool:
    """Of ``x[i, j, ...]``, where None stands for ``:``."""
    if not indices or indices[0] is None:
        return True
    given: list[Tensor] = []
    for index in indices:
        if index is not None:
            given += index.nonzero().unbind(1) if index.dtype in (torch.bool, torch.uint8) else [index]
    broadcast: Any = torch.broadcast_tensors
    first: Tensor = broadcast(*given)[0]
    if first.dim() == 0:
        return False
    return _same_samples(torch.where(first < 0, first + rows, first).reshape(first.shape[0], -1), rows, batch)


def _same_samples(index: Tensor, rows: int, batch: int) -> bool:  # (rows of the output, ...) of rows of the input
    """Whether every row of the output belongs to the sample that it was taken from. B samples have consecutive rows, k each."""
    if not _has_batch(rows, batch):
        return True
    if not _has_batch(index.shape[0], batch):
        return False
    own = torch.arange(index.shape[0], device=index.device) // (index.shape[0] // batch)
    return bool((index // (rows // batch) == own.unsqueeze(1)).all())


def _has_batch(rows: int, batch: int) -> bool:
    """Whether so many rows can be those of the batch: of fewer or more there is nothing to say."""
    return batch > 1 and rows > 0 and rows % batch == 0


def _dim(dim: int, shape: tuple[int, ...]) -> int:
    """The nodes' attributes are unsigned: -1 is 2^64 - 1."""
    dim = dim - (1 << 64) if dim >= 1 << 63 else dim
    return dim + len(shape) if dim < 0 else dim


def _probe(losses: Tensor, calls: Sequence[Call], nodes: Collection[Any], doubtful: Sequence[Any]) -> None:
    """Raises ValueError if a row of a gradient does not follow the seed of its own loss."""
    batch = losses.shape[0]
    wanted = [(call, i) for call in calls for i, node in enumerate(call.nodes) if node in nodes]
    edges = [GradientEdge(call.nodes[i], call.output_nrs[i]) for call, i in wanted]

    def rows(seed: Tensor) -> list[Tensor | None]:  # (B, elements) each
        found = torch.autograd.grad(losses, edges, seed, retain_graph=True, allow_unused=True)
        return [None if grad is None else call.rows_of(i, grad, batch) for (call, i), grad in zip(wanted, found, strict=True)]

    plain = rows(torch.ones_like(losses))
    for seed in _seeds(losses):
        for (call, _), before, after in zip(wanted, plain, rows(seed), strict=True):
            if before is None or after is None:
                continue
            expected = before * seed.to(before.dtype).unsqueeze(1)
            error, size = ((after - expected).abs().amax(1), torch.maximum(expected.abs(), after.abs()).amax(1))
            if bool((error > _CLOSE * size).any()):
                raise ValueError(
                    f"GradNorms: losses[i] does not belong to row i of the output of {call.name}: {_named(doubtful)} puts rows into "
                    "another order, or mixes them. Return the losses in the order of the batch (sort or pick them afterwards, by their "
                    "values), and run no layer on rows in another order; engine.verify(losses, i) compares a norm with a backward pass of "
                    "its own"
                )


def _seeds(losses: Tensor) -> Iterator[Tensor]:  # (B,)
    """One for each digit of the samples' numbers, so that no two samples have the same seeds."""
    number = torch.arange(losses.shape[0], device=losses.device)
    while bool((number > 0).any()):
        yield torch.exp2((number % _BASE - _BASE // 2 + 1).to(losses.dtype))
        number = number // _BASE


def _named(nodes: Sequence[Any]) -> str:
    if not nodes:
        return "an operation (or a batch that is not dimension 0)"
    return " and ".join(sorted({type(node).__name__ for node in nodes}))
