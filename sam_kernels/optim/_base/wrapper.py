"""An optimizer around another one, whose parameter groups and state it shares: groups, checkpoints, copies."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from operator import is_
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.optim import Optimizer

from sam_kernels.optim._base import checkpoint
from sam_kernels.optim._base.distributed_checkpoint import check_given, check_is_whole, completed, is_torch_loading
from sam_kernels.optim._base.identity import IdentityCheck
from sam_kernels.optim._base.imitations import is_imitation, send_inside
from sam_kernels.optim._base.names import Names, beta_key
from sam_kernels.optim._base.options import check_group_names, check_keywords, group_keys
from sam_kernels.optim._engine import capturable
from sam_kernels.optim._engine.lists import same_tensors
from sam_kernels.optim._engine.memory import ParamMemory
from sam_kernels.optim._engine.passes import Passes
from sam_kernels.optim._engine.plan import GROUP_OPTIONS, check_options
from sam_kernels.optim._engine.rounding import NO_ROUNDING, Rounding
from sam_kernels.optim._engine.update import can_fuse
from sam_kernels.optim._part import Part
from sam_kernels.optim._replicas.replicas import is_blank
from sam_kernels.optim._types import ParamGroup, StateDict
from sam_kernels.optim.descents import Descent
from sam_kernels.optim.directions import Direction

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Wrapper"]

# What trainers call where an optimizer has it: modes (ScheduleFree), the end of an epoch (timm's Lookahead).
_OF_TRAINERS = ("train", "eval", "sync_lookahead")

_ZERO_GRAD = Optimizer.zero_grad  # torch's own, whatever somebody puts in its place later


class Wrapper(Optimizer):
    """``param_groups`` and ``state`` are the base's own: what is read, written, loaded or added on either optimizer is so on the other.

    SAM's options lie in the groups under the keys of ``_keys``: their own names, or ``sam_<name>`` where the base has an option so named.
    """

    _group_keys: tuple[str, ...] = GROUP_OPTIONS  # of a parameter group, beside the base's own and the step t
    _shared_keywords: tuple[str, ...] = ("rho", "capturable")  # of the constructor: never the base's, or of one meaning for both
    _more_defaults: Mapping[str, Any] = MappingProxyType({})  # a subclass's own values of parameter groups
    _kept: tuple[str, ...] = (
        "base_optimizer",
        "direction",
        "descent",
        "capturable",
        "process_group",
        "rounding",
        "_memory",
        "_has_stepped",
        "_keys",
        "_name_keys",
    )  # in copies

    _weighted: str = ""  # name of the optimizer in checkpoints, where it weights samples
    _given: frozenset[str] = frozenset()  # keywords of the constructor
    _is_loading: bool = False  # a checkpoint that has been checked

    base_optimizer: Optimizer
    direction: Direction
    descent: Descent
    capturable: bool
    process_group: ProcessGroup | None
    rounding: Rounding = NO_ROUNDING  # copies of earlier versions have none
    _memory: ParamMemory
    _has_stepped: bool  # since it was made or copied
    _keys: dict[str, str]
    _name_keys: dict[str, str]  # those under which checkpoints name the direction and the descent rule
    _groups: list[ParamGroup]  # adopted, in a list of SAM's own
    _count: int  # of steps, as the groups of before had it
    _identity: IdentityCheck
    _passes: Passes

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if is_imitation(cls):
            send_inside(cls)

    def __new__(cls, *args: Any, **kwargs: Any) -> Wrapper:
        made = super().__new__(cls)
        if kwargs:  # as they were given, whatever a subclass makes of them
            base = kwargs.get("base_optimizer", args[1] if len(args) > 1 else None)
            check_keywords(cls, base, kwargs, cls._shared_keywords)
            made._given = frozenset(kwargs)
        return made

    # --- one optimizer from both sides ---

    @property
    def param_groups(self) -> list[ParamGroup]:
        """The base's, each with SAM's options."""
        groups = self.base_optimizer.param_groups
        if len(groups) != len(self._groups) or not all(map(is_, groups, self._groups)):
            self._adopt()
        return groups

    @param_groups.setter
    def param_groups(self, groups: list[ParamGroup]) -> None:
        if "_groups" in self.__dict__:  # not while torch's constructor makes an empty list
            self.base_optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The base's."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        if "_groups" in self.__dict__:
            self.base_optimizer.state = state

    def __getattr__(self, name: str) -> Any:
        base = self.__dict__.get("base_optimizer")
        if name in _OF_TRAINERS and base is not None and hasattr(base, name):
            return getattr(base, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The base optimizer's."""
        base = self.base_optimizer
        if not set_to_none or type(base).zero_grad is not _ZERO_GRAD or "zero_grad" in base.__dict__ or is_dynamo_compiling():
            base.zero_grad(set_to_none=set_to_none)
            return
        for group in base.param_groups:  # torch's, without a record for its profiler, which takes longer than a small model's loop
            for param in group["params"]:
                param.grad = None

    def add_param_group(self, param_group: ParamGroup) -> None:
        """As ``torch.optim.Optimizer.add_param_group``; the base optimizer gets the group too."""
        groups = self.base_optimizer.param_groups
        if any(param_group is group for group in groups):
            return  # torch's constructor: they have been adopted
        count = len(groups)
        if isinstance(param_group, dict):
            check_group_names(param_group, param_group, count, self._keys, self.base_optimizer)
        self.base_optimizer.add_param_group(param_group)
        try:
            self._adopt()
            self.direction.check_base(self.base_optimizer)
            self.descent.check_base(self.base_optimizer)
        except (TypeError, ValueError):
            del self.base_optimizer.param_groups[count:]
            self._adopt()
            raise

    def _adopt(self) -> None:
        """Gives groups that have come since the last time SAM's options: those of the group in whose place they are, or the defaults.

        Raises TypeError or ValueError for a group that SAM cannot take.
        """
        groups = self.base_optimizer.param_groups
        before = self._groups
        if not same_tensors(before, groups):
            t = self._keys["sam_step"]
            count = self._count = max((int(group[t]) for group in before if t in group), default=self._count)
            for i, group in enumerate(groups):
                if any(group is each for each in before):
                    continue
                self._names.remove(group, is_ours=False)
                follows = before[i] if len(before) == len(groups) else self.defaults
                for name in self._group_keys:
                    key = self._keys[name]
                    if group.get(key) is None:  # a checkpoint's word for a function
                        group[key] = follows.get(key, self.defaults[key])
                group.setdefault(t, count)
                check_options(group, self._keys, capturable=self.capturable)
                if self.capturable:
                    capturable.to_tensors(group, self._keys)
            self._identity(groups)
            self._identity.shards.check_capturable(self.capturable)
            self.direction.check_shards(groups)
            self._memory.adopt(self.state)
            if self._passes.masters is not None:
                self._passes.masters.widen_state(param for group in groups for param in group["params"])
        self._groups = list(groups)

    # --- checkpoints ---

    def state_dict(self) -> StateDict:
        """The base optimizer's state and the groups, with ρ, λ and the step t. Callables are not saved: give them to the constructor.

        Made by the base's own ``state_dict``. Where that has a format of its own, it is found whole under ``"sam_base_optimizer"``.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        groups = self.param_groups
        lacking, names = frozenset[tuple[int, str]](), self._names
        if is_torch_loading():
            with self._identity.shards.all_or_none(self._devices()):
                lacking, names = check_given(names, self.base_optimizer, self._memory.all_names, self._keys["sam_step"])
        state_dict: StateDict = checkpoint.with_base(self.base_optimizer.state_dict(), groups, self._keys)
        blanks = self._has_stepped or len(self.state) > 0  # a base may make its state when it is constructed
        state_dict = self._memory.saved(state_dict, self._all_params(), blanks=blanks, without=lacking)
        state_dict = names.added(checkpoint.with_plain_values(state_dict))
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Loads what :meth:`state_dict` gave, or the base optimizer's own checkpoint, by the base's own ``load_state_dict``. float32 state
        of 16-bit parameters stays float32. With DTensors or ``process_group=`` every rank calls it, and all of them load or none.

        Raises ValueError, before anything changes and on every rank, for the checkpoint of another direction, descent rule or base
        optimizer, and for one whose tensors have other shapes than the parameters.
        """
        self._require_unperturbed("load_state_dict")
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        base_dict, memory = checkpoint.base_part(state_dict, self._keys["sam_step"]), None
        if base_dict is not state_dict:
            state_dict, memory = self._checked_checkpoint(state_dict)
        groups = self.param_groups
        self._is_loading = True
        try:
            self.base_optimizer.load_state_dict(self._names.added(state_dict) if base_dict is None else base_dict)
        finally:
            self._is_loading = False
        checkpoint.put_radii_back(self.base_optimizer.param_groups, groups)
        if base_dict is not None and memory is not None:
            checkpoint.put_group_values(state_dict, self.base_optimizer.param_groups, self._keys)
        self._adopt()
        if base_dict is None and (self._memory.has_masters or can_fuse(self.base_optimizer, self._passes.own_hooks)):
            checkpoint.keep_wide_state(self.state, self.param_groups, state_dict, of_masters=self._memory.has_masters)
        if memory is not None:
            self._memory.replace(memory)
        for group in self.param_groups:
            (capturable.to_tensors if self.capturable else capturable.to_numbers)(group, self._keys)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _checked_checkpoint(self, state_dict: StateDict) -> tuple[StateDict, ParamMemory]:
        """The base's part of a checkpoint, with SAM's options in the groups, and what is kept beside. Nothing has changed yet.

        Raises ValueError or TypeError for one that does not fit.
        """
        check_is_whole(state_dict)
        shards = self._identity.shards
        with shards.all_or_none(self._devices()):
            state_dict = completed(state_dict, self._names, self._memory.all_names, is_part=self._is_part)
            state_dict = self._names.removed(state_dict, self._keys["sam_step"])
            if shards:  # torch would say so on the rank that sees it
                checkpoint.check_sizes(state_dict, self.param_groups)
            checkpoint.check_tensors(state_dict, self.base_optimizer, self._memory.all_names)
            has_stepped = any(group.get(self._keys["sam_step"], 0) > 0 for group in state_dict["param_groups"])
            self._memory.warn_of_masters(state_dict, self._all_params(), has_stepped=has_stepped)
            state_dict, memory = self._memory.taken_out(state_dict, self._all_params())
            if len(state_dict["param_groups"]) == len(self.param_groups):  # otherwise torch says what is wrong
                checkpoint.warn_of_functions(state_dict, self.param_groups, self._keys)
                state_dict = checkpoint.with_group_values(state_dict, self.param_groups, self._keys)
                for group in state_dict["param_groups"]:
                    check_options(group, self._keys, capturable=self.capturable)
        return state_dict, memory

    @property
    def _is_part(self) -> bool:
        """Whether ranks of ``process_group=`` have the rest of the model."""
        return self.process_group is not None

    # --- copies ---

    def __getstate__(self) -> StateDict:
        self._require_unperturbed("copying or pickling the optimizer")
        return {"defaults": self.defaults, **{name: self.__dict__[name] for name in self._kept}}

    def __setstate__(self, state: StateDict) -> None:
        state = dict(state)
        shared = {name: state.pop(name) for name in ("state", "param_groups") if name in state}
        if "eps" in state:  # as it was called
            state["norm_eps"] = state.pop("eps")
        super().__setstate__(state)
        if "base_optimizer" in state:  # unpickled or copied
            self.__dict__.setdefault("_keys", {name: name for name in (*self._group_keys, "sam_step")})
            self.__dict__.setdefault("_name_keys", {name: name for name in ("direction", "descent")})
            if "scale" not in self._keys or self._keys["scale"] not in self.defaults:  # pickled by an earlier version
                self._keys = {**self._keys, **group_keys(("scale",), self.base_optimizer, [])}
                self.defaults[self._keys["scale"]] = 1.0
            self._link()
        else:
            for name, value in shared.items():
                setattr(self, name, value)

    def _link(self) -> None:
        """Adopts the base's groups, and listens to its ``step`` so that it is never made from perturbed weights."""
        self._groups = []
        self._count = 0
        self._loads: tuple[StateDict, ParamMemory] | None = None  # a checkpoint that the base is loading
        self._identity = IdentityCheck(self.__dict__.get("process_group"))
        reference = weakref.ref(self)

        def weakly(method: Callable[..., Any]) -> Callable[..., Any]:
            def hook(_: Any, *args: Any) -> Any:
                optimizer = reference()
                return None if optimizer is None else method(optimizer, *args)

            return hook

        base, kind = self.base_optimizer, type(self)
        handles = [base.register_step_pre_hook(weakly(kind._before_base_step))]
        own_hooks = {handles[0].id}
        if hasattr(base, "_optimizer_load_state_dict_pre_hooks"):  # not where a base leaves torch's constructor out
            handles.append(base.register_load_state_dict_pre_hook(weakly(kind._before_base_loads)))
            handles.append(base.register_load_state_dict_post_hook(weakly(kind._after_base_loaded)))
        for handle in handles:  # a base outlives its wrapper
            weakref.finalize(self, handle.remove).atexit = False
        self._passes = Passes(base, own_hooks, self._memory, self._identity, self.rounding)
        self._adopt()

    def _before_base_step(self, *_: Any) -> None:
        if self._passes.masters is not None and not is_blank(self.param_groups):
            self._passes.masters.check_base_step()
        if self._passes.is_perturbed and self._rewriter is not None:
            raise RuntimeError(
                f"SAM: base_optimizer.step() after first_step would step along the gradients as they are, without the rule of "
                f"{self._rewriter.name!r}; call second_step()"
            )
        if self._passes.is_perturbed and self.direction.keeps_last_grads:
            raise RuntimeError(
                f"SAM: base_optimizer.step() after first_step would not keep the gradients, along which direction {self.direction.name!r} "
                "ascends in the next step; call second_step()"
            )
        self._restore()

    def _before_base_loads(self, state_dict: StateDict) -> StateDict | None:
        """What the base loads: with what is kept here, which :meth:`_after_base_loaded` takes out."""
        self._loads = None
        if self._is_loading or "param_groups" not in state_dict:
            return None
        self._loads = self._checked_checkpoint(state_dict)
        return completed(state_dict, self._names, self._memory.all_names, is_part=self._is_part)

    def _after_base_loaded(self) -> None:
        loaded, self._loads = self._loads, None
        self._memory.strip(self.state)
        self._memory.replace(self._memory.emptied() if loaded is None else loaded[1])
        self._adopt()
        if loaded is not None and self._memory.has_masters:
            checkpoint.keep_wide_state(self.state, self.param_groups, loaded[0], of_masters=True)

    def _restore(self) -> None:
        """Back to the weights of before the ascent, where there was one."""
        raise NotImplementedError

    @property
    def _rewriter(self) -> Part | None:
        """The part that writes the gradients of the second pass, None where they are stepped along as they are."""
        return self.direction if self.direction.rewrites else self.descent if self.descent.rewrites else None

    @property
    def _names(self) -> Names:
        base = self.base_optimizer
        beta = self._keys["beta"] if self._weighted else beta_key(base, base.param_groups)
        return Names(
            self.direction.name, self.descent.name, type(base).__name__, self._name_keys, self._weighted, beta, self._memory.has_masters
        )

    def _require_unperturbed(self, what: str) -> None:
        if self._passes.is_perturbed:
            raise RuntimeError(f"SAM: {what} between first_step and second_step, while the weights are perturbed")

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _devices(self) -> list[torch.device]:
        return list(dict.fromkeys(param.device for param in self._all_params()))
