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
from sam_kernels.optim._held_still import BufferGuard, RandomState
from sam_kernels.optim._passes import Passes
from sam_kernels.optim._reweighting import Reweighting
from sam_kernels.optim._seeds import derived_seed

__all__ = ["DirectionalNorms"]

_HALVES = (torch.bfloat16, torch.float16)


class DirectionalNorms:
    """√(mean over K directions of (z·∇f)²) over the trainable parameters of groups with ρ > 0.

    ``"finite_difference"``: z·∇f ≈ (f(w + δz) - f(w)) / δ; z is never stored, the weights are restored bit for bit. Bytes: 3 N s for the
    first direction, which saves the weights for the ascent too, 2 N s for each later one, 2 N s to restore. ``"jvp"``: forward-mode
    differentiation; z is stored, once.
    """

    def __init__(self, model: nn.Module, how: Reweighting) -> None:
        self._model, self._how = model, how
        self._tangents: dict[int, list[Tensor]] = {}  # by group

    def release(self) -> None:
        """Frees the memory of directions."""
        self._tangents = {}

    def __call__(
        self,
        closure: Callable[[], Tensor],  # () -> (B,)
        groups: list[dict[str, Any]],
        passes: Passes,
        guard: BufferGuard,
        random_state: RandomState,
        seed: int,
    ) -> tuple[Tensor, Tensor]:  # (B,) with their graph, (B / m,)
        """The losses at w and the norms. What went before may be undone by ``passes.restore()`` and ``guard.restore()`` at any time."""
        guard.save()
        found = []
        for k in range(self._how.num_directions):
            seeds = [derived_seed(seed, k, i) for i in range(len(groups))]
            try:
                with torch.no_grad():
                    found.append((self._slope if self._how.norms == "jvp" else self._loss_beside)(closure, groups, passes, seeds))
            finally:
                guard.restore()
                random_state.replay()  # a loss may be compared with one of the same dropout masks alone
        passes.restore()
        losses = closure()
        at = losses.detach().to(torch.promote_types(losses.dtype, torch.float32))
        if self._how.norms == "finite_difference":
            _warn_of_16_bits(losses, groups)
            delta = self._length(groups, passes)
            found = [(beside.to(at.dtype) - at) / delta for beside in found]
        slopes = torch.stack(found).to(at.dtype)  # (K, B)
        of_groups = slopes.view(len(slopes), -1, self._how.micro_batch).mean(2)
        return losses, of_groups.square().mean(0).sqrt()

    def _loss_beside(self, closure: Callable[[], Tensor], groups: list[dict[str, Any]], passes: Passes, seeds: Sequence[int]) -> Tensor:
        passes.perturb_randomly(groups, seeds, scale=self._length(groups, passes), distribution=self._how.distribution)
        return closure()

    def _slope(self, closure: Callable[[], Tensor], groups: list[dict[str, Any]], passes: Passes, seeds: Sequence[int]) -> Tensor:
        with _dual_parameters(self._model, self._directions(groups, passes, seeds)):
            tangent: Tensor | None = forward_ad.unpack_dual(closure()).tangent
        if tangent is None:
            raise RuntimeError(
                "RWSAM: norms='jvp': the losses do not depend on the model's parameters as it holds them; where it is compiled, or keeps "
                "its weights elsewhere (nn.LSTM), there is no forward derivative: use norms='finite_difference'"
            )
        return tangent

    def _length(self, groups: list[dict[str, Any]], passes: Passes) -> float:
        """Of the step of finite differences, for each element of z."""
        if self._how.delta_scaling == "sqrt_d":
            return self._how.delta
        d = sum(param.numel() for lists in passes.trainable(groups).values() for param in lists.params)
        return self._how.delta / math.sqrt(max(d, 1))

    def _directions(self, groups: list[dict[str, Any]], passes: Passes, seeds: Sequence[int]) -> dict[Tensor, Tensor]:
        """z for each parameter: the numbers that a random perturbation of the same seed adds."""
        found: dict[Tensor, Tensor] = {}
        for i, lists in passes.trainable(groups).items():
            known = self._tangents.get(i, [])
            if len(known) != len(lists.params) or not all(map(_is_alike, known, lists.params)):
                known = self._tangents[i] = [torch.empty_like(param, requires_grad=False) for param in lists.params]
            zeros = passes.scratch(i, lists)
            torch._foreach_zero_(list(zeros))
            options: dict[str, Any] = {"seed": seeds[i], "scale": 1.0, "distribution": self._how.distribution}
            functional.random_perturb_(known, zeros, **options, from_old=True)
            found.update(zip(lists.params, known, strict=True))
        return found


@contextmanager
def _dual_parameters(model: nn.Module, tangents: dict[Tensor, Tensor]) -> Iterator[None]:
    """Within, the model's parameters carry the tangents, and so does what is computed from them."""
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    # Of attention's implementations only the plain one has a forward derivative on every device.
    with forward_ad.dual_level(), sdpa_kernel([SDPBackend.MATH]):
        make_dual: Any = forward_ad.make_dual  # untyped
        duals = {param: make_dual(param.detach(), tangent) for param, tangent in tangents.items()}
        try:
            for module in model.modules():
                parameters: dict[str, Any] = module._parameters
                for name, param in parameters.items():
                    if param is not None and param in duals:
                        swapped.append((parameters, name, param))
                        parameters[name] = duals[param]
            yield
        finally:
            for parameters, name, param in swapped:
                parameters[name] = param


def _is_alike(tangent: Tensor, param: Tensor) -> bool:
    return (tangent.shape, tangent.stride(), tangent.dtype, tangent.device) == (param.shape, param.stride(), param.dtype, param.device)


def _warn_of_16_bits(losses: Tensor, groups: list[dict[str, Any]]) -> None:
    if losses.dtype in _HALVES:
        kind = str(losses.dtype).removeprefix("torch.")
        what = f"losses in {kind}: their difference has no digits left; compute them in float32"
    elif any(param.dtype in _HALVES for group in groups for param in group["params"]):
        what = "parameters in 16 bits: most of them do not move by delta; use norms='exact'"
    else:
        return
    warnings.warn(f"RWSAM: norms='finite_difference' with {what}", UserWarning, stacklevel=2)
