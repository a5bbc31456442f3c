"""Every 16-bit number, and every float32 that decides how one is rounded, sent through the operations."""

from __future__ import annotations

import torch
from torch import Tensor

from sam_kernels import functional

VALUES = ("arithmetic", "copy")  # the ways a float32 becomes a 16-bit number


def all_halves(dtype: torch.dtype) -> Tensor:  # (65536,)
    """Every bit pattern: zeros, subnormals, infinities and NaNs included."""
    return torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)


def deciding_floats(dtype: torch.dtype) -> Tensor:  # (k,) float32
    """Every number of ``dtype``, the ties between neighbours, and the float32 on either side of each; both overflow thresholds; NaN."""
    halves = all_halves(dtype).to(torch.float64)
    finite = halves[halves.isfinite()].unique()  # ascending
    ties = (finite[1:] + finite[:-1]) / 2
    largest = finite[-1]
    overflow = largest + (largest - finite[-2]) / 2
    exact = torch.cat([finite, ties, overflow[None], -overflow[None], torch.tensor([torch.inf, -torch.inf, torch.nan])]).to(torch.float32)
    up, down = torch.full_like(exact, torch.inf), torch.full_like(exact, -torch.inf)
    return torch.cat([exact, torch.nextafter(exact, up), torch.nextafter(exact, down), torch.tensor([-0.0, 1e38, -1e38, 1e-45, -1e-45])])


def widened(dtype: torch.dtype, device: str = "cpu") -> Tensor:  # (65536,) float32
    """Every half as the kernels read it: a float32 parameter moved from it by nothing (-0.0, which leaves every number as it is)."""
    old = all_halves(dtype).to(device)
    param = torch.full(old.shape, torch.nan, device=device)
    grad = torch.full(old.shape, -0.0, device=device)
    functional.perturb_([param], [grad], [old], torch.ones((), device=device), rho=1.0, from_old=True)
    return param.cpu()


def narrowed(dtype: torch.dtype, path: str, device: str = "cpu") -> Tensor:  # (k,) dtype
    """The deciding floats as the kernels round them, by a step that moves nothing or by a plain copy."""
    old = deciding_floats(dtype).to(device)
    param = torch.full(old.shape, torch.nan, dtype=dtype, device=device)
    if path == "copy":
        functional.restore_([param], [old])
    else:
        functional.perturb_([param], [torch.full_like(old, -0.0)], [old], torch.ones((), device=device), rho=1.0, from_old=True)
    return param.cpu()
