"""The terms of each parameter, from all calls of one forward pass: first their squared norms, then the weighted gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from sam_kernels._validate import describe
from sam_kernels.per_sample._call import Call
from sam_kernels.per_sample._combine import combined, disjoint
from sam_kernels.per_sample._dots import dots_of
from sam_kernels.per_sample._small import SmallTerms, gradients_of, is_small
from sam_kernels.per_sample._terms import Convolution, Dense, Form, Outer, Place, Rows, Shift, Term, shape_of

__all__ = ["Gathered"]


class Gathered:
    """Squared norms of ``m`` groups of samples, ``batch`` samples in all.

    A parameter's norm is computed when all calls that use the parameter have been added. With ``keep`` the terms stay for weighted
    gradients. ``over``: the ids of the parameters that the norms are over; None: all.
    """

    _gathers_small = True  # gradients of small parameters wait for each other

    def __init__(
        self, calls: Sequence[Call], batch: int, m: int, device: torch.device, *, keep: bool, over: Collection[int] | None = None
    ) -> None:
        self.m = m
        self._batch, self.device, self._keep, self._over = batch, device, keep, over
        self._open = set(calls)
        self._awaited = Counter(id(param) for call in calls for param in call.params.values())
        self._terms: dict[int, list[tuple[Place | None, Form | Shift]]] = {}  # by the id of a parameter: hashing a tensor is slow
        self._kept: list[tuple[nn.Parameter, Place | None, Term]] = []
        self._pairs: list[tuple[nn.Parameter, nn.Parameter, Outer]] = []  # kept too: a weight and its bias
        self._small: dict[tuple[torch.device, torch.dtype], SmallTerms] = {}
        self._square_norms: dict[torch.device, Tensor] = {}  # (M,) each

    def add(self, call: Call) -> None:
        """Add a call that has received the gradients of all its outputs."""
        self._open.discard(call)
        if call.has_gradient:
            terms = self._terms_of(call)
            for name, param in call.params.items():
                if name in terms:  # else a second name of a parameter, which the rule does not use
                    self._terms.setdefault(id(param), []).append((call.places.get(name), terms[name]))
            if self._take_together(call, terms):
                return
        for param in call.params.values():
            self._awaited[id(param)] -= 1
            if self._awaited[id(param)] == 0:
                self._close(param)

    def _take_together(self, call: Call, terms: dict[str, Form | Shift]) -> bool:
        """Add the norms of a linear layer's weight and bias in one call of the kernel. False if another call uses one of the two."""
        outer, shift = terms.get("weight"), terms.get("bias")
        if not (isinstance(outer, Outer) and isinstance(shift, Shift) and outer.left is shift.left and len(terms) == 2):
            return False
        params = list(call.params.values())
        if not all(map(self.counts, params)):
            return False
        if any(self._awaited[id(param)] > 1 or len(self._terms[id(param)]) > 1 for param in params):
            return False
        outer.add_square_norms_(self._square_norms_on(params[0].device), keep=self._keep, with_shift=True)
        together = self._keep and outer.gives_shift and not call.places
        if together:
            self._pairs.append((call.params["weight"], call.params["bias"], outer))
        for name, param in call.params.items():
            place = self._terms.pop(id(param))[0][0]
            self._awaited[id(param)] = 0
            if self._keep and not together:
                term = terms[name]
                freed = isinstance(term, Shift) and outer.left is not term.left  # a product is kept: let the rest go here too
                self._kept.append((param, place, term.dense() if freed and isinstance(term, Shift) else term))
        return True

    def finish(self, calls: Sequence[Call]) -> None:
        """Add the calls that are left: those that had to wait, and those with outputs that got no gradient because it is zero."""
        for call in reversed(calls):
            if call in self._open:
                self.add(call)

    def square_norms(self) -> Tensor:  # (M,) float64
        """Return the squared norms of the parameters of all devices, on the device of the losses. Call it once."""
        for (device, _), small in self._small.items():
            small.add_square_norms_(self._square_norms_on(device))
        total = self._square_norms_on(self.device)
        for device, square_norms in self._square_norms.items():
            if device != self.device:
                total += square_norms.to(self.device)
        return total

    def dots(self, vectors: Mapping[int, Tensor]) -> Tensor:  # (M,) float64
        """Return the inner products of the groups' gradients with ``vectors``, by the ids of the parameters. The terms stay."""
        total = torch.zeros(self.m, dtype=torch.float64, device=self.device)
        terms: list[tuple[nn.Parameter, Place | None, Term]] = list(self._kept)
        for weight, bias, outer in self._pairs:
            terms += [(weight, None, outer), (bias, None, Shift(outer.left))]
        for small in self._small.values():
            terms += small.terms()
        for param, place, term in terms:
            vector = vectors.get(id(param))
            if vector is not None:
                total += dots_of(term, vector if place is None else vector[slice(*place)], self.m).to(self.device)
        return total

    def add_weighted_grads(self, weights: Tensor | None) -> None:  # (M,), None: 1 everywhere
        """Add the weighted gradient of every parameter to its ``.grad``, and free the terms."""
        while self._pairs:
            weight, bias, outer = self._pairs.pop()
            grads = outer.weighted_with_shift(None if weights is None else weights.to(weight.device), weight.shape)
            del outer
            for param, grad in zip((weight, bias), grads, strict=True):
                _add_grad(param, None, grad)
        while self._kept:
            param, place, term = self._kept.pop()
            _add_grad(param, place, term.weighted(None if weights is None else weights.to(param.device), shape_of(param, place)))
        while self._small:
            (device, _), small = self._small.popitem()
            for param, place, grad in small.weighted(None if weights is None else weights.to(device)):
                _add_grad(param, place, grad)

    def _terms_of(self, call: Call) -> dict[str, Form | Shift]:
        arguments, keywords, grads = call.operands(self._batch)
        try:
            with call.as_it_was():
                found = call.rule(call.module, arguments, keywords, grads)
        except NotImplementedError as error:
            raise NotImplementedError(f"GradNorms: {call.name}: {error}") from error
        given = {id(param) for name, param in call.params.items() if name in found}
        missing = [name for name, param in call.params.items() if id(param) not in given]
        if missing:
            raise NotImplementedError(f"GradNorms: the rule for {call.name} gives no gradient for {', '.join(missing)}")
        return {name: self._checked(call, name, found[name]) for name in call.params if name in found}

    def _checked(self, call: Call, name: str, term: Tensor | Term) -> Form | Shift:
        term = Dense(term) if isinstance(term, Tensor) else term
        if not isinstance(term, Dense | Outer | Shift | Convolution | Rows):
            raise TypeError(f"GradNorms: the rule for {call.name} gives {describe(term)} for {name}, expected a tensor or a term")
        shape = shape_of(call.params[name], call.places.get(name))
        if not term.fits(self._batch, shape):
            raise ValueError(
                f"GradNorms: the rule for {call.name} gives a gradient of shape {term.sizes()} for {name}, expected {(self._batch, *shape)}"
            )
        return term

    def _square_norms_on(self, device: torch.device) -> Tensor:  # (M,)
        square_norms = self._square_norms.get(device)
        if square_norms is None:
            square_norms = self._square_norms[device] = torch.zeros(self.m, dtype=torch.float64, device=device)
        return square_norms

    def _close(self, param: nn.Parameter) -> None:
        """Add the squared norms of a parameter whose calls have all been added."""
        by_place: dict[Place | None, list[Form | Shift]] = {}
        for place, term in disjoint(self._terms.pop(id(param), []), len(param) if param.dim() else 1):
            by_place.setdefault(place, []).append(term)
        square_norms = self._square_norms_on(param.device)
        for place, terms in by_place.items():
            joined = combined(terms, shape_of(param, place))
            is_counted = self.counts(param)  # else its gradient may be wanted all the same
            if is_counted and self._gathers_small and is_small(joined):
                grads = gradients_of(joined, self.m)
                self._small.setdefault((param.device, grads.dtype), SmallTerms()).add(param, place, grads)
                continue
            if is_counted:
                joined.add_square_norms_(square_norms, keep=self._keep)
            if self._keep:
                self._kept.append((param, place, joined))

    def counts(self, param: nn.Parameter) -> bool:
        """Whether the norms are over the parameter."""
        return self._over is None or id(param) in self._over


def _add_grad(param: nn.Parameter, place: Place | None, grad: Tensor) -> None:
    grad = grad.to(param.dtype)
    if place is not None:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        param.grad[slice(*place)] += grad
    elif param.grad is None:
        param.grad = grad if grad.stride() == param.stride() else torch.empty_like(param).copy_(grad)  # as autograd lays it out
    else:
        param.grad += grad
