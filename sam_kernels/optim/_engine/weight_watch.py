"""Weights that somebody else writes between the two passes are theirs: kept, or an error, never overwritten."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from itertools import chain

from torch import Tensor

from sam_kernels._sharding import READS_PLAINLY
from sam_kernels._tensor_list import TensorList
from sam_kernels.optim._engine.lists import address_of

__all__ = ["NOTHING_WATCHED", "WeightWatch"]

_ALL_WATCHED = 256  # parameters that are all looked at; of more, a sample: to read a version costs 40 ns
_WATCHED = 16
_VERSION = operator.attrgetter("_version")


class WeightWatch:
    """Notes versions and addresses of perturbed parameters (of many a sample) as the two-step API's ascent left them."""

    def __init__(self, lists: Sequence[tuple[list[Tensor], list[Tensor]]] = ()) -> None:
        """``lists``: what operations have written, and the parameters that it belongs to, which are the same but for DTensors."""
        count = sum(len(owners) for _, owners in lists)
        stride = 1 if count <= _ALL_WATCHED else count // _WATCHED
        self._lists = lists
        self._watches_all = stride == 1
        self._has_addresses = all(isinstance(params, TensorList) for params, _ in lists)  # trusted: ordinary memory
        self._watched = list(chain.from_iterable(owners[::stride] for _, owners in lists))
        self._memory = list(chain.from_iterable(params[::stride] for params, _ in lists))
        self._versions = self._read_versions()
        self._addresses = self._read_addresses()

    def check_unwritten(self) -> None:
        """Raises RuntimeError where a parameter was written, or lies elsewhere: the update would overwrite it."""
        self._check_unmoved()
        if written := self._written():
            raise RuntimeError(
                f"SAM: {len(written)} of {len(self._watched)} parameters looked at were written between first_step and second_step, which "
                "starts from the weights of before; begin the step anew with first_step, which keeps what was written"
            )

    def written(self) -> Collection[Tensor]:
        """What somebody else has written. Raises RuntimeError where that is not known."""
        self._check_unmoved()
        written = self._written()
        if not written or self._watches_all:
            return written
        if len(written) < len(self._watched):
            raise RuntimeError(
                "SAM: after first_step some of the parameters were written by somebody else and some were not, and of so many it is not "
                "known which, so all stay as they are now; load the weights to go on from, and call second_step before loading some"
            )
        return {owner for _, owners in self._lists for owner in owners}

    def _read_versions(self) -> list[int]:
        with READS_PLAINLY():
            return list(map(_VERSION, self._watched))

    def _read_addresses(self) -> list[int]:
        return list(map(Tensor.data_ptr if self._has_addresses else address_of, self._memory))

    def _written(self) -> set[Tensor]:
        versions = self._read_versions()
        if versions == self._versions:
            return set()
        return {param for param, now, then in zip(self._watched, versions, self._versions, strict=True) if now != then}

    def _check_unmoved(self) -> None:
        """Weights set through ``.data`` have the old version: whether they are the perturbed ones or others is not known."""
        addresses = self._read_addresses()
        if addresses == self._addresses:
            return
        moved = sum(map(operator.ne, addresses, self._addresses))
        raise RuntimeError(
            f"SAM: {moved} of {len(self._watched)} parameters looked at lie elsewhere than first_step left them (.data was set), and "
            "whether they are the perturbed weights or new ones is not known; set .data before first_step or after second_step, or "
            "load the weights to go on from"
        )


NOTHING_WATCHED = WeightWatch()
