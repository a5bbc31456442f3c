"""One backward pass over a recorded forward pass: its calls with what the graph adds to them, and where their gradients come by."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointError

from sam_kernels.per_sample._aliases import settle
from sam_kernels.per_sample._call import Call
from sam_kernels.per_sample._gathered import Gathered
from sam_kernels.per_sample._graph import Graph, graph_of
from sam_kernels.per_sample._graph_reads import Read, raise_if_read, reads_in, without_batch
from sam_kernels.per_sample._hidden import refuse_hidden
from sam_kernels.per_sample._order import check_order, check_rows
from sam_kernels.per_sample._reads import check_reads
from sam_kernels.per_sample._recorder import Recorder

__all__ = ["Pass"]


class Pass:
    """``calls`` are those that get a gradient. Takes what the recorder has recorded.

    Raises RuntimeError where the losses read a parameter past its layer, or a custom function hides a layer's gradient.
    """

    def __init__(self, losses: Tensor, recorder: Recorder) -> None:
        self._losses, self._recorder = losses, recorder
        calls, recorder.calls = recorder.calls, []
        recorder.stop()
        # Whether checkpoints run again. Of all calls: a checkpoint saves as much again as it did for them.
        self.recomputes = any(call.is_recomputed for call in calls)
        calls, in_graph = self._with_reads(calls)
        refuse_hidden(losses.grad_fn, [call for call in calls if not call.expect(self._graph.reached)])
        calls = [call for call in calls if call.is_awaited]  # by the others comes no gradient: they add nothing
        self.calls = settle(calls, self._graph.readers)
        params = ((name, param) for name, param in recorder.params if id(param) not in in_graph)
        check_reads(params, self.calls, self._graph.readers, losses.grad_fn)

    def again(self) -> Any:
        """Around backward passes: what checkpoints run again must save what it saved the first time."""
        return self._recorder.replaying() if self.recomputes else nullcontext()

    def run(self, gathered: Gathered, checked: set[Hashable], *, keep: bool, ordinary: bool, retain_graph: bool) -> None:
        """Hand every call with its gradients to ``gathered``.

        ``checked``: signatures of calls whose rows are known to be the losses'; added to. ``ordinary``: by ``torch.autograd.backward``.
        Raises ValueError where rows are not the losses'.
        """
        losses, calls, graph, nodes = self._losses, self.calls, self._graph, self._nodes

        def pass_by(node: Any, grads: Sequence[Tensor | None] | dict[int, Tensor | None]) -> None:
            for call, position in nodes[node]:
                # What is kept anyway can wait until the backward pass is over, when nothing else wants the caches that Python runs in. What
                # a checkpoint has computed again is there now.
                if call.receive(position, grads[call.output_nrs[position]]) and (call.cannot_wait or not keep):
                    gathered.add(call)

        ends = set() if ordinary else graph.ends  # an ordinary backward pass runs through all of them
        late = [call for call in calls if isinstance(call, Read) and call.is_sharded and not ends.isdisjoint(call.nodes)]
        ends = ends.difference(*(call.nodes for call in late)) if late else ends
        edges = [GradientEdge(node, nr) for node in ends for nr in sorted({call.output_nrs[i] for call, i in nodes[node]})]
        wanted = edges + [GradientEdge(leaf, 0) for leaf in {call.leaf for call in late}]  # the pass runs through their nodes
        handles: list[Any] = []
        try:
            # What rules multiply must not be rounded on the way; what checkpoints run again brings its own autocast along.
            with self.again(), torch.autocast(losses.device.type, enabled=False):
                check_order(losses, calls, graph, mixes=_mixing(calls))
                # Where shapes alone tell which dimension is the batch's.
                doubtful = calls if any(call.has_positions(len(losses)) for call in calls) else [c for c in calls if isinstance(c, Read)]
                if not checked.issuperset(call.signature for call in doubtful):
                    check_rows(losses, doubtful, mixes=_mixing(calls))
                    checked.update(call.signature for call in doubtful)
                handles += [node.register_prehook(partial(pass_by, node)) for node in graph.reached - ends]
                ones = torch.ones_like(losses)
                found: tuple[Tensor, ...] = ()
                if ordinary:
                    torch.autograd.backward(losses, ones, retain_graph=retain_graph)
                elif wanted:
                    found = torch.autograd.grad(losses, wanted, ones, retain_graph=retain_graph, allow_unused=True)[: len(edges)]
                with torch.no_grad():
                    grads_of: dict[Any, dict[int, Tensor | None]] = {edge.node: {} for edge in edges}
                    for edge, grad in zip(edges, found, strict=True):
                        grads_of[edge.node][edge.output_nr] = grad
                    for node, grads in grads_of.items():
                        pass_by(node, grads)
                    gathered.finish(calls)
        except CheckpointError as error:
            raise_if_read(error, [call for call in calls if isinstance(call, Read)])
            raise
        finally:
            for handle in handles:
                handle.remove()

    def _with_reads(self, calls: list[Call]) -> tuple[list[Call], set[int]]:
        """The calls with what is read past them, and the ids of the parameters that this was searched for."""
        root, batch, loose = self._losses.grad_fn, len(self._losses), list(self._recorder.loose)
        is_ambiguous = any(call.has_positions(batch) for call in calls)
        unbatched = [call for call in calls if call.lacks_batch(batch, is_ambiguous=is_ambiguous)]
        if unbatched:
            calls = [call for call in calls if call not in unbatched]
            loose += [without_batch(call, batch) for call in reversed(unbatched)]
        self._find(calls)
        loose = [each for each in loose if each.is_read(calls, self._graph.readers)]
        in_graph = {id(param) for each in loose for param in each.params.values()}
        if loose:
            calls = _without(calls, in_graph)
            calls += reads_in(root, loose, batch, self._graph.leads, self._recorder.whole)
            self._find(calls)
        return calls, in_graph

    def _find(self, calls: Sequence[Call]) -> None:
        """``_nodes``: by node, the calls whose outputs it makes, and which of them. ``_graph``: what lies between them and the losses."""
        self._nodes: dict[Any, list[tuple[Call, int]]] = {}
        for call in calls:
            for position, node in enumerate(call.nodes):
                if node is not None:
                    self._nodes.setdefault(node, []).append((call, position))
        self._graph: Graph = graph_of(self._losses.grad_fn, self._nodes)
        self._recorder.whole.add_readers(self._graph.readers)


def _without(calls: Sequence[Call], in_graph: Collection[int]) -> list[Call]:
    """The calls without parameters whose reads are all found in the graph: the tied weight of a module without a rule."""
    for call in calls if in_graph else ():
        if any(id(param) in in_graph for param in call.params.values()):
            call.params = {name: param for name, param in call.params.items() if id(param) not in in_graph}
    return [call for call in calls if call.params]


def _mixing(calls: Sequence[Call]) -> str | None:
    """A layer that makes samples depend on each other."""
    for call in calls:
        if isinstance(call, Read) and call.takes_statistics:
            return call.name
        if isinstance(call.module, _BatchNorm) and (call.was_training or call.module.running_mean is None):
            return call.name
    return None
