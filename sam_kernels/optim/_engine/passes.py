"""The two passes over the parameter groups: ascend, descend, and the way back when something goes wrong in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_kernels import functional
from sam_kernels.optim._base.identity import IdentityCheck
from sam_kernels.optim._engine.ascent import Move
from sam_kernels.optim._engine.capturable import is_recording, not_recordable
from sam_kernels.optim._engine.in_flight import InFlight
from sam_kernels.optim._engine.kept_lists import KeptLists
from sam_kernels.optim._engine.lists import GroupGrads, GroupLists, Key, same_tensors
from sam_kernels.optim._engine.masters import Masters
from sam_kernels.optim._engine.memory import ParamMemory
from sam_kernels.optim._engine.norms import Norms
from sam_kernels.optim._engine.plan import StepPlan
from sam_kernels.optim._engine.rounding import Rounding, part_seed
from sam_kernels.optim._engine.step_on_masters import step_on_masters
from sam_kernels.optim._engine.update import UpdateScalars, can_fuse, fused_step, plain_step, with_options
from sam_kernels.optim._engine.weight_watch import NOTHING_WATCHED, WeightWatch
from sam_kernels.optim._seeds import derived_seed
from sam_kernels.optim._shards.dtensor import local_of
from sam_kernels.optim._types import GroupOptions, ParamGroup

__all__ = ["Passes"]


class Passes(Norms):
    """The two passes of the step under way.

    ``lists`` are kept between steps; ``memory`` is what the direction and the descent rule keep; ``begun`` are the parameters for which a
    moving average has begun in this step. ``plan`` is that of the step under way, None in a plain step of the base.
    """

    def __init__(self, base: Optimizer, own_hooks: set[int], memory: ParamMemory, check: IdentityCheck, rounding: Rounding) -> None:
        self.base = base
        self.own_hooks = own_hooks  # of the base's step hooks, those that do not count as somebody listening
        self.memory = memory
        self.masters = Masters(memory, base) if memory.has_masters else None
        super().__init__(KeptLists(check, self.masters))
        self.rounding = rounding
        self.begun: set[Tensor] = set()
        self._plain_steps = 0  # which no t counts
        self.is_perturbed = False
        self.has_ascended = False  # in the last ascent it was the turn of a group at least
        self._perturbed: dict[Key, GroupLists] = {}
        self._saved: dict[Key, GroupLists] = {}  # what has been saved in this step
        self._in_flight: InFlight | None = None
        self._watch = NOTHING_WATCHED  # the two-step API's, between the passes
        self._unrounded: list[GroupLists] = []  # whose masters were written, and perhaps not yet their parameters

    def begin(self, device: torch.device, plan: StepPlan | None) -> None:
        """A new step: nothing is known to be wrong with it."""
        self._round_masters()
        self.plan = plan
        self._plain_steps += plan is None
        self.skips.begin(device)
        self._saved = {}
        self.begun = set()
        if self.masters is not None:
            self.masters.begin()

    def release(self) -> None:
        """Frees the backups."""
        self.lists.release()
        self._saved = {}

    def ascend(
        self, moves: Sequence[Move], norm: Tensor, *, eps: float, grad_scale: Tensor | None, loss: Any = None, micro_batch: int = 0
    ) -> None:
        """Saves and perturbs the parameters of the groups that participate, for SAM along their gradients as they are: 4 N s bytes.

        ``loss``: what the closure returned, for radii that follow it. ``micro_batch``: of the step, from 0. Later in a step (m-SAM's second
        micro-batch) they are the same weights again, which are not saved a second time: 3 N s. Masters are never saved: they are there.
        """
        self.skips.forget_last_step()  # where no norm has seen to that
        plan = self.ascent_plan
        if norm is not self._told_norm:
            self.found_inf.logical_or_(~norm.isfinite().to(self.found_inf.device))
        radii: dict[int, float | Tensor] = {}  # by group, all of them before anything is written
        for current, along, _ in moves:
            if current.index not in radii:
                known_scale = grad_scale if along.is_scaled and along.ema is None else None
                radii[current.index] = plan.groups[current.index].radius(norm, known_scale, loss)
        self.is_perturbed = True
        self.has_ascended = plan.ascends
        for current, along, is_downhill in moves:
            group = plan.groups[current.index]
            rho = group.scaled(radii[current.index])
            perturb_: Callable[..., None] = partial(
                functional.perturb_,
                grads=current.grads,
                norm=norm,
                rho=-rho if is_downhill else rho,
                lambd=group.lambd,
                eps=eps,
                grad_scale=grad_scale if along.is_scaled else None,
                found_inf=self.found_inf if along.rests is None else torch.maximum(self.found_inf, along.rests),
                ema=along.ema,
                kind=along.kind,
                sigma=along.sigma,
                lmbda=along.lmbda,
                rounding_seed=self.rounding.ascent_seed(current.lists, current.key, group.t, micro_batch),
                **group.scaling,
            )
            self._perturb(current.key, current.lists, perturb_)
        torch.clear_autocast_cache()  # where autocast is around the whole step: casts of what the weights were

    def _perturb(self, key: Key, lists: GroupLists, perturb_: Callable[..., None]) -> None:
        """Perturbs the parameters in ``lists`` and saves them where that has not been done in this step."""
        self.follow_weights(key, lists)
        # Other lists than those saved: other parameters have a gradient now, or some have moved. Saving all of them is right as well.
        is_saved = self._saved.get(key) is lists
        self._perturbed[key] = lists
        self._in_flight = None if is_saved else InFlight(lists, perturb_)
        perturb_(lists.params, old_params=lists.old_params, from_old=is_saved)
        self._in_flight = None
        self._saved[key] = lists
        self.wrote(lists)

    def reflect(self) -> None:
        """w - e in the place of w + e, as 2 w - (w + e), rounded once: 3 N s bytes. Weights that did not move stay."""
        for lists in self._perturbed.values():
            params, old_params = lists.params, lists.old_params
            functional.combine_(params, params, old_params, left_weight=-1.0, right_weight=2.0, found_inf=self.found_inf)
            self.wrote(lists)
        torch.clear_autocast_cache()

    def follow_weights(self, key: Key, lists: GroupLists) -> None:
        """Masters follow what somebody else has written to their parameters, once a step, before it depends on them."""
        if self.masters is not None and lists.masters is not None and self._saved.get(key) is not lists:
            self.masters.follow(lists)
            self._saved[key] = lists

    @contextmanager
    def weights_written(self, all_lists: Sequence[GroupLists]) -> Iterator[None]:
        """Around what writes ``lists.weights`` outside of the two passes. Parameters of masters are their rounding again, after an
        exception too; where another one (Ctrl-C) comes in between, at the next step."""
        self._unrounded = list(all_lists)
        try:
            yield
        finally:
            self._round_masters()

    def _round_masters(self) -> None:
        for lists in self._unrounded:
            if lists.masters is not None:
                functional.restore_(lists.params, lists.old_params)
            self.wrote(lists)
        self._unrounded = []

    def wrote(self, lists: GroupLists) -> None:
        """The optimizer has written the parameters."""
        self.lists.shards.written(lists.layout, lists.owners)
        if self.masters is not None:  # after the versions have moved
            self.masters.wrote(lists)

    def perturb_randomly(self, trainable: dict[Key, GroupLists], seeds: Sequence[int], *, scale: float, distribution: str) -> None:
        """Adds scale z to what :meth:`trainable` gave, z from a seed for each group: 3 N s bytes.

        They start from where they were before this or any other perturbation of the step: a second one needs no restore between, and
        those that are saved already are not saved again (2 N s).
        """
        self.is_perturbed = True
        for key, lists in trainable.items():
            seed = self.random_seed(lists, seeds[key[0]])
            self._perturb(key, lists, partial(functional.random_perturb_, seed=seed, scale=scale, distribution=distribution))
        torch.clear_autocast_cache()

    def random_seed(self, lists: GroupLists, seed: int) -> int:
        """That of the random numbers of these lists, from that of their group: where a group has 16-bit parameters with masters and others
        beside them, those are two lists."""
        return part_seed(lists, seed if self.masters is None or lists.masters is not None else derived_seed(seed, 0))

    def trainable(self, plan: StepPlan) -> dict[Key, GroupLists]:
        """By the index of a group that participates, its parameters that require a gradient, whether they have one or not."""
        found = {}
        for i, group in enumerate(plan.groups):
            for key, params in self.lists.by_layout(i, group.group["params"]) if group.participates else ():
                params = [param for param in params if param.requires_grad]
                if params:
                    found[key] = self.lists.lists_of(key, params)
        return found

    def origins(self, current: GroupGrads) -> list[Tensor] | None:
        """Where the parameters of ``current`` were before the ascent, one for each; None where none of them has moved."""
        perturbed = self._perturbed.get(current.key)
        if perturbed is None:
            return None
        if perturbed is current.lists:
            return perturbed.old_params
        if current.lists.masters is not None:
            return current.lists.old_params
        moved = set(perturbed.params)
        saved = self.lists.backups.of(current.lists.params)
        return [old if param in moved else param for param, old in zip(current.lists.params, saved, strict=True)]

    def restore_others(self, group_grads: list[GroupGrads]) -> None:
        """Before an ascent from perturbed weights: those that it does not save by itself are where they were."""
        if [(current.key, current.lists) for current in group_grads] != list(self._perturbed.items()):
            self.restore()

    def scratch(self, key: Key, lists: GroupLists) -> list[Tensor]:
        """Memory like that of a group's parameters: of its backups, until a perturbation saves to it. (None may be under way.) Masters are
        none; it is allocated then."""
        if lists.masters is not None:
            return lists.grads([torch.empty_like(param, requires_grad=False) for param in lists.params])
        self._saved.pop(key, None)
        return lists.old_params

    def descend(
        self,
        groups: list[ParamGroup],
        *,
        max_norm: float | None,
        check_finite: bool,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        known_norm: Tensor | None = None,
        agree: Callable[[Tensor], None] | None = None,
        keep: Callable[[list[GroupGrads], bool], None] | None = None,
        options: Mapping[int, GroupOptions] = MappingProxyType({}),
        is_plain: bool = True,
        scaler_has_checked: bool = False,
        leaves_grads: bool = False,
    ) -> bool:
        """Restores the parameters and makes the base's step along the gradients as they are, unless something was not finite. Returns
        whether it has divided them by ``grad_scale``.

        ``known_norm``: () their norm, which has told ``found_inf`` already. ``options``: by group, options of the base for this step.
        ``agree``: makes ``found_inf`` the same on all replicas. ``keep``: is given the gradients before the update, and whether the update
        leaves them as they are. ``is_plain``: with nothing perturbed the step is the base's own, bit for bit. ``scaler_has_checked``: the
        argument ``found_inf`` says whether these gradients, as they are now, are finite. ``leaves_grads``: those of parameters with masters
        are not divided.
        """
        group_grads = self.lists.group_grads(groups)
        fuses = (bool(self._perturbed) or not is_plain or self._owns_updates) and can_fuse(self.base, self.own_hooks)
        if self.rounding.of_update and not fuses:
            raise RuntimeError(
                f"SAM: stochastic_rounding='update': the step of {type(self.base).__name__} has step hooks, amsgrad or betas in tensors "
                "and is made by its own step(), which rounds to nearest; take them out, or use stochastic_rounding=True"
            )
        self._check_places(groups, group_grads)
        norm = None
        if max_norm is not None and math.isinf(max_norm):  # asks for the check, and clips nothing
            max_norm, check_finite = None, True
        if max_norm is not None:
            norm = self.norm(group_grads, normalised=False) if known_norm is None else known_norm
        self.skips.forget_last_step()
        if max_norm is None and known_norm is None and check_finite and not scaler_has_checked:
            self._check_finite(group_grads)
        if found_inf is not None:
            self.found_inf.logical_or_(found_inf.to(self.found_inf.device))
        if agree is not None:  # the last moment before the update is decided
            agree(self.found_inf)
        scalars: UpdateScalars = {"found_inf": self.found_inf, "grad_scale": grad_scale, "norm": norm, "max_norm": max_norm}
        if keep is not None:
            keep(group_grads, fuses)
        if fuses:
            by_key = {current.key: current for current in group_grads}
            for key in sorted({*by_key, *self._perturbed}):
                for lists, grads, old_params in self._parts(key, by_key.get(key)):  # none of a group that is gone
                    group = groups[key[0]]
                    group = {**group, **options[key[0]]} if key[0] in options else group
                    fused_step(self.base, group, lists, grads, old_params, scalars, self._update_seed(lists, key))
                    self.wrote(lists)
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
                if self.masters is None:
                    plain_step(self.base, [grad for current in group_grads for grad in current.grads], scalars)
                else:
                    self._step_on_masters(group_grads, scalars, leaves_grads=leaves_grads)
        self.is_perturbed = self.has_ascended = False
        torch.clear_autocast_cache()
        return not fuses and grad_scale is not None

    def _check_places(self, groups: Sequence[ParamGroup], group_grads: Sequence[GroupGrads]) -> None:
        """Raises RuntimeError where a perturbed parameter is in another group than at the ascent: a group before its own was removed."""
        if not self._perturbed or self.plan is None or len(groups) == len(self.plan.groups):
            return
        places = {owner: key[0] for key, lists in self._perturbed.items() for owner in lists.owners}
        for current in group_grads:
            if any(places.get(owner, current.index) != current.index for owner in current.lists.owners):
                raise RuntimeError(
                    f"SAM: parameters of param_groups[{current.index}] were perturbed as those of another group, since param_groups were "
                    "removed or added before it between the passes; call first_step anew, which restores the weights"
                )

    @property
    def _owns_updates(self) -> bool:
        """Whether a plain step is another than the base's own."""
        return self.masters is not None or self.rounding.of_update

    def _update_seed(self, lists: GroupLists, key: Key) -> int | None:
        if self.plan is None:
            return self.rounding.update_seed(lists, key, 0, self._plain_steps)
        return self.rounding.update_seed(lists, key, self.plan.groups[key[0]].t, 0)

    def _step_on_masters(self, group_grads: list[GroupGrads], scalars: UpdateScalars, *, leaves_grads: bool) -> None:
        for current in group_grads:
            self.follow_weights(current.key, current.lists)
        with self.weights_written([current.lists for current in group_grads]):
            step_on_masters(self.base, group_grads, scalars, leaves_grads=leaves_grads)

    def restore(self, kept: Collection[Tensor] = ()) -> None:
        """Back to the weights of before the ascent, bit for bit, but for those in ``kept``; nothing to do when there was none."""
        for lists in self._perturbed.values():
            rows: Sequence[int] = range(len(lists.params))
            if self._in_flight is not None and lists is self._in_flight.lists:
                rows = self._in_flight.saved_rows()
            if kept:
                rows = [i for i in rows if lists.owners[i] not in kept]
            if len(rows) == len(lists.params) and lists.is_current(lists.owners):
                functional.restore_(lists.params, lists.old_params)
            else:  # plain lists: a parameter may lie elsewhere by now
                functional.restore_([local_of(lists.owners[i]) for i in rows], [lists.old_params[i] for i in rows])
            if len(rows) == len(lists.params):
                self.wrote(lists)
            else:
                self.lists.shards.written(lists.layout, lists.owners)
        self._perturbed, self._watch = {}, NOTHING_WATCHED
        self._in_flight = None
        self.is_perturbed = self.has_ascended = False
        torch.clear_autocast_cache()

    def watch_weights(self) -> None:
        """Notes which weights the ascent has left, for :meth:`check_unwritten`."""
        self._watch = WeightWatch([(lists.params, lists.owners) for lists in self._perturbed.values()])

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

    def _parts(self, key: Key, current: GroupGrads | None) -> list[tuple[GroupLists, list[Tensor], list[Tensor] | None]]:
        """The parameters under a key by what their step starts from; those without a gradient now are restored here."""
        perturbed = self._perturbed.get(key)
        if perturbed is None:
            if current is None:
                return []
            self.follow_weights(key, current.lists)
            return [(current.lists, current.grads, current.lists.old_params if current.lists.masters is not None else None)]
        if current is not None and (current.lists is perturbed or same_tensors(current.lists.params, perturbed.params)):
            return [(current.lists, current.grads, current.lists.old_params)]  # not the others: parameters may have moved
        params, grads = ([], []) if current is None else (current.lists.owners, current.grads)
        with_gradient, were_perturbed = set(params), set(perturbed.owners)
        gone = [owner for owner in perturbed.owners if owner not in with_gradient]
        if gone:
            lost = self.lists.made(gone)
            functional.restore_(lost.params, lost.old_params)
            self.wrote(lost)
        parts: list[tuple[GroupLists, list[Tensor], list[Tensor] | None]] = []
        for from_old in (True, False):
            pairs = [(param, grad) for param, grad in zip(params, grads, strict=True) if (param in were_perturbed) is from_old]
            if pairs:
                lists = self.lists.made([param for param, _ in pairs])
                if self.masters is not None and lists.masters is not None and not from_old:
                    self.masters.follow(lists)
                is_from_old = from_old or lists.masters is not None
                parts.append((lists, lists.grads([grad for _, grad in pairs]), lists.old_params if is_from_old else None))
        return parts
