"""Argument checks of the public operations: every message names the operation, the list, the index, what was expected and what came."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sam_kernels._memory_of import why_no_memory

__all__ = [
    "SUPPORTED_DTYPES",
    "check_choice",
    "check_count",
    "check_counter",
    "check_distinct",
    "check_flag",
    "check_lists",
    "check_memory",
    "check_number",
    "check_number_or_tensor",
    "check_probabilities",
    "check_scalar_tensor",
    "check_seed",
    "check_tensor",
    "check_vector",
    "describe",
]

_LARGEST_FLOAT = torch.finfo(torch.float64).max
_LARGEST = int(_LARGEST_FLOAT)
SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def describe(value: object) -> str:
    """A short name for a value in an error message."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})" if isinstance(value, bool | int | float | str) else type(value).__name__


def check_tensor(op: str, name: str, tensor: object) -> Tensor:
    """``tensor`` is strided, of a supported dtype, and has memory. Raises TypeError otherwise."""
    checked = _check_kind(op, name, tensor)
    check_memory(op, name, checked)
    return checked


def check_memory(op: str, name: str, tensor: Tensor) -> None:
    """``tensor`` has memory, or no elements. Raises TypeError otherwise."""
    try:
        if tensor.data_ptr() != 0:
            return
    except (RuntimeError, NotImplementedError):  # a layout without storage
        pass
    if tensor.layout is not torch.strided or tensor.is_meta or (tensor.numel() > 0 and tensor.data_ptr() == 0):
        raise _no_memory(op, name, tensor)


def _no_memory(op: str, name: str, tensor: Tensor) -> TypeError:
    return TypeError(f"{op}: {name} {why_no_memory(tensor)}")


def _check_kind(op: str, name: str, tensor: object) -> Tensor:
    """As :func:`check_tensor`, whatever the device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {describe(tensor)}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"{op}: {name} is a {tensor.layout} tensor; only dense (strided) tensors are supported")
    if tensor.dtype not in SUPPORTED_DTYPES:
        supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in SUPPORTED_DTYPES)
        raise TypeError(f"{op}: {name} has dtype {tensor.dtype}; supported are {supported}")
    return tensor


def check_lists(op: str, lists: Mapping[str, Sequence[Tensor] | None], *, written: Sequence[str] = ()) -> None:
    """All lists that are not None agree with the first, row by row: shapes and devices. ``written`` lists hold no tensor twice.

    Raises TypeError for a wrong type, layout or dtype, ValueError for lists that do not fit each other.
    """
    given = {name: tensors for name, tensors in lists.items() if tensors is not None}
    for name, tensors in given.items():
        if not isinstance(tensors, list | tuple):
            raise TypeError(f"{op}: {name} must be a list or tuple of tensors, got {describe(tensors)}")
    reference_name, reference = next(iter(given.items()))
    for name, tensors in given.items():
        if len(tensors) != len(reference):
            raise ValueError(f"{op}: {name} has {len(tensors)} tensors, {reference_name} has {len(reference)}")
        for i, tensor in enumerate(tensors):
            _check_kind(op, f"{name}[{i}]", tensor)
            if tensors is reference and tensor.is_meta:  # the others are on its device, or found below
                raise _no_memory(op, f"{name}[{i}]", tensor)
            if tensor.shape != reference[i].shape:
                raise ValueError(
                    f"{op}: {name}[{i}] has shape {tuple(tensor.shape)}, {reference_name}[{i}] has {tuple(reference[i].shape)}"
                )
            if tensor.device != reference[i].device:
                if tensor.is_meta:
                    raise _no_memory(op, f"{name}[{i}]", tensor)
                raise ValueError(f"{op}: {name}[{i}] is on {tensor.device}, {reference_name}[{i}] is on {reference[i].device}")
    check_distinct(op, {name: given[name] for name in written if name in given})


def check_distinct(op: str, written: Mapping[str, Sequence[Tensor | None]]) -> None:
    """No two tensors of these lists start at the same memory and none overlaps itself: it would be written twice. Raises ValueError."""
    seen: dict[int, str] = {}
    for name, tensors in written.items():
        for i, tensor in enumerate(tensors):
            if tensor is None or tensor.numel() == 0:
                continue
            here = f"{name}[{i}]"
            address = tensor.data_ptr()
            if address == 0:
                raise _no_memory(op, here, tensor)
            first = seen.setdefault(address, here)
            if first != here:
                raise ValueError(f"{op}: {first} and {here} are the same memory and would be written twice; pass it once")
            if not tensor.is_contiguous() and any(
                stride == 0 for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1
            ):
                raise ValueError(f"{op}: {here} is expanded (a stride of 0), so its elements would be written more than once; clone it")


def check_scalar_tensor(op: str, name: str, tensor: object) -> Tensor:
    """``tensor`` holds one floating-point number, of any floating dtype, in dense memory. Raises TypeError or ValueError otherwise."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a 0-dim tensor, got {describe(tensor)}")
    check_memory(op, name, tensor)
    if tensor.numel() != 1 or not tensor.is_floating_point():
        raise ValueError(f"{op}: {name} must hold one floating-point number, got {describe(tensor)}")
    return tensor


def check_counter(op: str, name: str, tensor: object) -> Tensor:
    """``tensor`` holds one number that is counted up: float32 or float64. Raises TypeError or ValueError otherwise.

    bfloat16 counts no further than 256, float16 no further than 2048: adding 1 changes nothing from there on.
    """
    checked = check_scalar_tensor(op, name, tensor)
    if checked.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: {name} has dtype {checked.dtype}, in which no long count fits; supported are float32, float64")
    return checked


def check_number(
    op: str,
    name: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """``value`` is a finite real number in [low, high], without the ends that are ``open``. Raises TypeError or ValueError otherwise."""
    if type(value) is float:  # the usual case first: an optimizer's step checks a dozen numbers
        at_least, at_most = -_LARGEST_FLOAT if low is None else low, _LARGEST_FLOAT if high is None else high
        if at_least <= value <= at_most and not ((open_low and value == low) or (open_high and value == high)):
            return value
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    value = plain_number(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: {name} must be a number, got {describe(value)}")
    value = math.inf if isinstance(value, int) and abs(value) > _LARGEST else value  # it has no float
    above = high is not None and (value >= high if open_high else value > high)
    below = low is not None and (value <= low if open_low else value < low)
    if not math.isfinite(value) or below or above:
        left, right = "(" if open_low or low is None else "[", ")" if open_high or high is None else "]"
        bounds = f"{left}{'-inf' if low is None else low}, {'inf' if high is None else high}{right}"
        raise ValueError(f"{op}: {name} must be a finite number in {bounds}, got {value!r}")
    return float(value)


def check_number_or_tensor(
    op: str, name: str, value: Any, *, low: float | None = None, high: float | None = None
) -> float | Tensor:  # () or one element, float32 or float64
    """A number, as :func:`check_number` wants it, or a tensor that holds one, float32 in the place of a 16-bit one. Reading that of a
    device would wait for it: only one on the CPU is held to the bounds. Raises TypeError or ValueError otherwise."""
    if type(value) is float or not isinstance(value, Tensor):
        return check_number(op, name, value, low=low, high=high)
    if value.numel() != 1:
        raise ValueError(f"{op}: {name} must be a number or a tensor that holds one, got {describe(value)}")
    if value.layout is not torch.strided or value.dtype not in SUPPORTED_DTYPES:
        raise TypeError(f"{op}: {name} must be a number or a dense floating-point tensor that holds one, got {describe(value)}")
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.to(torch.float32)
    if value.is_cpu:
        check_memory(op, name, value)
        check_number(op, name, value.item(), low=low, high=high)
    return cast(Tensor, value)


def check_seed(op: str, name: str, value: object) -> int:
    """``value`` is an integer in [0, 2^64). Raises TypeError or ValueError otherwise."""
    seed = _check_integer(op, name, value)
    if not 0 <= seed < 2**64:
        raise ValueError(f"{op}: {name} must be an integer in [0, 2^64), got {seed}")
    return seed


def check_choice(op: str, name: str, value: object, choices: Sequence[str]) -> str:
    """``value`` is one of these strings. Raises TypeError or ValueError otherwise."""
    if not isinstance(value, str):
        raise TypeError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {describe(value)}")
    if value not in choices:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_flag(op: str, name: str, value: object) -> bool:
    """``value`` is True or False. Raises TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {describe(value)}")
    return value


def check_count(op: str, name: str, value: object, *, low: int, high: int | None = None) -> int:
    """``value`` is an integer in [low, high]. Raises TypeError or ValueError otherwise."""
    count = _check_integer(op, name, value)
    if count < low:
        raise ValueError(f"{op}: {name} must be at least {low}, got {count}")
    if high is not None and count > high:
        raise ValueError(f"{op}: {name} must be at most {high}, got {count}")
    return count


def _check_integer(op: str, name: str, value: object) -> int:
    """As an ``int`` whatever is one by ``__index__``, NumPy's integers too; bools are none, in no library."""
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if is_bool or not hasattr(value, "__index__"):
        raise TypeError(f"{op}: {name} must be an integer, got {describe(value)}")
    try:
        return operator.index(value)
    except TypeError:  # tensors and arrays have the method, whatever is in them
        raise TypeError(f"{op}: {name} must be an integer, got {describe(value)}") from None


def check_vector(op: str, name: str, value: object, *, low: float, open_low: bool = False) -> Tensor:  # (n,) float64 on the CPU, a copy
    """``value``, a floating-point tensor of one dimension or a sequence of numbers, has n ≥ 1 elements, all finite and at least ``low``
    (more than it where that end is ``open``). Raises TypeError or ValueError otherwise."""
    if isinstance(value, Tensor):
        vector = check_tensor(op, name, value).detach().to("cpu", torch.float64, copy=True)
    elif isinstance(value, Sequence) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value):
        vector = torch.tensor(value, dtype=torch.float64, device="cpu")
    else:
        raise TypeError(f"{op}: {name} must be a floating-point tensor or a sequence of numbers, got {describe(value)}")
    if vector.dim() != 1 or not len(vector):
        raise ValueError(f"{op}: {name} must have one dimension and at least one element, got shape {tuple(vector.shape)}")
    wrong = ~vector.isfinite() | ((vector <= low) if open_low else (vector < low))
    if wrong.any():
        i = int(wrong.nonzero()[0])
        raise ValueError(f"{op}: {name}[{i}] must be finite and {'more than' if open_low else 'at least'} {low}, got {vector[i].item()}")
    return vector


def check_probabilities(op: str, name: str, value: Any) -> Tensor:  # (n,) float64 on the CPU, a copy
    """``value`` is a distribution: as :func:`check_vector` wants it, all positive, of sum 1 within n times the eps of its own dtype: each
    of the n terms was rounded by whoever normalised them. The sum of the result is 1 in float64. Raises TypeError or ValueError otherwise.
    """
    p = check_vector(op, name, value, low=0.0, open_low=True)
    total, tolerance = p.sum().item(), len(p) * torch.finfo(value.dtype if isinstance(value, Tensor) else p.dtype).eps
    if abs(total - 1) > tolerance:
        raise ValueError(f"{op}: {name} must sum to 1 within {tolerance:.3g}, got {total!r}")
    return p / total


def plain_number(value: Any) -> Any:
    """``value``, with a Python number in the place of another library's scalar (NumPy's): a checkpoint that holds it loads with
    ``weights_only``. Anything else is returned as it is."""
    if type(value) in (float, int) or isinstance(value, Tensor | bool | str) or not isinstance(value, numbers.Real):
        return value
    item = getattr(value, "item", None)
    return float(value) if item is None else item()
