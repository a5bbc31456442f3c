"""Gradients of biases, scales and shifts, side by side: one kernel and one product for all of them, not one for each parameter."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sam_kernels._tensor_list import arithmetic_dtype
from sam_kernels.per_sample._terms import Dense, Place, Shift, Term, shape_of

__all__ = ["SmallTerms", "gradients_of", "is_small"]

SMALL = 4096  # elements of a parameter: of more, the copy costs more than a call


def is_small(term: Term) -> bool:
    """Whether a parameter's gradients are to lie beside others'."""
    if isinstance(term, Shift):
        return term.left.shape[2] <= SMALL
    return isinstance(term, Dense) and term.grads.numel() <= SMALL * len(term.grads)


def gradients_of(term: Term, m: int) -> Tensor:  # (M, numel) float32, float64 for gradients in float64
    """The gradients of ``m`` groups, of a term that is small."""
    dense = term.dense() if isinstance(term, Shift) else term
    assert isinstance(dense, Dense)
    grads = dense.of_groups(m)
    return grads.to(arithmetic_dtype((grads,)))


class SmallTerms:
    """Terms of parameters on one device, in one arithmetic type."""

    def __init__(self) -> None:
        self._params: list[tuple[nn.Parameter, Place | None]] = []
        self._grads: list[Tensor] = []  # (M, numel) each
        self._rows = Dense(torch.empty(0))  # all of them

    def add(self, param: nn.Parameter, place: Place | None, grads: Tensor) -> None:  # (M, numel)
        """The gradients of ``param``'s rows at ``place``."""
        self._params.append((param, place))
        self._grads.append(grads)

    def add_square_norms_(self, square_norms: Tensor) -> None:  # (M,) float64
        """Add the squared norms of all terms. Call it once, when all of them are there."""
        self._rows = Dense(torch.cat(self._grads, 1) if len(self._grads) > 1 else self._grads[0])
        self._grads = []
        self._rows.add_square_norms_(square_norms, keep=False)

    def terms(self) -> Iterator[tuple[nn.Parameter, Place | None, Dense]]:
        """Each parameter's own, after :meth:`add_square_norms_`."""
        sizes = [shape_of(param, place).numel() for param, place in self._params]
        for (param, place), grads in zip(self._params, torch.split(self._rows.grads, sizes, 1), strict=True):
            yield param, place, Dense(grads)

    def weighted(self, weights: Tensor | None) -> Iterator[tuple[nn.Parameter, Place | None, Tensor]]:  # (M,)
        """Each parameter's weighted gradient."""
        sums = self._rows.weighted(weights, self._rows.grads.shape[1:])
        shapes = [shape_of(param, place) for param, place in self._params]
        for (param, place), shape, grad in zip(self._params, shapes, torch.split(sums, [shape.numel() for shape in shapes]), strict=True):
            yield param, place, grad.view(shape)
