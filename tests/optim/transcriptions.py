"""The members of the family as the papers' formulas are written, step by step, around torch's own optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.optim.problem import set_weights, weights

__all__ = ["TRANSCRIPTIONS", "Transcription"]

EPS = 1e-12
LossOf = Callable[[nn.Module, Any], Tensor]


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return sum(((a * b).sum() for a, b in zip(left, right, strict=True)), torch.zeros((), dtype=torch.float64))


class Transcription:
    """SAM itself; every method that a member changes is one of its formula's lines.

    ``rho``, ``adaptive`` and ``scale`` are one value, or one for each parameter. A parameter without a gradient has 0 in the formulas, and
    is not stepped where it is the last pass that gave none.
    """

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        loss_of: LossOf,
        *,
        rho: float | Sequence[float],
        lambd: float = 1.0,
        adaptive: bool | Sequence[bool] = False,
        eta: float = 0.0,
        scale: float | Sequence[float] = 1.0,
        max_grad_norm: float | None = None,
        **options: Any,
    ) -> None:
        self.model, self.base, self.loss_of, self.options = model, base, loss_of, options
        self.rho, self.lambd, self.adaptive, self.eta = rho, lambd, adaptive, eta
        self.scale = scale
        self.max_grad_norm = max_grad_norm
        self.t = 0
        self.memory: list[Tensor] = []

    def gradients(self, batch: Any) -> list[Tensor]:
        self.model.zero_grad()
        loss = self.loss_of(self.model, batch)
        loss.backward()
        self.loss = loss.item()
        self.absent = [param.grad is None for param in self.model.parameters()]
        return [torch.zeros_like(param) if param.grad is None else param.grad.clone() for param in self.model.parameters()]

    def each(self, value: Any) -> list[Any]:
        """One for each parameter."""
        return list(value) if isinstance(value, Sequence) else [value for _ in self.model.parameters()]

    def of_groups(self, key: str) -> list[Any]:
        """A base option, for each parameter."""
        known = {param: group[key] for group in self.base.param_groups for param in group["params"]}
        return [known[param] for param in self.model.parameters()]

    def move(self, by: list[Tensor]) -> None:
        """Weights that have a gradient are moved."""
        set_weights(self.model, [w if gone else w + each for w, each, gone in zip(weights(self.model), by, self.absent, strict=True)])

    def gradients_at(self, point: list[Tensor], batch: Any) -> list[Tensor]:
        start = weights(self.model)
        set_weights(self.model, point)
        found = self.gradients(batch)
        set_weights(self.model, start)
        return found

    def perturbed(self, start: list[Tensor], d: list[Tensor]) -> list[Tensor]:
        """x + ρ (1 - λ + λ / (‖T d‖ + ε)) T² d, over the parameters with ρ > 0"""
        rhos = self.each(self.rho)
        scaling = [
            scale * (param.abs() + self.eta if adaptive else torch.ones_like(param))
            for param, adaptive, scale in zip(start, self.each(self.adaptive), self.each(self.scale), strict=True)
        ]
        scaling = [t if rho > 0 else torch.zeros_like(t) for t, rho in zip(scaling, rhos, strict=True)]
        norm = dot([t * each for t, each in zip(scaling, d, strict=True)], [t * each for t, each in zip(scaling, d, strict=True)]).sqrt()
        self.norm = norm.item()
        s = 1 - self.lambd + self.lambd / (norm + EPS)
        return [w + rho * s * t * t * each for w, rho, t, each in zip(start, rhos, scaling, d, strict=True)]

    def base_step(self, grads: list[Tensor]) -> None:
        for param, grad, gone in zip(self.model.parameters(), grads, self.absent, strict=True):
            param.grad = None if gone else grad.clone()
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.base.step()

    def direction(self, g: list[Tensor]) -> list[Tensor]:
        return g

    def descent(self, g: list[Tensor], g_p: list[Tensor]) -> list[Tensor]:
        return g_p

    def step(self, batch: Any) -> None:
        self.t += 1
        start = weights(self.model)
        g = self.gradients(batch)
        g_p = self.gradients_at(self.perturbed(start, self.direction(g)), batch)
        self.base_step(self.descent(g, g_p))


class VaSSO(Transcription):
    def direction(self, g: list[Tensor]) -> list[Tensor]:
        theta = self.options["theta"]
        self.memory = g if not self.memory else [(1 - theta) * m + theta * each for m, each in zip(self.memory, g, strict=True)]
        return list(self.memory)


class FriendlySAM(Transcription):
    def direction(self, g: list[Tensor]) -> list[Tensor]:
        sigma, lmbda = self.options["sigma"], self.options["lmbda"]
        if not self.memory:
            self.memory = g
            return g
        d = [each - sigma * m for m, each in zip(self.memory, g, strict=True)]
        self.memory = [lmbda * m + (1 - lmbda) * each for m, each in zip(self.memory, g, strict=True)]
        return d


class Extragradient(Transcription):
    def direction(self, g: list[Tensor]) -> list[Tensor]:
        return [-each for each in g]


class GCSAM(Transcription):
    @staticmethod
    def centralized(grads: list[Tensor]) -> list[Tensor]:
        return [g - g.mean(dim=tuple(range(1, g.dim())), keepdim=True) if g.dim() > 1 else g for g in grads]

    def direction(self, g: list[Tensor]) -> list[Tensor]:
        return self.centralized(g)

    def descent(self, g: list[Tensor], g_p: list[Tensor]) -> list[Tensor]:
        return self.centralized(g_p)


class RSAM(Transcription):
    """``options["draw"]``: (t, the weights) -> Δ."""

    def step(self, batch: Any) -> None:
        self.t += 1
        start = weights(self.model)
        delta = self.options["draw"](self.t, start)
        there = self.gradients_at([w + each for w, each in zip(start, delta, strict=True)], batch)
        d = [torch.zeros_like(g) if gone else each + self.options["c"] * g for each, g, gone in zip(delta, there, self.absent, strict=True)]
        self.base_step(self.gradients_at(self.perturbed(start, d), batch))


class GSAM(Transcription):
    def descent(self, g: list[Tensor], g_p: list[Tensor]) -> list[Tensor]:
        along = dot(g, g_p) / dot(g_p, g_p)
        orthogonal = [each - along * there for each, there in zip(g, g_p, strict=True)]
        return [there - self.options["alpha"] * o for there, o in zip(g_p, orthogonal, strict=True)]


class CRSAM(Transcription):
    def step(self, batch: Any) -> None:
        self.t += 1
        start = weights(self.model)
        g = self.gradients(batch)
        there = self.perturbed(start, g)
        opposite = [2 * w - each for w, each in zip(start, there, strict=True)]
        plus, minus = self.gradients_at(there, batch), self.gradients_at(opposite, batch)
        gamma, beta = self.options["gamma"], self.options["beta"]
        self.base_step([p + gamma * (p + m - 2 * each) + beta * (p - m) for p, m, each in zip(plus, minus, g, strict=True)])


class WSAM(Transcription):
    """Coupled; with ``options["decoupled"]`` the base steps along g, and the sharpness beside it."""

    def descent(self, g: list[Tensor], g_p: list[Tensor]) -> list[Tensor]:
        k = self.options["kappa"] / (1 - self.options["kappa"])
        self.sharpness = [k * (there - each) for there, each in zip(g_p, g, strict=True)]
        return g if self.options["decoupled"] else [each + s for each, s in zip(g, self.sharpness, strict=True)]

    def base_step(self, grads: list[Tensor]) -> None:
        super().base_step(grads)
        if self.options["decoupled"]:
            self.move([-lr * s for lr, s in zip(self.of_groups("lr"), self.sharpness, strict=True)])


class LookSAM(Transcription):
    def step(self, batch: Any) -> None:
        self.t += 1
        start = weights(self.model)
        g = self.gradients(batch)
        norm = dot(g, g).sqrt()
        if (self.t - 1) % self.options["k"] == 0:
            g_s = self.gradients_at(self.perturbed(start, g), batch)
            g = [torch.zeros_like(each) if gone else each for each, gone in zip(g, self.absent, strict=True)]
            unit = [each / dot(g, g).sqrt() for each in g]
            self.memory = [s - dot(g_s, unit) * u for s, u in zip(g_s, unit, strict=True)]
            self.base_step(g_s)
        else:
            ratio = norm / dot(self.memory, self.memory).sqrt()
            self.base_step([each + self.options["alpha"] * ratio * v for each, v in zip(g, self.memory, strict=True)])


class MomentumSAM(Transcription):
    def step(self, batch: Any) -> None:
        self.t += 1
        start = weights(self.model)
        key = "momentum_buffer" if isinstance(self.base, torch.optim.SGD) else "exp_avg"
        if not self.base.state:
            self.base_step(self.gradients(batch))
        else:
            v = [self.base.state.get(param, {}).get(key, torch.zeros_like(param)) for param in self.model.parameters()]
            self.base_step(self.gradients_at(self.perturbed(start, [-each for each in v]), batch))


class S2SAM(Transcription):
    def step(self, batch: Any) -> None:
        self.t += 1
        start = weights(self.model)
        point = self.perturbed(start, self.memory) if self.memory else start
        g_p = self.gradients_at(point, batch)
        self.memory = g_p
        self.base_step(g_p)


class SAMSPS(Transcription):
    def step(self, batch: Any) -> None:
        self.t += 1
        momentum, decay = (self.base.param_groups[0][key] for key in ("momentum", "weight_decay"))
        start = weights(self.model)
        point = self.perturbed(start, self.gradients(batch))
        g_p = self.gradients_at(point, batch)
        moved = [there - w for there, w in zip(point, start, strict=True)]
        gap = max(self.loss - self.options["f_star"] - dot(g_p, moved).item(), 0.0)
        gammas = [(1 - momentum) * min(gap / dot(g_p, g_p).item(), bound) for bound in self.of_groups("lr")]
        before = self.memory or start
        self.memory = start
        decayed = [g + decay * w for g, w in zip(g_p, start, strict=True)]
        self.move([momentum * (w - old) - gamma * g for w, g, old, gamma in zip(start, decayed, before, gammas, strict=True)])


TRANSCRIPTIONS: dict[str, type[Transcription]] = {
    "SAM": Transcription,
    "VaSSO": VaSSO,
    "FriendlySAM": FriendlySAM,
    "Extragradient": Extragradient,
    "GCSAM": GCSAM,
    "RSAM": RSAM,
    "GSAM": GSAM,
    "CRSAM": CRSAM,
    "WSAM": WSAM,
    "LookSAM": LookSAM,
    "MomentumSAM": MomentumSAM,
    "S2SAM": S2SAM,
    "SAMSPS": SAMSPS,
}
