"""The mean of m-SAM's descent gradients over the micro-batches of all ranks, in one all-reduce of ``DistributedDataParallel``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor

from sam_kernels.optim._batches.micro_batches import GradientMean
from sam_kernels.optim._types import ParamGroup

__all__ = ["RankMean"]


class RankMean(GradientMean):
    """:class:`GradientMean` whose last micro-batch is averaged over ranks, and takes the mean of the others with it.

    ``DistributedDataParallel`` reduces what lies in ``.grad`` after its parameter has accumulated a gradient. So the mean of the rank's
    earlier micro-batches, divided for the whole count, is put into ``.grad``, and the gradient of the last micro-batch is divided by the
    count before it is accumulated: the buckets carry the finished mean. This keeps communication hooks of the caller's, and the overlap of
    the all-reduce with the backward pass; a reduction of our own would lose both, or be a second one.

    The mean is put there by the first hook of the last backward pass, before any gradient is accumulated: earlier, the closure's
    ``zero_grad`` would erase it, wherever that is called. All parameters get theirs at once, because torch reduces a parameter without a
    gradient in this pass (``find_unused_parameters=True``) as soon as it has heard of the first one that has.

    Per parameter of s bytes: 2 N s to put the mean, 2 to divide, 3 to accumulate (m-SAM on one rank: 3), and 1 for the check before the
    update. 16-bit parameters: the sum is rounded twice more, as by any accumulation under ``no_sync()``.
    """

    def add(self, groups: list[ParamGroup]) -> None:
        """As in the class above; the last gradient is part of the mean already."""
        if not self._is_put:
            super().add(groups)

    def put(self, groups: list[ParamGroup]) -> Tensor | None:
        """None: the norm of the mean over ranks is not known."""
        return None

    _is_put = False

    @contextmanager
    def carried_by_the_next_backward(self, groups: list[ParamGroup]) -> Iterator[None]:
        """Around the closure of the last descent. Raises RuntimeError when it has not run a backward pass."""
        lock = Lock()  # a backward pass has a thread for each device

        def hook(grad: Tensor) -> Tensor:
            with lock:
                if not self._is_put:
                    self._is_put = True
                    with torch.no_grad():
                        super(RankMean, self).put(groups)
            return grad / self._count

        params = [param for group in groups for param in group["params"] if param.requires_grad]
        handles = [param.register_hook(hook) for param in params]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if not self._is_put:
            raise RuntimeError(
                "SAM.step: the closure of the last micro-batch ran no backward pass that reaches a parameter; call loss.backward()"
            )
