"""The record of one call of a layer: its arguments, and the nodes of autograd's graph through which its outputs' gradients come."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sam_kernels.per_sample._extents import Extent
from sam_kernels.per_sample._registry import Rule
from sam_kernels.per_sample._rereading import top_hooks
from sam_kernels.per_sample._terms import Place

__all__ = ["Call", "Saved"]


class _Keep(torch.autograd.Function):
    """Saves tensors as autograd does: under checkpointing they are recomputed when they are asked for, under offloading fetched."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("nothing depends on this")


class Saved:
    """Tensors kept for the backward pass. ``anchor`` is any tensor that wants a gradient."""

    def __init__(self, tensors: Sequence[Tensor], anchor: Tensor) -> None:
        hooks = top_hooks(False)
        keep: Any = _Keep.apply
        self.is_recomputed = hooks is not None
        self._node = None if hooks is None else keep(anchor, *tensors).grad_fn
        self._tensors = [tensor.detach() for tensor in tensors] if hooks is None else []
        self._versions = [tensor._version for tensor in self._tensors]

    def tensors(self, name: str) -> list[Tensor]:
        """Return the tensors. Raises RuntimeError if one of them has been written to since it was saved."""
        if self._node is not None:
            return list(self._node.saved_tensors)
        if any(tensor._version != version for tensor, version in zip(self._tensors, self._versions, strict=True)):
            raise RuntimeError(f"GradNorms: an input of {name} has been modified by an inplace operation after the layer read it")
        return self._tensors


class Call:
    """One call of a module that owns trainable parameters, or of a function in it that reads one."""

    def __init__(
        self,
        name: str,  # for messages
        module: nn.Module,
        rule: Rule,
        params: dict[str, nn.Parameter],  # trainable, by the names that the rule uses
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        output: Any,
        *,
        places: dict[str, Place | None] | None = None,  # rows of the parameters, if a function read parameters rather than a module
        batch_dim: int = 0,
        merged: int | None = None,  # a batch of so many: dimension 0 is (positions, batch) flattened, or those two are dimensions 0 and 1
        reads_once: bool = False,  # a call reads each parameter once
        anchor: Tensor,  # that wants a gradient
    ) -> None:
        self.name, self.module, self.rule, self.params = name, module, rule, params
        self.places = places or {}
        self.span: tuple[int, int] | None = None  # numbers of the nodes made while it ran, where it does not read its parameters once
        self.extent: Extent | None = None  # this call's own, where layers inside it have its parameters too
        self.extents: Sequence[Extent] = ()  # of the calls that this one was made in
        self.batch_dim, self.merged, self.reads_once = batch_dim, merged, reads_once
        # The usual case, one tensor in and one out of a module without children, takes the short ways: all this runs out of cold caches.
        self._training = [(child, child.training) for child in module.modules()] if module._modules else [(module, module.training)]
        self._arguments: pytree.TreeSpec | None = None  # None: one tensor
        self._leaves: list[Any] = [None]
        self._places, inputs = [0], list(arguments)
        if len(arguments) != 1 or keywords or not isinstance(arguments[0], Tensor):
            leaves, self._arguments = pytree.tree_flatten((arguments, keywords))
            self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            inputs = [leaves[i] for i in self._places]
        self._saved = Saved(inputs, anchor)
        self._is_one = isinstance(output, Tensor)
        outputs = [output] if self._is_one else pytree.tree_leaves(output)
        tensors = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        # Nodes rather than tensors: they stay what they are when the output is modified in place by the layer that follows.
        origins = [_origin(tensors[0])] if len(tensors) == 1 else tensors
        self.nodes: list[Any] = [origin.grad_fn for origin in origins]
        self.output_nrs = [origin.output_nr for origin in origins]
        self._shapes = [tensor.shape for tensor in tensors]
        self._grads: list[Tensor | None] = [None] * len(tensors)
        self._awaited = 0

    @property
    def is_recomputed(self) -> bool:
        """Whether the backward pass may call the module once more, to have its inputs."""
        return self._saved.is_recomputed

    @property
    def cannot_wait(self) -> bool:
        """Whether the gradient must be used as soon as it is there: what it is multiplied by is gone later."""
        return self.is_recomputed

    def lacks_batch(self, batch: int, *, is_ambiguous: bool) -> bool:
        """Whether the one output has no batch: positions of shape (1, T), a table of biases.

        ``is_ambiguous``: there are as many positions as samples, so that rows of an embedding may be either.
        """
        if self.merged is not None or not self._is_one or self.batch_dim != 0 or not self.reads_once or not self._shapes:
            return False
        shape = self._shapes[0]
        return len(shape) == 0 or shape[0] != batch or (is_ambiguous and len(shape) == 2 and isinstance(self.module, nn.Embedding))

    def has_positions(self, count: int) -> bool:
        """Whether an output has so many positions behind its first dimension."""
        return any(count in shape[1:-1] for shape in self._shapes)

    def expect(self, reached: Collection[Any]) -> bool:
        """Return whether the losses depend on an output of the call. ``reached``: the nodes that the losses depend on."""
        self._awaited = sum(node in reached for node in self.nodes)
        return self._awaited > 0

    @property
    def signature(self) -> tuple[Any, ...]:
        """The same for the call that another forward pass makes in the same place."""
        return self.name, type(self.module), *self._shapes

    @property
    def kind(self) -> Hashable:
        """The same for a call in the same place whose shapes differ."""
        return self.name, type(self.module), self.was_training, tuple(self.params), tuple(map(len, self._shapes))

    @property
    def was_training(self) -> bool:
        """The module's mode when it was called."""
        return self._training[0][1]

    @property
    def is_awaited(self) -> bool:
        """Whether gradients of outputs are still to come."""
        return self._awaited > 0

    @property
    def first_order(self) -> int:
        """A number that is larger than that of every node made before this call's."""
        return min(int(node._sequence_nr()) for node in self.nodes if node is not None)

    def receive(self, position: int, grad: Tensor | None) -> bool:
        """Store the gradient of one of the outputs. Return whether it is the last one that is awaited."""
        self._grads[position] = None if grad is None else grad.reshape(self._shapes[position])
        self._awaited -= 1
        return self._awaited == 0

    @property
    def has_gradient(self) -> bool:
        return any(grad is not None for grad in self._grads)

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """The module and those in it are in the mode, training or evaluation, in which the module was called."""
        changed = [(child, child.training, before) for child, before in self._training if child.training is not before]
        try:
            for child, _, before in changed:
                child.training = before
            yield
        finally:
            for child, now, _ in changed:
                child.training = now

    def operands(self, batch: int) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Arguments, keywords and the output's gradient, with the batch in dimension 0. Frees what was kept."""
        self._check_batch([grad for grad in self._grads if grad is not None], batch)
        for i, tensor in zip(self._places, self._saved.tensors(self.name), strict=True):
            self._leaves[i] = self._batch_first(tensor, batch)
        arguments, keywords = (tuple(self._leaves), {}) if self._arguments is None else pytree.tree_unflatten(self._leaves, self._arguments)
        grads = tuple(None if grad is None else self._batch_first(grad, batch) for grad in self._grads)
        del self._saved, self._leaves
        self._grads = []
        return arguments, keywords, grads[0] if self._is_one else grads

    def rows_of(self, position: int, grad: Tensor, batch: int) -> Tensor:  # (B, elements)
        """The gradient of one of the outputs, a row for each sample. Raises ValueError where it has another batch."""
        grad = grad.reshape(self._shapes[position])
        self._check_batch([grad], batch)
        return self._batch_first(grad, batch).reshape(batch, -1)

    def _check_batch(self, outputs: Sequence[Tensor], batch: int) -> None:
        for tensor in outputs:
            if self.merged is not None:
                if self.merged == batch:
                    continue
                raise ValueError(f"GradNorms: {self.name} was called with a batch of {self.merged}, but there are {batch} losses")
            if tensor.dim() > self.batch_dim and tensor.shape[self.batch_dim] == batch:
                continue
            raise self._no_batch(tensor.shape, batch, "")

    def no_batch(self, batch: int, why: str) -> ValueError:
        """The error for a call whose one output has no batch. ``why`` the graph shows none either."""
        return self._no_batch(self._shapes[0], batch, f" (looked for where it meets the batch: {why})")

    def _no_batch(self, shape: torch.Size, batch: int, more: str) -> ValueError:
        return ValueError(
            f"GradNorms: the output of {self.name} has shape {tuple(shape)}: dimension {self.batch_dim} is not the batch of {batch} "
            f"losses{more}. GradNorms(batch_first=False) is for models whose batch is in dimension 1"
        )

    def _batch_first(self, tensor: Tensor, batch: int) -> Tensor:
        if self.merged is not None:
            return tensor.reshape(-1, batch, tensor.shape[-1]).transpose(0, 1)
        if self.batch_dim and tensor.dim() > self.batch_dim and tensor.shape[self.batch_dim] == batch:
            return tensor.movedim(self.batch_dim, 0)
        return tensor


def _origin(output: Tensor) -> Tensor:
    """The tensor whose node stays in the graph when the output, perhaps a view of all of it, is modified in place."""
    base = output._base
    if base is None or base.grad_fn is None or base.numel() != output.numel() or not (base.is_contiguous() and output.is_contiguous()):
        return output
    return base
