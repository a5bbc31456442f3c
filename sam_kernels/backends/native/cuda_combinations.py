"""Inner products and weighted sums with the CUDA kernels of ``csrc/cuda/{grad_dots,combine}.cu``: a pass and its finishing launch each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels.backends.native._arguments import address, flag_of, number_of, write_back
from sam_kernels.backends.native._cuda_lists import _cuda, _lists, _stream, _sums
from sam_kernels.backends.native._lists import written

__all__ = ["combine_", "grad_dots"]


def grad_dots(
    lefts: Sequence[Tensor], rights: Sequence[Tensor], origins: Sequence[Tensor] | None, *, found_inf: Tensor | None
) -> Tensor:  # (3,) float64
    """Reads l, r (and o)."""
    described = _lists.describe(lefts)
    sums = _sums(described, lefts[0], of_chunk=3)
    dots = torch.empty(3, dtype=torch.float64, device=lefts[0].device)
    flag = flag_of(found_inf)
    _cuda.grad_dots(
        lefts=described,
        rights=_lists.describe(rights),
        origins=_lists.describe(origins),
        sums=sums.data_ptr(),
        dots=dots.data_ptr(),
        found_inf=address(flag),
        stream=_stream(lefts[0]),
    )
    write_back(found_inf, flag)
    return dots


def combine_(
    outs: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    origins: Sequence[Tensor] | None,
    *,
    left_weight: float | Tensor,
    right_weight: float | Tensor,
    origin_weight: float | Tensor,
    found_inf: Tensor | None,
) -> Tensor:  # () float32, float64 where an out is float64
    """Reads l, r (and o); writes out."""
    written(outs)
    described = _lists.describe(outs)
    sums = _sums(described, outs[0])
    norm = torch.empty((), dtype=torch.float64 if described.has_float64 else torch.float32, device=outs[0].device)
    flag = flag_of(found_inf)
    _cuda.combine(
        outs=described,
        lefts=_lists.describe(lefts),
        rights=_lists.describe(rights),
        origins=_lists.describe(origins),
        left_weight=number_of(left_weight),
        right_weight=number_of(right_weight),
        origin_weight=number_of(origin_weight),
        sums=sums.data_ptr(),
        norm=norm.data_ptr(),
        is_double=norm.dtype is torch.float64,
        found_inf=address(flag),
        stream=_stream(outs[0]),
    )
    write_back(found_inf, flag)
    return norm
