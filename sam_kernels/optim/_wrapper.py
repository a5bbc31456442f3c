"""An optimizer around another one, whose parameter groups and state it shares: groups, checkpoints, copies."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_kernels._validate import check_flag, check_number
from sam_kernels.optim import _capturable, _checkpoint
from sam_kernels.optim._descent import can_fuse
from sam_kernels.optim._group import check_params
from sam_kernels.optim._memory import ParamMemory
from sam_kernels.optim._passes import Passes
from sam_kernels.optim.descents import Descent
from sam_kernels.optim.directions import Direction
from sam_kernels.schedules._at_step import FIRST_STEP, check_schedule

__all__ = ["Wrapper"]


class Wrapper(Optimizer):
    """``param_groups`` and ``state`` are the base's own objects: what reads or changes the one finds the other."""

    _group_keys: tuple[str, ...] = ("rho", "lambd", "adaptive", "eta")  # of a parameter group, beside the base's own and the step t
    _more_defaults: Mapping[str, Any] = MappingProxyType({})  # a subclass's own values of parameter groups
    _kept: tuple[str, ...] = ("base_optimizer", "direction", "descent", "capturable", "_memory", "_has_stepped")  # in copies and pickles

    base_optimizer: Optimizer
    direction: Direction
    descent: Descent
    capturable: bool
    _memory: ParamMemory
    _has_stepped: bool  # since it was made or copied

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; the base optimizer gets the group too."""
        groups = self.base_optimizer.param_groups
        is_new = not any(param_group is group for group in groups)
        if is_new:
            self.base_optimizer.add_param_group(param_group)
        try:
            for key in self._group_keys:
                param_group.setdefault(key, self.defaults[key])
            param_group.setdefault("sam_step", max(int(group.get("sam_step", 0)) for group in groups))
            self._check_group_values(param_group)
            check_params(param_group, next(i for i, group in enumerate(groups) if group is param_group))
            self.direction.check_base(self.base_optimizer)
            self.descent.check_base(self.base_optimizer)
        except (TypeError, ValueError):
            if is_new:
                groups.pop()
            raise
        if self.capturable:
            _capturable.to_tensors(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state and the groups, with ρ, λ and the step t. Callables are not saved: give them to the constructor."""
        saved = self._memory.saved(super().state_dict(), self._all_params(), blanks=self._has_stepped)
        return _checkpoint.with_names(_checkpoint.without_callables(saved), self.direction.name, self.descent.name)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave, or the base optimizer's own checkpoint. float32 state of 16-bit parameters stays float32.

        Raises ValueError for the checkpoint of another direction or descent rule.
        """
        self._require_unperturbed("load_state_dict")
        state_dict = _checkpoint.without_names(state_dict, self.direction.name, self.descent.name)
        state_dict, memory = self._memory.taken_out(state_dict, self._all_params())
        super().load_state_dict(_checkpoint.with_group_values(state_dict, self.param_groups, (*self._group_keys, "sam_step")))
        if can_fuse(self.base_optimizer, self._passes.own_hooks):
            _checkpoint.keep_wide_state(self.state, self.param_groups, state_dict)
        self._memory.replace(memory)
        for group in self.param_groups:
            (_capturable.to_tensors if self.capturable else _capturable.to_numbers)(group)

    def __getstate__(self) -> dict[str, Any]:
        self._require_unperturbed("copying or pickling the optimizer")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in self._kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "base_optimizer" in state:  # unpickled or copied
            self._link()
        else:  # load_state_dict made new groups and a new state: the base shares those
            self.base_optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups})

    def _link(self) -> None:
        """Shares the base's groups and state, and listens to its ``step`` so that it is never made from perturbed weights."""
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state
        reference = weakref.ref(self)

        def restore_first(*_: Any) -> None:
            optimizer = reference()
            if optimizer is None:
                return
            rewriter = optimizer.direction if optimizer.direction.rewrites_descent else optimizer.descent
            if optimizer._passes.is_perturbed and (optimizer.direction.rewrites_descent or not optimizer.descent.is_plain):
                raise RuntimeError(
                    f"SAM: base_optimizer.step() after first_step would step along the gradients as they are, without the rule of "
                    f"{rewriter.name!r}; call second_step()"
                )
            optimizer._restore()

        self._passes = Passes(self.base_optimizer, {self.base_optimizer.register_step_pre_hook(restore_first).id}, self._memory)

    @torch.no_grad()
    def _restore(self) -> None:
        """Back to the weights of before the ascent, where there was one."""
        self._passes.restore()

    def _require_unperturbed(self, what: str) -> None:
        if self._passes.is_perturbed:
            raise RuntimeError(f"SAM: {what} between first_step and second_step, while the weights are perturbed")

    def _check_group_values(self, values: dict[str, Any]) -> None:
        first_step = FIRST_STEP if self.capturable else 1
        for name in ("rho", "lambd", "beta"):
            if name in values:
                check_schedule(name, values[name], first_step)
        if "adaptive" in values:
            check_flag("SAM", "adaptive", values["adaptive"])
        if "eta" in values:
            check_number("SAM", "eta", values["eta"], low=0.0)

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _devices(self) -> list[torch.device]:
        return list(dict.fromkeys(param.device for param in self._all_params()))
