"""Gradients less the means of their slices with the CUDA kernel of ``csrc/cuda/centralize.cu``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sam_kernels.backends.native._arguments import address, flag_of, write_back
from sam_kernels.backends.native._cuda_lists import _cuda, _lists, _stream, _sums
from sam_kernels.backends.native._lists import written

__all__ = ["centralize_"]


def centralize_(
    grads: Sequence[Tensor],
    params: Sequence[Tensor] | None,
    slice_sizes: Sequence[int],  # n: 0 for a tensor that is left as it is
    *,
    adaptive: bool,
    eta: float,
    found_inf: Tensor | None,
) -> Tensor:  # () float32, float64 where a gradient is float64
    """Reads g (and p when adaptive); writes g."""
    written(grads)
    described = _lists.describe(grads)
    sums = _sums(described, grads[0], slice_sizes=slice_sizes)
    norm = torch.empty((), dtype=torch.float64 if described.has_float64 else torch.float32, device=grads[0].device)
    flag = flag_of(found_inf)
    _cuda.centralize(
        grads=described,
        params=_lists.describe(params) if adaptive else None,
        slice_sizes=slice_sizes,
        adaptive=adaptive,
        eta=eta,
        sums=sums.data_ptr(),
        norm=norm.data_ptr(),
        is_double=described.has_float64,
        found_inf=address(flag),
        stream=_stream(grads[0]),
    )
    write_back(found_inf, flag)
    return norm
