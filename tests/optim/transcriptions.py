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
    """SAM itself; every method that a member changes is one of its formula's lines."""

    def __init__(
        self,
        model: nn.Module,
        base: torch.optim.Optimizer,
        loss_of: LossOf,
        *,
        rho: float,
        lambd: float = 1.0,
        adaptive: bool = False,
        eta: float = 0.0,
        **options: Any,
    ) -> None:
        self.model, self.base, self.loss_of, self.options = model, base, loss_of, options
        self.rho, self.lambd, self.adaptive, self.eta = rho, lambd, adaptive, eta
        self.t = 0
        self.memory: list[Tensor] = []

    def gradients(self, batch: Any) -> list[Tensor]:
        self.model.zero_grad()
        loss = self.loss_of(self.model, batch)
        loss.backward()
        self.loss = loss.item()
        return [param.grad.clone() for param in self.model.parameters()]  # type: ignore[union-attr]

    def gradients_at(self, point: list[Tensor], batch: Any) -> list[Tensor]:
        start = weights(self.model)
        set_weights(self.model, point)
        found = self.gradients(batch)
        set_weights(self.model, start)
        return found

    def perturbed(self, start: list[Tensor], d: list[Tensor]) -> list[Tensor]:
        """x + ρ (1 - λ + λ / (‖T d‖ + ε)) T² d"""
        scaling = [param.abs() + self.eta if self.adaptive else torch.ones_like(param) for param in start]
        norm = dot([t * each for t, each in zip(scaling, d, strict=True)], [t * each for t, each in zip(scaling, d, strict=True)]).sqrt()
        s = self.rho * (1 - self.lambd + self.lambd / (norm + EPS))
        return [w + s * t * t * each for w, t, each in zip(start, scaling, d, strict=True)]

    def base_step(self, grads: list[Tensor]) -> None:
        for param, grad in zip(self.model.parameters(), grads, strict=True):
            param.grad = grad.clone()
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
        self.memory = g if self.t == 1 else [(1 - theta) * m + theta * each for m, each in zip(self.memory, g, strict=True)]
        return self.memory


class FriendlySAM(Transcription):
    def direction(self, g: list[Tensor]) -> list[Tensor]:
        sigma, lmbda = self.options["sigma"], self.options["lmbda"]
        if self.t == 1:
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
        d = [each + self.options["c"] * g for each, g in zip(delta, there, strict=True)]
        self.base_step(self.gradients_at(self.perturbed(start, d), batch))


class GSAM(Transcription):
    def descent(self, g: list[Tensor], g_p: list[Tensor]) -> list[Tensor]:
        along = dot(g, g_p) / dot(g_p, g_p)
        orthogonal = [each - along * there for each, there in zip(g, g_p, strict=True)]
        return [there - self.options["alpha"] * o for there, o in zip(g_p, orthogonal, strict=True)]


class WSAM(Transcription):
    """Coupled; with ``options["decoupled"]`` the base steps along g, and the sharpness beside it."""

    def descent(self, g: list[Tensor], g_p: list[Tensor]) -> list[Tensor]:
        k = self.options["kappa"] / (1 - self.options["kappa"])
        self.sharpness = [k * (there - each) for there, each in zip(g_p, g, strict=True)]
        return g if self.options["decoupled"] else [each + s for each, s in zip(g, self.sharpness, strict=True)]

    def base_step(self, grads: list[Tensor]) -> None:
        super().base_step(grads)
        if self.options["decoupled"]:
            lr = self.base.param_groups[0]["lr"]
            sign = -1 if self.base.param_groups[0].get("maximize") else 1
            set_weights(self.model, [w - sign * lr * s for w, s in zip(weights(self.model), self.sharpness, strict=True)])


class LookSAM(Transcription):
    def step(self, batch: Any) -> None:
        self.t += 1
        start = weights(self.model)
        g = self.gradients(batch)
        norm = dot(g, g).sqrt()
        if (self.t - 1) % self.options["k"] == 0:
            g_s = self.gradients_at(self.perturbed(start, g), batch)
            unit = [each / norm for each in g]
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
        if self.t == 1:
            self.base_step(self.gradients(batch))
        else:
            v = [self.base.state[param][key] for param in self.model.parameters()]
            self.base_step(self.gradients_at(self.perturbed(start, [-each for each in v]), batch))


class SAMSPS(Transcription):
    def step(self, batch: Any) -> None:
        self.t += 1
        group = self.base.param_groups[0]
        start = weights(self.model)
        point = self.perturbed(start, self.gradients(batch))
        g_p = self.gradients_at(point, batch)
        moved = [there - w for there, w in zip(point, start, strict=True)]
        gap = max(self.loss - self.options["f_star"] - dot(g_p, moved).item(), 0.0)
        gamma = min(gap / dot(g_p, g_p).item(), self.options["gamma_b"]) * (1 - group["momentum"])
        before = self.memory or start
        self.memory = start
        decayed = [g + group["weight_decay"] * w for g, w in zip(g_p, start, strict=True)]
        set_weights(self.model, [w - gamma * g + group["momentum"] * (w - old) for w, g, old in zip(start, decayed, before, strict=True)])


TRANSCRIPTIONS: dict[str, type[Transcription]] = {
    "SAM": Transcription,
    "VaSSO": VaSSO,
    "FriendlySAM": FriendlySAM,
    "Extragradient": Extragradient,
    "GCSAM": GCSAM,
    "RSAM": RSAM,
    "GSAM": GSAM,
    "WSAM": WSAM,
    "LookSAM": LookSAM,
    "MomentumSAM": MomentumSAM,
    "SAMSPS": SAMSPS,
}
