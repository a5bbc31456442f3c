"""Base optimizers with methods of their own, as other packages have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

__all__ = ["Annotated", "Chained", "Coded", "Moded"]


class Coded(Optimizer):
    """Momentum kept as bytes, which torch's ``load_state_dict`` would make floats of."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    state.update(codes=torch.full_like(param, 128, dtype=torch.uint8), scale=torch.tensor(0.0))
                assert state["codes"].dtype is torch.uint8
                momentum = 0.9 * (state["codes"].float() - 128) * state["scale"] + param.grad
                state["scale"] = momentum.abs().max() / 127 + 1e-12
                state["codes"].copy_((momentum / state["scale"]).round() + 128)
                param.sub_(momentum, alpha=group["lr"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        codes = {i: each["codes"] for i, each in state_dict["state"].items()}
        super().load_state_dict(state_dict)
        for i, param in enumerate(param for group in self.param_groups for param in group["params"]):
            if i in codes:
                self.state[param]["codes"] = codes[i].clone()


class Chained(Optimizer):
    """Matrices by one optimizer, the rest by another, and a ``state_dict`` of a format of its own."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        params = list(params)
        self.parts: list[Optimizer] = [
            SGD([param for param in params if param.dim() >= 2], lr=lr, momentum=0.9),
            AdamW([param for param in params if param.dim() < 2], lr=lr / 10),
        ]
        super().__init__(params, {})
        del self.param_groups, self.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return [group for part in self.parts for group in part.param_groups]

    @param_groups.setter
    def param_groups(self, groups: Any) -> None:
        pass

    @param_groups.deleter
    def param_groups(self) -> None:
        pass

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        return {param: state for part in self.parts for param, state in part.state.items()}

    @state.setter
    def state(self, state: Any) -> None:
        pass

    @state.deleter
    def state(self) -> None:
        pass

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "is_made"):
            self.parts[1].add_param_group(param_group)

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(saved)

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts, "defaults": self.defaults}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)


class Moded(SGD):
    """Two modes, and whatever else a base may override, noted as it is called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[str] = []
        super().__init__(*args, **kwargs)

    def train(self) -> None:
        self.calls.append("train")

    def eval(self) -> None:
        self.calls.append("eval")

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.calls.append(f"zero_grad {set_to_none}")
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.calls.append("add_param_group")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        self.calls.append("state_dict")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls.append("load_state_dict")
        super().load_state_dict(state_dict)


class Annotated(SGD):
    """torch's format, with keys of its own beside it."""

    extra = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "base_optimizer": "mine", "extra": self.extra}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert state_dict["base_optimizer"] == "mine"
        self.extra = state_dict["extra"]
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
