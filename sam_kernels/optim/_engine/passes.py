"""The two passes over the parameter groups: ascend, descend, and the way back when something goes wrong in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_kernels import functional
from sam_kernels._tensor_list import TensorList
from sam_kernels._validate import describe
from sam_kernels.optim._base.identity import IdentityCheck
from sam_kernels.optim._engine.capturable import is_recording, not_recordable
from sam_kernels.optim._engine.in_flight import InFlight
from sam_kernels.optim._engine.lists import Backups, Current, GroupLists, check_grads, same_tensors, with_grads
from sam_kernels.optim._engine.memory import ParamMemory
from sam_kernels.optim._engine.plan import StepPlan
from sam_kernels.optim._engine.update import can_fuse, fused_step, plain_step, with_options
from sam_kernels.optim._engine.weight_watch import NOTHING_WATCHED, WeightWatch

if TYPE_CHECKING:
    from sam_kernels.optim._engine.ascent_step import AscentStep
    from sam_kernels.optim.directions import Direction

__all__ = ["Passes"]

_FOLD_EVERY = 1 << 20  # steps after which the float32 count of skipped steps is added to the whole one


class Passes:
    """What a step under way knows, and what is kept between steps: backups and lists.

    ``found_inf`` () float32 is set once a gradient of either pass was not finite; ``skipped`` () float32 counts such steps before the
    last. Both live on the device. ``memory`` is what the direction and the descent rule keep; ``begun`` are the parameters for which a
    moving average has begun in this step. ``plan`` is that of the step under way, None in a plain step of the base.
    """

    def __init__(self, base: Optimizer, own_hooks: set[int], memory: ParamMemory, check: IdentityCheck) -> None:
        self.base = base
        self.own_hooks = own_hooks  # of the base's step hooks, those that do not count as somebody listening
        self.memory = memory
        self.plan: StepPlan | None = None
        self.begun: set[Tensor] = set()
        self.backups = Backups()
        self.found_inf = torch.zeros((), dtype=torch.float32, device="cpu")
        self.skipped = torch.zeros((), dtype=torch.float32, device="cpu")
        self._skipped_before = torch.zeros((), dtype=torch.int64, device="cpu")  # float32 counts to 2^24
        self._begins_to_fold = _FOLD_EVERY
        self._check = check
        self.is_perturbed = False
        self.has_ascended = False  # in the last ascent it was the turn of a group at least
        self._lists: dict[int, GroupLists] = {}
        self._perturbed: dict[int, GroupLists] = {}
        self._joint: tuple[list[GroupLists], GroupLists] | None = None  # several groups' lists, and those of all their parameters
        self._in_flight: InFlight | None = None
        self._saved: dict[int, GroupLists] = {}  # by group: what has been saved in this step
        self._trainable: dict[int, GroupLists] = {}  # where not every trainable parameter has a gradient
        self._begins = False  # found_inf is still the last step's
        self._watch = NOTHING_WATCHED  # the two-step API's, between the passes
        self._told_norm: Tensor | None = None  # () the last norm that has told found_inf of itself

    def begin(self, device: torch.device, plan: StepPlan | None) -> None:
        """A new step: nothing is known to be wrong with it."""
        if self.found_inf.device != device:
            if is_recording(device):
                raise not_recordable("no step was made before; make an eager one first, as torch asks for")
            self.found_inf, self.skipped, self._skipped_before = (
                each.to(device) for each in (self.found_inf, self.skipped, self._skipped_before)
            )
        self._begins_to_fold -= 1
        if self._begins_to_fold <= 0 and not is_recording(device):
            self._begins_to_fold = _FOLD_EVERY
            self._skipped_before += self.skipped.to(torch.int64)
            self.skipped.zero_()
        self._begins = True
        self.plan = plan
        self._saved = {}
        self.begun = set()

    @property
    def skipped_steps(self) -> int:
        """Waits for the device."""
        return int((self._skipped_before + self.skipped.to(torch.int64) + self.found_inf.to(torch.int64)).item())

    def forget_last_step(self) -> None:
        """``found_inf`` is this step's from now on; where no norm has seen to that in passing."""
        if self._begins:
            self.skipped.add_(self.found_inf)
            self.found_inf.zero_()
            self._begins = False

    def release(self) -> None:
        """Frees the backups."""
        self.backups = Backups()
        self._lists = {}
        self._trainable = {}
        self._saved = {}
        self._joint = None

    def ascend(
        self, plan: StepPlan, direction: Direction, step: AscentStep, *, eps: float, grad_scale: Tensor | None, loss: Any = None
    ) -> list[Current]:
        """Saves and perturbs the parameters of the groups that participate, for SAM along their gradients as they are: 4 N s bytes.

        ``loss``: what the closure returned, for radii that follow it. Returns what the direction was made from, by group.
        Later in a step (m-SAM's second micro-batch) they are the same weights again, which are not saved a second time: 3 N s.
        """
        currents = direction.currents(step)
        participating = [current for current in currents if plan.groups[current.index].participates]
        norm = _checked_norm(direction, direction.norm(step, participating, grad_scale))
        self.forget_last_step()  # where no norm has seen to that
        if norm is not self._told_norm:
            self.found_inf.logical_or_(~norm.isfinite().to(self.found_inf.device))
        known_scale = grad_scale if direction.is_scaled else None
        radii = [plan.groups[each.index].radius(norm, known_scale, loss) for each in participating]
        self.is_perturbed = True
        self.has_ascended = plan.ascends
        for current, rho in zip(participating, radii, strict=True):
            group = plan.groups[current.index]
            is_downhill = (direction.sign < 0) is not (group.maximize and not direction.knows_maximize)
            options: dict[str, Any] = {
                "grads": current.grads,
                "norm": norm,
                "rho": -rho if is_downhill else rho,
                "lambd": group.lambd,
                "adaptive": group.adaptive,
                "eta": group.eta,
                "eps": eps,
                "grad_scale": grad_scale,
                "found_inf": self.found_inf,
                **direction.perturb_options(step, current),
            }
            perturb_: Callable[..., None] = partial(functional.perturb_, **options)
            # Other lists than those saved: other parameters have a gradient now, or some have moved. Saving all of them is right as well.
            is_saved = self._saved.get(current.index) is current.lists
            self._perturbed[current.index] = current.lists
            self._in_flight = None if is_saved else InFlight(current.lists, perturb_)
            perturb_(current.lists.params, old_params=current.lists.old_params, from_old=is_saved)
            self._in_flight = None
            self._saved[current.index] = current.lists
        torch.clear_autocast_cache()  # where autocast is around the whole step: casts of what the weights were
        return currents

    def perturb_randomly(self, trainable: dict[int, GroupLists], seeds: Sequence[int], *, scale: float, distribution: str) -> None:
        """Adds scale z to what :meth:`trainable` gave, z from a seed for each group: 3 N s bytes.

        They start from where they were before this or any other perturbation of the step: a second one needs no restore between, and
        those that are saved already are not saved again (2 N s).
        """
        self.is_perturbed = True
        for i, lists in trainable.items():
            perturb_: Callable[..., None] = partial(functional.random_perturb_, seed=seeds[i], scale=scale, distribution=distribution)
            is_saved = self._saved.get(i) is lists
            self._perturbed[i] = lists
            self._in_flight = None if is_saved else InFlight(lists, perturb_)
            perturb_(lists.params, old_params=lists.old_params, from_old=is_saved)
            self._in_flight = None
            self._saved[i] = lists
        torch.clear_autocast_cache()

    def trainable(self, plan: StepPlan) -> dict[int, GroupLists]:
        """By the index of a group that participates, its parameters that require a gradient, whether they have one or not."""
        found = {}
        for i, group in enumerate(plan.groups):
            params = [param for param in group.group["params"] if param.requires_grad]
            if params and group.participates:
                found[i] = self.lists_of(i, params)
        return found

    def lists_of(self, i: int, params: list[Tensor]) -> GroupLists:
        """Lists of parameters of group i, whether they have a gradient or not."""
        # Those of the last ascent first: what is saved for them need not be saved again.
        known = (self._lists.get(i), self._trainable.get(i))
        lists = next((each for each in known if each is not None and each.is_current(params)), None)
        if lists is None:
            lists = self._trainable[i] = GroupLists(params, self.backups)
            self._lists.setdefault(i, lists)
        return lists

    def origins(self, current: Current) -> list[Tensor] | None:
        """Where the parameters of ``current`` were before the ascent, one for each; None where none of them has moved."""
        perturbed = self._perturbed.get(current.index)
        if perturbed is None:
            return None
        if perturbed is current.lists:
            return perturbed.old_params
        moved = set(perturbed.params)
        saved = self.backups.of(current.lists.params)
        return [old if param in moved else param for param, old in zip(current.lists.params, saved, strict=True)]

    def restore_others(self, currents: list[Current]) -> None:
        """Before an ascent from perturbed weights: those that it does not save by itself are where they were."""
        if [(current.index, current.lists) for current in currents] != list(self._perturbed.items()):
            self.restore()

    def scratch(self, i: int, lists: GroupLists) -> list[Tensor]:
        """The memory of a group's backups, until a perturbation saves to it. (None may be under way.)"""
        self._saved.pop(i, None)
        return lists.old_params

    def descend(
        self,
        groups: list[dict[str, Any]],
        *,
        max_norm: float | None,
        check_finite: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        known_norm: Tensor | None = None,
        agree: Callable[[Tensor], None] | None = None,
        options: Mapping[int, dict[str, Any]] = MappingProxyType({}),
        is_plain: bool = True,
        scaler_has_checked: bool = False,
    ) -> bool:
        """Restores the parameters and makes the base's step along the gradients as they are, unless something was not finite. Returns
        whether it has divided them by ``grad_scale``.

        ``known_norm``: () their norm, which has told ``found_inf`` already. ``options``: by group, options of the base for this step.
        ``agree``: makes ``found_inf`` the same on all replicas. ``is_plain``: with nothing perturbed the step is the base's own, bit for
        bit. ``scaler_has_checked``: the argument ``found_inf`` says whether these gradients, as they are now, are finite.
        """
        currents = self.current(groups)
        norm = None
        if max_norm is not None and math.isinf(max_norm):  # asks for the check, and clips nothing
            max_norm, check_finite = None, True
        if max_norm is not None:
            norm = self.norm(currents, normalised=False) if known_norm is None else known_norm
        self.forget_last_step()
        if max_norm is None and known_norm is None and check_finite and not scaler_has_checked:
            for _, grads, *_ in self.joined(currents, normalised=False):
                functional.check_finite_(grads, self.found_inf)
        if found_inf is not None:
            self.found_inf.logical_or_(found_inf.to(self.found_inf.device))
        if agree is not None:  # the last moment before the update is decided
            agree(self.found_inf)
        amp: dict[str, Any] = {"grad_scale": grad_scale, "found_inf": self.found_inf, "norm": norm}
        fuses = (bool(self._perturbed) or not is_plain) and can_fuse(self.base, self.own_hooks)
        if fuses:
            by_index = {current.index: current for current in currents}
            for i, group in enumerate(groups):
                group = {**group, **options[i]} if i in options else group
                for lists, grads, old_params in self._parts(i, by_index.get(i)):
                    fused_step(self.base, group, lists, grads, old_params=old_params, max_norm=max_norm, **amp)
            self._perturbed, self._watch = {}, NOTHING_WATCHED
            self.base._opt_called = True  # type: ignore[attr-defined]  # or a scheduler on the base would warn
        else:
            if is_recording(self.found_inf.device):
                raise not_recordable(
                    f"the step of {type(self.base).__name__} is made by its own step(), after waiting to know whether it is skipped; what "
                    "can be recorded is an ascent and a descent with SGD, Adam or AdamW, without step hooks, amsgrad or betas in tensors"
                )
            self.restore()
            with with_options(groups, options):
                plain_step(self.base, [grad for current in currents for grad in current.grads], max_norm=max_norm, **amp)
        self.is_perturbed = self.has_ascended = False
        torch.clear_autocast_cache()
        return not fuses and grad_scale is not None

    def restore(self, kept: Collection[Tensor] = ()) -> None:
        """Back to the weights of before the ascent, bit for bit, but for those in ``kept``; nothing to do when there was none."""
        for lists in self._perturbed.values():
            rows: Sequence[int] = range(len(lists.params))
            if self._in_flight is not None and lists is self._in_flight.lists:
                rows = self._in_flight.saved_rows()
            if kept:
                rows = [i for i in rows if lists.params[i] not in kept]
            if len(rows) == len(lists.params) and lists.is_current(lists.params):
                functional.restore_(lists.params, lists.old_params)
            else:  # plain lists: a parameter may lie elsewhere by now
                functional.restore_([lists.params[i] for i in rows], [lists.old_params[i] for i in rows])
        self._perturbed, self._watch = {}, NOTHING_WATCHED
        self._in_flight = None
        self.is_perturbed = self.has_ascended = False
        torch.clear_autocast_cache()

    def watch_weights(self) -> None:
        """Notes which weights the ascent has left, for :meth:`check_unwritten`."""
        self._watch = WeightWatch([lists.params for lists in self._perturbed.values()])

    def check_unwritten(self) -> None:
        """Raises RuntimeError where somebody else has written weights since the ascent."""
        self._watch.check_unwritten()

    def abandon(self) -> bool:
        """Gives an unfinished step up; weights that somebody else has written since the ascent stay. Returns whether none have been.

        Raises RuntimeError, once, where it is not known which have been: all weights then stay as they are.
        """
        try:
            written = self._watch.written()
        except RuntimeError:
            self._perturbed = {}
            self.restore()
            raise
        self.restore(written)
        return not written

    def current(self, groups: list[dict[str, Any]]) -> list[Current]:
        found = []
        for i in [i for i in (*self._lists, *self._trainable) if i >= len(groups)]:
            self._drop(i)
        for i, group in enumerate(groups):
            lists = self._lists.get(i)
            vouched = None if lists is None else lists.current_grads(group["params"])
            if lists is not None and vouched is not None:  # the usual case: nothing moved, every parameter has a gradient
                found.append(Current(i, group, lists, vouched))
                continue
            params, grads = with_grads(group["params"])
            if not params:
                if (lists is not None or i in self._trainable) and not self._are_of(i, group["params"]):
                    self._drop(i)
                continue
            if lists is None or not lists.is_current(params):
                self._check(groups)
                self._joint = None
                self._trainable.pop(i, None)
                lists = self._lists[i] = GroupLists(params, self.backups)
            described = lists.grads(grads)
            if described is grads:  # not vouched for: perhaps one of them is no dense tensor
                check_grads(group, i)
            found.append(Current(i, group, lists, described))
        return found

    def _are_of(self, i: int, params: list[Tensor]) -> bool:
        """Whether what is known of group i is of parameters that are still in it."""
        known = [lists.params for lists in (self._lists.get(i), self._trainable.get(i)) if lists is not None]
        return bool(params) and set(params).issuperset(param for each in known for param in each)

    def _drop(self, i: int) -> None:
        """Forgets lists of group i, whose parameters would stay in memory."""
        self._lists.pop(i, None)
        self._trainable.pop(i, None)
        self._joint = None

    def norm(self, currents: list[Current], *, normalised: bool) -> Tensor:
        """Global norm over the groups, each with its own adaptive normalisation where ``normalised``; marks ``found_inf``."""
        norms = []
        for lists, grads, adaptive, eta in self.joined(currents, normalised=normalised):
            params = lists.params if adaptive else None
            skipped = self.skipped if self._begins else None
            functional.grad_norm_(lists.norm, grads, params, adaptive=adaptive, eta=eta, found_inf=self.found_inf, skipped=skipped)
            self._begins = False
            norms.append(lists.norm)
        if not norms:
            return torch.zeros((), dtype=torch.float32, device=self.found_inf.device)
        self._told_norm = norms[0] if len(norms) == 1 else functional.combine_norms(norms)
        return self._told_norm

    def joined(self, currents: list[Current], *, normalised: bool) -> list[tuple[GroupLists, list[Tensor], bool, float]]:
        """Lists, gradients, adaptive and eta of the norms to take: one norm of all groups where they agree and one call can take them."""
        kinds = [(False, 0.0)] * len(currents)
        if normalised:
            assert self.plan is not None
            kinds = [(self.plan.groups[each.index].adaptive, self.plan.groups[each.index].eta) for each in currents]
        if len(currents) > 1 and len(set(kinds)) == 1:
            members = [current.lists for current in currents]
            if self._joint is None or not same_tensors(self._joint[0], members):
                self._joint = members, GroupLists([param for lists in members for param in lists.params], self.backups)
            joint = self._joint[1]
            grads = joint.grads([grad for current in currents for grad in current.grads])
            if isinstance(grads, TensorList):
                return [(joint, grads, *kinds[0])]
        return [(current.lists, current.grads, *kind) for current, kind in zip(currents, kinds, strict=True)]

    def _parts(self, i: int, current: Current | None) -> list[tuple[GroupLists, list[Tensor], list[Tensor] | None]]:
        """The parameters of group i by what their step starts from; those without a gradient now are restored here."""
        perturbed = self._perturbed.get(i)
        if perturbed is None:
            return [] if current is None else [(current.lists, current.grads, None)]
        if current is not None and (current.lists is perturbed or same_tensors(current.lists.params, perturbed.params)):
            return [(current.lists, current.grads, current.lists.old_params)]  # not the others: parameters may have moved
        params, grads = ([], []) if current is None else (current.lists.params, current.grads)
        with_gradient, were_perturbed = set(params), set(perturbed.params)
        gone = [param for param in perturbed.params if param not in with_gradient]
        if gone:
            functional.restore_(gone, self.backups.of(gone))
        parts: list[tuple[GroupLists, list[Tensor], list[Tensor] | None]] = []
        for from_old in (True, False):
            pairs = [(param, grad) for param, grad in zip(params, grads, strict=True) if (param in were_perturbed) is from_old]
            if pairs:
                lists = GroupLists([param for param, _ in pairs], self.backups)
                parts.append((lists, lists.grads([grad for _, grad in pairs]), lists.old_params if from_old else None))
        return parts


def _checked_norm(direction: Direction, norm: Any) -> Tensor:  # ()
    if not isinstance(norm, Tensor) or norm.numel() != 1 or not norm.is_floating_point():
        raise TypeError(f"SAM: {type(direction).__name__}.norm must return a floating-point tensor of one element, got {describe(norm)}")
    return norm
