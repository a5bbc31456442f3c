"""What an exception in a step of several ranks says beside its own words: on which rank, and whether another one is to blame."""

from __future__ import annotations

from torch import OutOfMemoryError, distributed

__all__ = ["note_failure"]

_OF_COLLECTIVES = ("gloo", "nccl", "caused pair closure", "connection closed by peer", "connection reset by peer", "process group")


def note_failure(error: BaseException, more: str = "") -> None:
    """Adds a note to ``error``, which a step has raised and undone. Python 3.10 has no notes. Communicates with nobody."""
    if not hasattr(error, "add_note"):
        return
    where = "on this rank"
    if distributed.is_initialized():
        where = f"on rank {distributed.get_rank()} of {distributed.get_world_size()}"
    if _is_of_collective(error):
        error.add_note(
            f"SAM: a collective failed {where}: another rank has probably raised, left or come late; look at its error first. Weights of "
            f"this rank are those of before the step; the process group can usually not be used any more{more}"
        )
    else:
        error.add_note(
            f"SAM: raised {where}, whose weights are those of before the step; ranks that do not raise too wait for this one until the "
            f"process group times out{more}"
        )


def _is_of_collective(error: BaseException) -> bool:
    """Backends raise a RuntimeError, or a subclass of it, with words of their own."""
    if isinstance(error, getattr(distributed, "DistError", ())):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and not isinstance(error, OutOfMemoryError) and any(each in words for each in _OF_COLLECTIVES)
