"""Whether a tensor has memory of its own, which is what kernels read and write.

Many tensors have none. A DTensor and other wrappers hold other tensors, a FakeTensor has a shape and no values, a tensor inside
``torch.func`` stands for others. Their ``data_ptr()`` is 0, or raises, and a kernel that reads address 0 ends the process. Operations and
optimizers ask here before they take an address.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch._C import _get_dispatch_mode, _TorchDispatchModeKey
from torch._C._functorch import is_functorch_wrapped_tensor, peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import Parameter
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]  # not in torch's stub
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sam_kernels._sharding import is_dtensor

__all__ = ["ORDINARY_TYPES", "active_fake_mode", "is_fake", "is_inside_transform", "why_no_memory", "without_memory"]

# Types whose tensors are strided memory, up to what only the tensor itself shows (layout, device, freed storage).
ORDINARY_TYPES = frozenset({Tensor, Parameter})

_FAKE = _TorchDispatchModeKey.FAKE


def is_fake(tensor: object) -> bool:
    """Whether ``tensor`` is a FakeTensor: a shape, a dtype and a device, and no values (``torch._subclasses.FakeTensorMode``)."""
    return isinstance(tensor, FakeTensor)


def active_fake_mode() -> FakeTensorMode | None:
    """The FakeTensorMode that is active, in which ``torch.empty`` and every other function of torch make FakeTensors; None without one."""
    return cast("FakeTensorMode | None", _get_dispatch_mode(_FAKE))


def is_inside_transform() -> bool:
    """Whether a transform of ``torch.func`` (``vmap``, ``grad``, ...) is running: a plain ``torch.Tensor`` may then stand for others."""
    return peek_interpreter_stack() is not None


def why_no_memory(tensor: Tensor) -> str | None:
    """Return why kernels cannot read ``tensor`` through a pointer, and what to do; None for a tensor with ordinary memory.

    The words are the end of a sentence whose subject is the tensor: ``f"perturb_: grads[3] {why_no_memory(grads[3])}"``.
    Dtypes are not looked at: a complex or an integer tensor has memory. Subclasses with memory of their own (``Parameter``, ``Buffer``,
    any ``class MyTensor(torch.Tensor)``) give None, and so does a tensor without elements.

    A plain tensor costs a microsecond: for a list, look at ``type(tensor) in ORDINARY_TYPES`` first.
    """
    if is_functorch_wrapped_tensor(tensor):
        return "belongs to a transform of torch.func (vmap, grad, ...) and has no memory of its own; call this outside of the transform"
    if is_fake(tensor):
        return "is a FakeTensor, which has a shape and no values; pass a real tensor"
    wrapper = _why_wrapper(tensor)
    if wrapper is not None:
        return wrapper
    if tensor.is_nested:
        return "is a nested tensor; pass its parts (tensor.unbind()), or a padded dense tensor"
    if tensor.layout is not torch.strided:
        return f"is a {tensor.layout} tensor; only dense (strided) tensors are supported: pass tensor.to_dense()"
    if tensor.is_meta:
        return "is on the meta device and has no memory; move the module with to_empty(device=...) and initialise it first"
    return _why_no_address(tensor)


def without_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether one of these tensors has no memory. Tensors of the usual types are trusted: 30 ns each."""
    return not ORDINARY_TYPES.issuperset(map(type, tensors)) and any(
        type(tensor) not in ORDINARY_TYPES and why_no_memory(tensor) is not None for tensor in tensors
    )


def _why_wrapper(tensor: Tensor) -> str | None:
    if type(tensor) in ORDINARY_TYPES:
        return None
    if isinstance(tensor, UninitializedTensorMixin):
        return "is uninitialized and has no shape yet; run its lazy module once first"
    name = type(tensor).__name__
    if is_dtensor(tensor):
        return "is a DTensor, which has no memory of its own; pass its local part, tensor.to_local()"
    if tensor.layout is torch.jagged:
        return "is a nested tensor (torch.jagged); pass its values, tensor.values()"
    wrapper: Any = tensor
    if is_traceable_wrapper_subclass(wrapper):
        inner = ", ".join(f"tensor.{attribute}" for attribute in wrapper.__tensor_flatten__()[0])
        return f"is a {name}, which wraps other tensors and has no memory of its own; pass what it wraps ({inner})"
    return None


def _why_no_address(tensor: Tensor) -> str | None:
    if tensor.numel() == 0:
        return None
    try:
        address = tensor.data_ptr()
    except RuntimeError:  # torch's word that there is no storage
        address = 0
    if address != 0:
        return None
    if type(tensor) in ORDINARY_TYPES:
        return "has no memory: its storage was freed (resized to 0); allocate it again first"
    return f"is a {type(tensor).__name__} without memory of its own (its data_ptr() is 0); pass an ordinary tensor"
