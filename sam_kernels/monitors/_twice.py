"""First derivatives that can be differentiated again, or an error. Autograd leaves out what it cannot differentiate twice in several cases
without a word: a Hessian would lack terms. They are found in its graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle

__all__ = ["first_gradients", "second_gradients"]

_T = TypeVar("_T")
_ATTENTION = "with torch.nn.attention.sdpa_kernel(SDPBackend.MATH): around the forward pass"
# What torch says of a second derivative that it has not, and what to do.
_REASONS = (
    ("scaled_dot_product", f"only the plain implementation of attention has one; {_ATTENTION}"),
    ("_flash_attention", f"only the plain implementation of attention has one; {_ATTENTION}"),
    ("_efficient_attention", f"only the plain implementation of attention has one; {_ATTENTION}"),
    ("rnn", "with torch.backends.cudnn.flags(enabled=False): and torch.backends.mkldnn.flags(enabled=False): around the forward pass"),
    ("torch.compile", "call the original model in the closure"),
    ("donated buffers", "call the original model in the closure"),
    ("derivative for", "replace the operation in the closure by one that can be differentiated twice"),
    ("ouble backward", "replace the operation in the closure by one that can be differentiated twice"),
    ("differentiate twice", "replace the operation in the closure by one that can be differentiated twice"),
)
_FREED = "through the graph a second time"
_COMPILED, _CHECKPOINT, _ONCE = "CompiledFunctionBackward", "CheckpointFunctionBackward", "torch::autograd::Error"


def first_gradients(op: str, loss: Tensor, params: Sequence[Tensor]) -> list[Tensor | None]:  # (), n tensors -> n tensors or None
    """The gradients of ``loss`` with a graph of their own. None: the loss does not depend on the parameter.

    They are multiplied by a factor of 1 that requires a gradient. Every gradient on the way is linear in it, so one that requires no
    gradient is a constant for autograd where it should not be.

    Raises RuntimeError where the graph shows that second derivatives would lack terms, or where there is none any more.
    """
    nodes = list(_nodes([loss.grad_fn]))
    names = {node.name() for node in nodes}
    if _COMPILED in names:
        raise RuntimeError(f"{op}: a compiled function (torch.compile) has no second derivative; call the original model in the closure")
    if _CHECKPOINT in names:
        raise RuntimeError(
            f"{op}: torch.utils.checkpoint.checkpoint(use_reentrant=True) hides parameters from autograd's graph; use use_reentrant=False"
        )
    constants: list[str] = []
    one = torch.ones_like(loss, requires_grad=True)
    handles: list[RemovableHandle] = []
    try:
        handles += [node.register_hook(partial(_note_constant, constants, node.name())) for node in nodes]
        grads = _differentiated(op, params, lambda: torch.autograd.grad(loss, params, one, create_graph=True, allow_unused=True))
    finally:
        for handle in handles:
            handle.remove()
    if constants:
        raise _no_second_derivative(op, constants)
    if any(node.name() == _ONCE for node in _nodes(grad.grad_fn for grad in grads if grad is not None)):
        raise _no_second_derivative(op, [node.name() for node in nodes if _is_custom(node)])
    return list(grads)


def second_gradients(op: str, grads: Sequence[Tensor], params: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of Σ ``grads``·``vectors``; None: zero. The graph remains. Raises RuntimeError for operations without one."""
    return list(_differentiated(op, params, lambda: torch.autograd.grad(grads, params, vectors, retain_graph=True, allow_unused=True)))


def _differentiated(op: str, params: Sequence[Tensor], differentiate: Callable[[], _T]) -> _T:
    try:
        with _without_autocast({param.device.type for param in params}):
            return differentiate()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        words = str(error)
        if _FREED in words:
            raise RuntimeError(f"{op}: the graph of the loss is gone; the closure must return the loss without calling backward") from error
        for reason, cure in _REASONS:
            if reason in words:
                raise RuntimeError(f"{op}: the loss has no second derivative ({words.splitlines()[0]}): {cure}") from error
        raise


@contextmanager
def _without_autocast(kinds: set[str]) -> Iterator[None]:
    """Derivatives are computed in the dtypes of the forward pass, wherever the caller stands."""
    with ExitStack() as stack:
        for kind in kinds:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _nodes(roots: Iterable[Node | None]) -> Iterator[Node]:
    """Every node of autograd's graph, once."""
    todo, seen = list(roots), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        todo += [following for following, _ in node.next_functions]


def _is_custom(node: object) -> bool:
    """Whether it belongs to a subclass of ``torch.autograd.Function``."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def _note_constant(names: list[str], name: str, grad_inputs: Sequence[Any], _grad_outputs: Sequence[Any]) -> None:
    """A hook of a node: notes its name where a gradient that it has made is not zero and cannot be differentiated."""
    for grad in grad_inputs:
        if isinstance(grad, Tensor) and not grad.requires_grad and bool((grad != 0).any()):
            names.append(name)
            return


def _no_second_derivative(op: str, names: Sequence[str]) -> RuntimeError:
    listed = ", ".join(dict.fromkeys(names))
    return RuntimeError(
        f"{op}: the backward pass of {listed} cannot be differentiated again, so second derivatives would lack terms; replace it in the "
        "closure by operations of torch, or write its backward pass so that torch.autograd.gradgradcheck passes"
    )
