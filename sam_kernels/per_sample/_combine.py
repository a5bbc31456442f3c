"""A parameter that several calls share: tied weights, a cell called step after step. Their gradients add up before the norm is taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sam_kernels._tensor_list import arithmetic_dtype
from sam_kernels.per_sample._terms import Convolution, Dense, Form, Outer, Place, Rows, Shift, Term

__all__ = ["combined", "disjoint"]

_TEMPORARY = 1 << 24  # elements of gradients multiplied out at a time, or one group's


def combined(uses: Sequence[Form | Shift], shape: torch.Size) -> Term:
    """One term for the sum of several uses of one parameter of this ``shape``, cross terms included."""
    if len(uses) == 1:
        return uses[0]
    terms = _joined_rows([t.dense() if isinstance(t, Shift) else t for t in uses])
    outers, rows = [t for t in terms if isinstance(t, Outer)], [t for t in terms if isinstance(t, Rows)]
    dense, convolutions = [t for t in terms if isinstance(t, Dense)], [t for t in terms if isinstance(t, Convolution)]
    if len(outers) == len(terms):
        return _joined_outers(outers)
    if len(terms) == 1:
        return terms[0]
    if len(dense) == len(terms):
        return Dense(torch.stack([t.grads.reshape(len(t.grads), -1) for t in dense]).sum(0))
    if len(convolutions) == len(terms) and len({_sizes(t) for t in convolutions}) == 1:
        return _joined_convolutions(convolutions)
    if len(rows) == 1 and len(outers) == len(terms) - 1:
        return Tied(rows[0], _joined_outers(outers), shape)
    return Mixed(tuple(terms), shape)


def disjoint(uses: Sequence[tuple[Place | None, Form | Shift]], length: int) -> list[tuple[Place | None, Form | Shift]]:
    """The same uses of a parameter of so many rows, cut where another's begin or end: cross terms are between uses of the same rows."""
    if len({place for place, _ in uses}) <= 1:
        return list(uses)
    borders = sorted({border for place, _ in uses for border in place or (0, length)})
    found: list[tuple[Place | None, Form | Shift]] = []
    for place, term in uses:
        first, last = place or (0, length)
        for start, stop in pairwise(borders):
            if first <= start and stop <= last:
                found.append(((start, stop), _part(term, start - first, stop - first)))
    return found


def _part(term: Form | Shift, start: int, stop: int) -> Form | Shift:
    if isinstance(term, Outer):
        return Outer(term.left[:, :, start:stop], term.right)
    if isinstance(term, Dense):
        return Dense(term.grads[:, start:stop])
    if isinstance(term, Shift):
        return Shift(term.left[:, :, start:stop])
    raise NotImplementedError(f"GradNorms: a parameter is used in parts, as of an attention, and as a whole by a {type(term).__name__}")


def _joined_rows(terms: Sequence[Form]) -> list[Form]:
    """Embeddings of one padding, one sequence after the other."""
    rows = [t for t in terms if isinstance(t, Rows)]
    if len(rows) < 2 or len({t.padding_idx for t in rows}) > 1:
        return list(terms)
    joined = Rows(torch.cat([t.indices for t in rows], 1), torch.cat([t.values for t in rows], 1), rows[0].padding_idx)
    return [joined, *(t for t in terms if not isinstance(t, Rows))]


def _joined_outers(terms: Sequence[Outer]) -> Outer:
    """One sequence after the other: T1 + T2 + ... positions."""
    if len(terms) == 1:
        return terms[0]
    return Outer(torch.cat([t.left for t in terms], 1), torch.cat([t.right for t in terms], 1))


def _sizes(term: Convolution) -> tuple[object, ...]:
    sizes = (term.kernel_size, term.stride, term.padding, term.dilation, term.groups)
    return (*sizes, term.inputs.shape, term.grad_outputs.shape)


def _joined_convolutions(terms: Sequence[Convolution]) -> Convolution:
    """A sample's calls as consecutive samples of its group."""
    inputs = torch.stack([t.inputs for t in terms], 1).flatten(0, 1)
    grad_outputs = torch.stack([t.grad_outputs for t in terms], 1).flatten(0, 1)
    return dataclasses.replace(terms[0], inputs=inputs, grad_outputs=grad_outputs)


@dataclass
class Tied:
    """An embedding whose matrix is a linear layer's weight too: |E + W|^2 = |E|^2 + |W|^2 + 2 <E, W>."""

    rows: Rows
    outer: Outer
    shape: torch.Size

    def add_square_norms_(self, square_norms: Tensor, *, keep: bool) -> None:
        self.rows.add_square_norms_(square_norms, keep=keep)
        self.outer.add_square_norms_(square_norms, keep=False)  # its factors are needed below
        m = len(square_norms)
        ids, values = self.rows.indices.reshape(m, -1), self.rows.values.reshape(m, -1, self.shape[1])
        left, right = self.outer.left.reshape(m, -1, self.shape[0]), self.outer.right.reshape(m, -1, self.shape[1])
        dtype = arithmetic_dtype((values, right))
        for i in range(m):  # one group's (T, S) products at a time
            # <E, W> = sum over s, t of left_t[id_s] <values_s, right_t>
            products = torch.mm(right[i].to(dtype), values[i].to(dtype).mT)
            if self.rows.padding_idx is not None:
                products = products.masked_fill(ids[i] == self.rows.padding_idx, 0.0)
            square_norms[i] += 2 * (products * left[i][:, ids[i]]).sum().to(square_norms.dtype)

    def weighted(self, weights: Tensor | None, shape: torch.Size) -> Tensor:
        return self.rows.weighted(weights, shape) + self.outer.weighted(weights, shape)


@dataclass
class Mixed:
    """Uses of different kinds: the gradients of some groups at a time are multiplied out and added."""

    terms: tuple[Form, ...]
    shape: torch.Size

    def add_square_norms_(self, square_norms: Tensor, *, keep: bool) -> None:
        m = len(square_norms)
        samples = self.terms[0].sizes()[0] // m
        step = max(1, _TEMPORARY // max(1, samples * self.shape.numel()))
        for start in range(0, m, step):
            stop = min(m, start + step)
            part = slice(start * samples, stop * samples)
            grads = torch.stack([term.sample_grads(part, self.shape) for term in self.terms]).sum(0)
            Dense(grads).add_square_norms_(square_norms[start:stop], keep=keep)

    def weighted(self, weights: Tensor | None, shape: torch.Size) -> Tensor:
        return torch.stack([term.weighted(weights, shape).reshape(shape) for term in self.terms]).sum(0)
