"""Gradient norms of samples, estimated from the slopes of their losses along random directions.

For z with E[z z'] = I, E[(z·∇f_i)²] = ‖∇f_i‖². One direction z serves all samples (arXiv 2509.18001).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from sam_kernels import functional
from sam_kernels.optim._engine.lists import Copies, GroupLists, Key
from sam_kernels.optim._engine.passes import Passes
from sam_kernels.optim._engine.plan import StepPlan
from sam_kernels.optim._engine.replay import BufferGuard, RandomState
from sam_kernels.optim._reweighted.reweighting import Reweighting
from sam_kernels.optim._seeds import derived_seed

__all__ = ["DirectionalNorms"]

_HALVES = (torch.bfloat16, torch.float16)
_NODES_LOOKED_AT = 64


class DirectionalNorms:
    """√(mean over K directions of (z·∇f)²) over the trainable parameters of groups with ρ > 0.

    ``"finite_difference"``: z·∇f ≈ (f(w + δz) - f(w)) / δ; z is never stored, the weights are restored bit for bit. Bytes: 3 N s for the
    first direction, which saves the weights for the ascent too, 2 N s for each later one, 2 N s to restore. ``"jvp"``: forward-mode
    differentiation; z is stored, once.
    """

    def __init__(self, model: nn.Module, how: Reweighting) -> None:
        self._model, self._how = model, how
        self._guard = BufferGuard([model])
        self._tangents = Copies()
        self._is_tried = False

    def release(self) -> None:
        """Frees the memory of directions and of copies of buffers."""
        self._guard.release()
        self._tangents = Copies()

    def slopes(
        self,
        closure: Callable[[], Tensor],  # () -> (B,)
        plan: StepPlan,
        passes: Passes,
        random_state: RandomState,
        seed: int,
    ) -> list[Tensor]:  # K tensors (B,)
        """z·∇f_i along each direction; of finite differences, f_i(w + δz). No such pass leaves a trace: not in weights, not in buffers, and
        each sees the random numbers that the next pass will see, so that losses are compared under the same dropout masks."""
        self._guard.save()
        trainable, found = passes.trainable(plan), []
        for k in range(self._how.num_directions):
            seeds = [derived_seed(seed, k, i) for i in range(len(plan.groups))]
            try:
                with torch.no_grad():
                    slope = (self._slope if self._how.norms == "jvp" else self._loss_beside)(closure, trainable, passes, seeds)
                    found.append(slope.detach().clone())  # a compiled closure may write the next one to the same memory
            finally:
                self._guard.restore()
                random_state.replay()
        passes.restore()
        return found

    def norms(self, slopes: list[Tensor], losses: Tensor) -> Tensor:  # K tensors (B,), (B,) at w -> (B / m,)
        """Float32, float64 for float64 losses; squares are taken in float64."""
        at = losses.detach().double()
        each = torch.stack(slopes).double()
        if self._how.norms == "finite_difference":
            if not self._is_tried:
                _warn_of_16_bits(losses)
                self._is_tried = True
            each = (each - at) / self._length
        of_groups = each.view(len(slopes), -1, self._how.micro_batch).mean(2)
        return of_groups.square().mean(0).sqrt().to(torch.promote_types(losses.dtype, torch.float32))

    def _loss_beside(self, closure: Callable[[], Tensor], trainable: dict[Key, GroupLists], passes: Passes, seeds: Sequence[int]) -> Tensor:
        self._length = self._how.delta  # of the step, for each element of z
        if self._how.delta_scaling == "unit":
            d = sum(param.numel() for lists in trainable.values() for param in lists.owners)
            self._length /= math.sqrt(max(d, 1))
        passes.perturb_randomly(trainable, seeds, scale=self._length, distribution=self._how.distribution)
        return closure()

    def _slope(self, closure: Callable[[], Tensor], trainable: dict[Key, GroupLists], passes: Passes, seeds: Sequence[int]) -> Tensor:
        unpack_dual: Any = forward_ad.unpack_dual  # untyped
        with _dual_parameters(self._model, self._directions(trainable, passes, seeds)):
            tangent: Tensor | None = unpack_dual(closure()).tangent
        if tangent is None:
            raise RuntimeError(
                "RWSAM: norms='jvp': the losses do not depend on the model's parameters as it holds them, or were detached; "
                "norms='finite_difference' takes any model"
            )
        return tangent

    def _directions(self, trainable: dict[Key, GroupLists], passes: Passes, seeds: Sequence[int]) -> dict[Tensor, Tensor]:
        """z for each parameter: the numbers that a random perturbation of the same seed adds."""
        found: dict[Tensor, Tensor] = {}
        for key, lists in trainable.items():
            known = self._tangents.of(lists.params)
            zeros = passes.scratch(key, lists)
            torch._foreach_zero_(list(zeros))
            seed = passes.random_seed(lists, seeds[key[0]])
            functional.random_perturb_(known, zeros, seed=seed, scale=1.0, distribution=self._how.distribution, from_old=True)
            found.update(zip(lists.params, known, strict=True))
        return found


@contextmanager
def _dual_parameters(model: nn.Module, tangents: dict[Tensor, Tensor]) -> Iterator[None]:
    """Within, the model's parameters carry the tangents, and so does what is computed from them."""
    swapped: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter]] = []
    # Of attention's implementations only the plain one has a forward derivative on every device.
    with forward_ad.dual_level(), sdpa_kernel([SDPBackend.MATH]):
        make_dual: Any = forward_ad.make_dual  # untyped
        duals = {param: make_dual(param.detach(), tangent) for param, tangent in tangents.items()}
        try:
            for module in model.modules():
                parameters = module._parameters
                for name, param in parameters.items():
                    if param is not None and param in duals:
                        swapped.append((parameters, name, param))
                        parameters[name] = duals[param]
            yield
        finally:
            for parameters, name, param in swapped:
                parameters[name] = param


def _warn_of_16_bits(losses: Tensor) -> None:
    """Looks at the last operations of the forward pass: under autocast a loss is float32 again."""
    nodes, seen = [losses.grad_fn], 0
    while nodes and seen < _NODES_LOOKED_AT:
        node, seen = nodes.pop(0), seen + 1
        metadata: Any = getattr(node, "_input_metadata", ())  # of the operation's outputs; not public
        if losses.dtype in _HALVES or any(each.dtype in _HALVES for each in metadata):
            warnings.warn(
                "RWSAM: norms='finite_difference' of a forward pass in 16 bits: differences of its losses have hardly a digit; leave "
                "autocast off, keep parameters in float32, or use norms='exact' or 'jvp'",
                UserWarning,
                stacklevel=2,
            )
            return
        nodes += [] if node is None else [each for each, _ in node.next_functions]
