"""Whether somebody else has written weights while they were perturbed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sam_kernels._memory_of import is_fake

__all__ = ["WeightWatch"]

_ALL_WATCHED = 256  # parameters that are all looked at; of more, a sample
_WATCHED = 16


class WeightWatch:
    """What the ascent of the two-step API left: of many tensors a sample, since a version costs 40 ns to read.

    A tensor counts as written when its version has changed, or when it lies elsewhere (``param.data = ...``). What is written through
    ``param.data`` in place is not seen.
    """

    def __init__(self, lists: Sequence[Sequence[Tensor]] = ()) -> None:
        count = sum(map(len, lists))
        stride = 1 if count <= _ALL_WATCHED else count // _WATCHED
        self._lists = lists
        self._seen = [(param, *_state(param)) for params in lists for param in params[::stride]]
        self.watches_all = stride == 1

    @property
    def params(self) -> list[Tensor]:
        """All of them."""
        return [param for params in self._lists for param in params]

    def __len__(self) -> int:
        return len(self._seen)

    def written(self) -> list[Tensor]:
        """Of those looked at, the ones that somebody else has written."""
        return [param for param, *state in self._seen if _state(param) != tuple(state)]


def _state(param: Tensor) -> tuple[int, int]:
    """Version and address."""
    return param._version, 0 if is_fake(param) else param.data_ptr()
