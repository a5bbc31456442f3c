"""What a direction sees of the step under way: gradients, norms, what is kept. The engine begins and ends a step; a direction cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor
from torch.optim import Optimizer

from sam_kernels._validate import describe
from sam_kernels.optim._engine.lists import GroupGrads, GroupLists, Key
from sam_kernels.optim._engine.passes import Passes
from sam_kernels.optim._engine.plan import GroupPlan, Scaling
from sam_kernels.schedules._at_step import Step

__all__ = ["AscentStep"]


class AscentStep:
    """One ascent, as a :class:`~sam_kernels.optim.directions.Direction` may use it.

    Attributes:
        groups: a :class:`GroupPlan` for each parameter group: radius, mix, ``scaling``, ``scale``, ``maximize``, ``participates``.
        micro_batch: which of the step's micro-batches, from 0.
        t: the step, 1, 2, …
        within_replica: norms are over the ranks that together hold one copy of the parameters, not over all ranks (HSDP's local ascent).
    """

    def __init__(self, passes: Passes, micro_batch: int = 0, *, within_replica: bool = False, is_descent: bool = False) -> None:
        self._passes = passes
        self._is_descent = is_descent
        self.groups: Sequence[GroupPlan] = passes.ascent_plan.groups
        self.micro_batch = micro_batch
        self.within_replica = within_replica
        self._norm: Tensor | None = None  # () the first that was taken

    @property
    def t(self) -> Step:
        """The step that the first group counts."""
        return self.groups[0].t

    @property
    def base(self) -> Optimizer:
        """The base optimizer, to be read."""
        return self._passes.base

    @property
    def found_inf(self) -> Tensor:  # () float32
        """Set it to 1 where something is not finite: the step is then skipped. It is this step's own, 0 at first."""
        self._passes.skips.forget_last_step()
        return self._passes.found_inf

    def options(self, current: GroupGrads) -> GroupPlan:
        """What the step has decided about a group."""
        return self.groups[current.index]

    # --- gradients ---

    def grads(self) -> list[GroupGrads]:
        """The gradients as they are, by group; groups without any are left out."""
        return self._passes.lists.group_grads([each.group for each in self.groups])

    def norm(self, group_grads: list[GroupGrads], *, normalised: bool = True) -> Tensor:  # ()
        """‖g‖ over these groups, or ‖T g‖ where a group is adaptive and ``normalised``; sets :attr:`found_inf`. Reads g: 1 N s."""
        if self._norm is None:
            self._norm = self._passes.norm(group_grads, normalised=normalised, within_replica=self.within_replica)
            return self._norm
        first = self._norm.clone()  # both may be made in the same memory
        norm = self._passes.norm(group_grads, normalised=normalised, within_replica=self.within_replica).clone()
        self._norm.copy_(first)
        return norm

    def joined(self, group_grads: list[GroupGrads], *, normalised: bool = True) -> list[tuple[GroupLists, list[Tensor], Scaling]]:
        """(lists, gradients, scaling): one row for all groups where one call can take them. ``**scaling`` are keywords of operations."""
        return self._passes.joined(group_grads, normalised=normalised)

    def combined(self, norms: Sequence[Tensor | tuple[GroupLists, Tensor]], *, normalised: bool = True) -> Tensor:  # ()
        """The norm over all elements out of norms of lists; 0 of none. Of DTensors it is over the elements of all ranks.

        ``norms``: (lists, norm) for each, or the norm alone. In an ascent that of a group is multiplied by its ``scale`` where
        ``normalised``. Raises TypeError for a norm alone where parameters lie on the ranks in several ways, since the lists tell which
        elements count once, and where a group has a ``scale``.
        """
        scaled = self._passes.scaled(norms) if normalised and not self._is_descent else norms
        return self._passes.combined(scaled, within_replica=self.within_replica)

    def lists_of(self, index: int, params: list[Tensor]) -> list[tuple[Key, GroupLists]]:
        """Lists of parameters of a group, whether they have a gradient or not: one for each way in which they lie on the ranks."""
        lists = self._passes.lists
        return [(key, lists.lists_of(key, owners)) for key, owners in lists.by_layout(index, params)]

    # --- what is kept between steps ---

    def kept(self, name: str, lists: GroupLists) -> list[Tensor | None]:
        """What the direction keeps under ``name`` for these parameters; None for one that has nothing yet."""
        self._check_kept(name)
        return self._passes.memory.of(name, lists)

    def kept_as_grads(self, name: str) -> list[GroupGrads]:
        """By group, the parameters that something is kept for under ``name``, with that in the place of their gradients."""
        self._check_kept(name)
        found, memory, known_lists = [], self._passes.memory, self._passes.lists
        for i, group in enumerate(self.groups):
            for key, params in known_lists.by_layout(i, group.group["params"]):
                lists = known_lists.of_all(key, params) if params and all(param.requires_grad for param in params) else None
                kept = None if lists is None else memory.known(name, lists)
                if lists is None or kept is None:
                    pairs = zip(params, memory.entries(name, params), strict=True)
                    params = [param for param, each in pairs if each is not None and param.requires_grad]
                    if not params:
                        continue
                    lists = known_lists.lists_of(key, params)
                    kept = cast("list[Tensor]", memory.of(name, lists))
                found.append(GroupGrads(key, group.group, lists, kept))
        return found

    @property
    def spoiled(self) -> Tensor | None:  # () float32
        """Set, on the device, where the gradients kept by ``keeps_last_grads`` are those of a skipped step; None where they are not."""
        return self._passes.memory.spoiled

    def keep(self, name: str, lists: GroupLists, tensors: Sequence[Tensor]) -> None:
        """Keeps ``tensors``, one for each parameter; those of parameters that had none begin in this step (:attr:`begun`).

        Raises: ValueError for a name that the direction does not announce in ``keeps``, or tensors that do not fit the parameters.
        """
        self._check_kept(name)
        if len(tensors) != len(lists.params):
            raise ValueError(f"SAM: AscentStep.keep({name!r}): got {len(tensors)} tensors for {len(lists.params)} parameters")
        for i, (param, tensor) in enumerate(zip(lists.params, tensors, strict=True)):
            if not isinstance(tensor, Tensor) or tensor.shape != param.shape:
                raise ValueError(
                    f"SAM: AscentStep.keep({name!r}): tensors[{i}] must have the shape {tuple(param.shape)} of its parameter, "
                    f"got {describe(tensor)}"
                )
        before = self._passes.memory.entries(name, lists.owners)
        self._passes.begun.update(param for param, kept in zip(lists.params, before, strict=True) if kept is None)
        self._passes.memory.put(name, lists, tensors)

    def _check_kept(self, name: str) -> None:
        names = self._passes.memory.names
        if name not in names:
            announced = ", ".join(map(repr, names)) or "nothing"
            raise ValueError(f"SAM: the direction keeps {announced}, not {name!r}; write keeps = ({name!r},) in its class")

    @property
    def begun(self) -> set[Tensor]:
        """Parameters for which something has begun to be kept in this step."""
        return self._passes.begun

    # --- moves before the first gradient ---

    def trainable(self) -> dict[Key, GroupLists]:
        """By the index of a group and a layout that participates, its parameters that require a gradient."""
        return self._passes.trainable(self._passes.ascent_plan)

    def perturb_randomly(self, trainable: dict[Key, GroupLists], seeds: Sequence[int], *, scale: float, distribution: str) -> None:
        """Adds scale z to what :meth:`trainable` gave, z from a seed for each group: 3 N s bytes."""
        self._passes.perturb_randomly(trainable, seeds, scale=scale, distribution=distribution)

    def origins(self, current: GroupGrads) -> list[Tensor] | None:
        """Where the parameters were at the beginning of the step, one for each; None where none of them has moved."""
        return self._passes.origins(current)

    def restore_others(self, group_grads: list[GroupGrads]) -> None:
        """Before an ascent from perturbed weights: parameters that it does not save by itself are where they were."""
        self._passes.restore_others(group_grads)
