"""What a CUDA graph that is replayed must find on the device to follow a schedule, and what cannot be recorded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sam_kernels.optim._types import ParamGroup

__all__ = ["is_recording", "not_recordable", "to_numbers", "to_tensors"]


def is_recording(device: torch.device) -> bool:
    """Whether the current stream of the device's type is being recorded into a CUDA graph: nothing runs, and nothing may be waited for."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def not_recordable(why: str) -> RuntimeError:
    return RuntimeError(f"SAM: this step is being recorded into a CUDA graph, but {why}")


def to_tensors(group: ParamGroup, keys: Mapping[str, str]) -> None:
    """ρ, λ, RW-SAM's β and the count of steps as () tensors on the parameters' device, and lr where it is a tensor.

    What is one already stays itself. ``keys``: where the options lie in the group.

    float64: λ may be close to 1, where 1 - λ of a float32 has no digits left (3 % off at 1 - 1e-6), and a number keeps its value beside
    float64 parameters. The kernels read either. A radius or a β that is the number 0 stays that: whether a group takes part in the
    ascent, and whether norms are taken, is decided by the host.
    """
    if not group["params"]:
        return
    device = next((param for param in group["params"] if param.requires_grad), group["params"][0]).device
    numbers = {keys[name] for name in ("rho", "lambd", "beta", "sam_step") if name in keys}
    stay_zero = {keys[name] for name in ("rho", "beta") if name in keys}
    for key in (*numbers, "lr"):
        value = group.get(key)
        if isinstance(value, Tensor):
            if value.device != device:
                _require_eager(key, device)
                group[key] = value.to(device)
        elif isinstance(value, int | float) and key != "lr" and not (key in stay_zero and value == 0):
            _require_eager(key, device)
            group[key] = torch.tensor(float(value), dtype=torch.float64, device=device)


def _require_eager(key: str, device: torch.device) -> None:
    if is_recording(device):
        raise not_recordable(f"param_groups hold a new {key}, which only an eager step puts on the device; change tensors by fill_")


def to_numbers(group: ParamGroup, keys: Mapping[str, str]) -> None:
    """The way back, for a checkpoint of a capturable optimizer in one that is not. Waits for the device."""
    for name in ("rho", "lambd", "beta"):
        key = keys.get(name)
        if key is not None and isinstance(group.get(key), Tensor):
            group[key] = group[key].item()
    group[keys["sam_step"]] = int(group[keys["sam_step"]])
