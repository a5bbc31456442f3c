"""What ``SAM.step`` was given, as the pairs of passes that it makes: one pair, or one for each micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sam_kernels._validate import describe
from sam_kernels.optim._batches.cut import cut_batch

__all__ = ["Closure", "TwoPasses", "passes_of", "split_batch"]

Closure = Callable[[], Any]
TwoPasses = tuple[Closure, Closure]  # for the gradient of the ascent, and for that of the descent


def passes_of(closure: Any, batch: Any, micro_batches: Any, ascent_closure: Any) -> list[TwoPasses] | None:
    """None without a closure. Raises TypeError or ValueError for what is no closure and for what does not go together."""
    if closure is None:
        for name, value in (("batch", batch), ("micro_batches", micro_batches), ("ascent_closure", ascent_closure)):
            if value is not None:
                raise ValueError(f"SAM.step: {name} needs a closure")
        return None
    is_list = isinstance(closure, list | tuple)
    closures: list[Any] = list(closure) if is_list else [closure]
    if not closures or not all(callable(function) for function in closures):
        raise TypeError(f"SAM.step: closure must be a callable or a non-empty list of callables, got {closure!r}")
    if is_list and (batch is not None or micro_batches is not None):
        raise ValueError("SAM.step: batch and micro_batches go with one closure, a list of closures has one for each micro-batch")
    if batch is None and micro_batches is not None:
        raise ValueError("SAM.step: micro_batches needs batch, the arguments to cut into pieces")
    if ascent_closure is not None:
        if not callable(ascent_closure):
            raise TypeError(f"SAM.step: ascent_closure must be a callable, got {describe(ascent_closure)}")
        if is_list or batch is not None:
            raise ValueError(
                "SAM.step: with ascent_closure there is one perturbation: give it one closure, and neither batch nor micro_batches"
            )
        return [(ascent_closure, closure)]
    if batch is not None:
        closures = [partial(closure, *piece) for piece in split_batch(batch, 1 if micro_batches is None else micro_batches)]
    return [(function, function) for function in closures]


def split_batch(batch: Any, micro_batches: Any) -> list[Sequence[Any]]:
    """Return ``batch`` as ``micro_batches`` batches of the same structure: :func:`cut_batch`, behind the checks of its arguments."""
    if isinstance(micro_batches, bool) or not isinstance(micro_batches, int):
        raise TypeError(f"SAM.step: micro_batches must be an integer, got {describe(micro_batches)}")
    if micro_batches < 1:
        raise ValueError(f"SAM.step: micro_batches must be at least 1, got {micro_batches}")
    if not isinstance(batch, list | tuple):
        raise TypeError(f"SAM.step: batch must be a tuple or a list, what closure(*batch) is called with, got {describe(batch)}")
    return cut_batch(batch, micro_batches)
