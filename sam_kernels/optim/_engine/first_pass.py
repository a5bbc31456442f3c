"""``freeze_unperturbed``: in the first pass autograd computes the gradients that the ascent needs, and no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor

from sam_kernels._sharding import is_dtensor
from sam_kernels.optim._base.identity import IdentityCheck
from sam_kernels.optim._engine.lists import param_name
from sam_kernels.optim._engine.plan import StepPlan
from sam_kernels.optim._engine.warn import warn_user
from sam_kernels.optim._replicas.replicas import Replicas
from sam_kernels.optim._types import ParamGroup
from sam_kernels.schedules import Radius
from sam_kernels.schedules._at_step import is_ascending, resolved_at

__all__ = ["FirstPass", "warn_of_nothing_to_freeze"]

_NO_GRAPH = ("does not require grad", "have no graph")  # in torch's errors, and in RWSAM's
_REACHES_NOTHING = (
    "SAM: freeze_unperturbed=True: the loss of the first pass does not depend on a trainable parameter of a group with rho > 0, so there "
    "is nothing to ascend along; give rho > 0 to parameters that the model uses, or leave freeze_unperturbed out. (A closure that calls "
    "torch.autograd.grad asks for gradients of frozen parameters; call backward() on the loss.)"
)
_HALVES = (
    "SAM.first_step: freeze_unperturbed=True needs the first forward and backward pass under `with optimizer.ascent():`, with the rho that "
    "the groups have now"
)


class FirstPass:
    """Around the first pass, parameters of groups that do not participate in the step's ascent require no gradient and have none.

    Afterwards they require one again, also after an exception of any kind, which puts their ``.grad`` of before back too.

    Args:
        is_on: the optimizer's ``freeze_unperturbed``; where it is False every method does nothing.
        replicas: reduce the gradients of the first pass themselves: DistributedDataParallel would wait for those of all parameters.
        identity: has the shards of the optimizer's parameters.
    """

    def __init__(self, is_on: bool, replicas: Replicas, identity: IdentityCheck) -> None:
        self._is_on, self._replicas, self._identity = is_on, replicas, identity
        self._may_freeze_shards = False
        self._halves: list[bool] | None = None  # which groups participated in the pass under ascent()
        self._without: list[tuple[Tensor, str]] = []  # participating parameters that had no gradient, with their names
        self._has_warned = False

    def around(self, plan: StepPlan) -> AbstractContextManager[None]:
        """The context of the first pass. Raises RuntimeError where its loss reaches no parameter that participates."""
        return self._frozen(plan) if self._is_on else nullcontext()

    @contextmanager
    def _frozen(self, plan: StepPlan) -> Iterator[None]:
        resting = _trainable(plan, participates=False)
        if not resting or not plan.ascends:
            yield
            return
        moving = _trainable(plan, participates=True)
        grads = [param.grad for param, _ in resting]
        try:
            for param, _ in resting:
                param.grad = None
                # At its first forward pass fully_shard chooses dtypes by the parameters that require a gradient.
                if self._may_freeze_shards or not is_dtensor(param):
                    param.requires_grad_(False)
            self._identity.shards.reshard()
            with self._replicas.averaging_by_hand([param for param, _ in moving]):
                yield
        except BaseException as error:
            _put_grads(resting, grads)
            if isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_GRAPH):
                raise RuntimeError(_REACHES_NOTHING) from error
            raise
        finally:
            for param, _ in resting:
                param.requires_grad_(True)
            self._identity.shards.reshard()
        self._may_freeze_shards = True
        _put_grads(resting, [None] * len(resting))  # a closure may assign gradients by itself
        self._without += [each for each in moving if each[0].grad is None]

    # --- the two-step API ---

    @contextmanager
    def of_halves(self, plan: StepPlan) -> Iterator[None]:
        """As :meth:`around`, for a first pass that the caller makes before ``first_step``."""
        self._halves = None
        with self.around(plan):
            yield
        self._halves = _participation(plan) if self._is_on else None

    def check_halves(self, plan: StepPlan) -> None:
        """In ``first_step``. Raises RuntimeError where the caller's first pass froze other parameters than ``plan`` does."""
        if self._halves is None:
            is_wrong = self._is_on and plan.ascends and len(_trainable(plan, participates=False)) > 0
        else:
            is_wrong = self._halves != _participation(plan)
        if is_wrong:
            raise RuntimeError(_HALVES)

    def forget(self) -> None:
        """The pass under :meth:`of_halves` is used up, or was given up."""
        self._halves = None

    # --- after the second pass ---

    def compare(self) -> None:
        """Warns, once, of a participating parameter that has a gradient after the second pass and had none after the first."""
        without, self._without = self._without, []
        names = [name for param, name in without if param.grad is not None]
        if not names or self._has_warned:
            return
        self._has_warned = True
        warn_user(
            f"SAM: freeze_unperturbed=True: parameter {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} had a gradient in the "
            "second pass and none in the first, so the ascent left it out. Reentrant activation checkpointing loses the gradients of a "
            "block none of whose inputs requires one: pass use_reentrant=False. A model that uses other parameters in the second pass is "
            "no fault"
        )


def warn_of_nothing_to_freeze(groups: Sequence[ParamGroup], rho_key: str) -> None:
    """Warns where no step of these groups can have a parameter that participates and one that does not."""
    used = [group[rho_key] for group in groups if any(param.requires_grad for param in group["params"])]
    if len(used) > 1 and not all(map(_always_ascends, used)):
        return
    warn_user(
        "SAM: freeze_unperturbed=True has nothing to freeze: no parameter group has rho = 0 beside one with rho > 0. Give the others "
        "rho=0 in a group of their own, as sam_kernels.norm_layers(model), last_layers(model, k) and param_groups(model, rho_of=...) do"
    )


def _always_ascends(rho: Any) -> bool:
    """Whether it is known to, whatever the step."""
    return not (callable(rho) or isinstance(rho, Radius)) and is_ascending(resolved_at(rho, 1))


def _trainable(plan: StepPlan, *, participates: bool) -> list[tuple[Tensor, str]]:
    """The trainable parameters of groups that participate, or do not, with their names."""
    return [
        (param, param_name(each.group, i, j))
        for i, each in enumerate(plan.groups)
        if each.participates is participates
        for j, param in enumerate(each.group["params"])
        if param.requires_grad
    ]


def _participation(plan: StepPlan) -> list[bool]:
    return [each.participates for each in plan.groups]


def _put_grads(params: Sequence[tuple[Tensor, str]], grads: Sequence[Tensor | None]) -> None:
    for (param, _), grad in zip(params, grads, strict=True):
        param.grad = grad
