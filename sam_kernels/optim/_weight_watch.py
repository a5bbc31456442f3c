"""Whether somebody else has written weights while they were perturbed."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from sam_kernels._memory_of import is_fake

__all__ = ["WeightWatch"]

_WATCHED = 64  # parameters looked at


class WeightWatch:
    """What the ascent of the two-step API left: of many tensors a sample, since a version costs 40 ns to read.

    A tensor counts as written when its version has changed, or when it lies elsewhere (``param.data = ...``). What is written through
    ``param.data`` in place is not seen.
    """

    def __init__(self, params: Iterable[Tensor] = ()) -> None:
        self.params = list(params)
        stride = max(1, -(-len(self.params) // _WATCHED))
        self._seen = [(param, *_state(param)) for param in self.params[::stride]]
        self.watches_all = stride == 1

    def __len__(self) -> int:
        return len(self._seen)

    def written(self) -> list[Tensor]:
        """Of those looked at, the ones that somebody else has written."""
        return [param for param, *state in self._seen if _state(param) != tuple(state)]


def _state(param: Tensor) -> tuple[int, int]:
    """Version and address."""
    return param._version, 0 if is_fake(param) else param.data_ptr()
