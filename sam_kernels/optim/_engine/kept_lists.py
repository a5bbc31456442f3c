"""The lists of every parameter group that are kept between steps, and the backups."""

from __future__ import annotations

from torch import Tensor, dtype

from sam_kernels._tensor_list import TensorList
from sam_kernels.optim._base.identity import IdentityCheck
from sam_kernels.optim._engine.lists import Copies, GroupGrads, GroupLists, Key, check_grads, same_tensors, with_grads
from sam_kernels.optim._engine.masters import Masters, is_narrow
from sam_kernels.optim._shards.dtensor import local_grad
from sam_kernels.optim._shards.layout import WHOLE, Layout, layout_of
from sam_kernels.optim._shards.shards import Shards
from sam_kernels.optim._types import ParamGroup

__all__ = ["KeptLists"]


class KeptLists:
    """By the index of a group, lists of its parameters. They are made anew only where a parameter was replaced or has moved.

    ``check`` looks at all groups when lists are made anew: a parameter may have come that is another's memory. ``masters``: those of 16-bit
    parameters, None where they have none.
    """

    def __init__(self, check: IdentityCheck, masters: Masters | None) -> None:
        self.backups = Copies()
        self.masters = masters
        self._check = check
        self._lists: dict[Key, GroupLists] = {}  # of the parameters that have a gradient
        self._trainable: dict[Key, GroupLists] = {}  # where not every trainable parameter has a gradient
        # By group: its parameters, with masters their dtypes, and the same parameters by layout.
        self._by_layout: dict[int, tuple[list[Tensor], list[dtype], list[list[Tensor]]]] = {}
        self._joint: tuple[list[GroupLists], GroupLists] | None = None  # several groups' lists, and those of all their parameters

    def release(self) -> None:
        """Frees the backups."""
        self.backups = Copies()
        self._lists = {}
        self._trainable = {}
        self._joint = None

    @property
    def shards(self) -> Shards:
        """What all ranks do together."""
        return self._check.shards

    def by_layout(self, i: int, params: list[Tensor]) -> list[tuple[Key, list[Tensor]]]:
        """The parameters of group i in lists of one layout each, those that have masters in lists of their own."""
        has_masters = self.masters is not None
        if not (self.shards or has_masters):
            return [((i, 0), params)]
        dtypes = [param.dtype for param in params] if has_masters else []
        known = self._by_layout.get(i)
        if known is None or known[1] != dtypes or not same_tensors(known[0], params):
            parts: dict[tuple[Layout, bool], list[Tensor]] = {}
            for param in params:
                parts.setdefault((layout_of(param), has_masters and is_narrow(param)), []).append(param)
            for key in [key for key in (*self._lists, *self._trainable) if key[0] == i and key[1] >= len(parts)]:
                self._drop(key)
            if self.masters is not None:
                self.masters.forget([param for param in params if not is_narrow(param)])
            known = self._by_layout[i] = list(params), dtypes, list(parts.values())
        return [((i, part), params) for part, params in enumerate(known[2])]

    def made(self, params: list[Tensor]) -> GroupLists:
        """New lists of parameters of one layout, all with masters or all without."""
        return GroupLists(params, self.backups, self.masters if self.masters is not None and is_narrow(params[0]) else None)

    def group_grads(self, groups: list[ParamGroup]) -> list[GroupGrads]:
        """The parameters that have a gradient, and their gradients, by group and layout; groups without any are left out."""
        found = []
        for key in [key for key in (*self._lists, *self._trainable) if key[0] >= len(groups)]:
            self._drop(key)
        for i, group in enumerate(groups):
            for key, owners in self.by_layout(i, group["params"]):
                lists = self._lists.get(key)
                trusted = None if lists is None else lists.current_grads(owners)
                if lists is not None and trusted is not None:  # the usual case: nothing moved, every parameter has a gradient
                    found.append(GroupGrads(key, group, lists, trusted))
                    continue
                params, grads = with_grads(owners)
                if not params:
                    if (lists is not None or key in self._trainable) and not self._are_of(key, owners):
                        self._drop(key)
                    continue
                if lists is None or not lists.is_current(params):
                    self._check(groups)
                    self._joint = None
                    self._trainable.pop(key, None)
                    lists = self._lists[key] = self.made(params)
                if lists.layout is not WHOLE:
                    check_grads(group, i)
                    grads = list(map(local_grad, params, grads))
                described = lists.grads(grads)
                if described is grads:  # not trusted: perhaps one of them is no dense tensor
                    check_grads(group, i)
                found.append(GroupGrads(key, group, lists, described))
        return found

    def of_all(self, key: Key, params: list[Tensor]) -> GroupLists | None:
        """Lists of exactly these parameters, if they are known and have not moved."""
        known = self._lists.get(key)
        return known if known is not None and known.is_current(params) else None

    def lists_of(self, key: Key, params: list[Tensor]) -> GroupLists:
        """Lists of parameters of a group, all of one layout, whether they have a gradient or not."""
        # Those of the last ascent first: what is saved for them need not be saved again.
        known = (self._lists.get(key), self._trainable.get(key))
        lists = next((each for each in known if each is not None and each.is_current(params)), None)
        if lists is None:
            lists = self._trainable[key] = self.made(params)
            self._lists.setdefault(key, lists)
        return lists

    def index_of(self, lists: GroupLists) -> int:
        """The number of the group whose parameters these are; of lists of several groups, that of the first."""
        if self._joint is not None and self._joint[1] is lists:
            lists = self._joint[0][0]
        known = (*self._lists.items(), *self._trainable.items())
        return next(key[0] for key, each in known if each is lists)

    def joined(self, group_grads: list[GroupGrads]) -> tuple[GroupLists, TensorList] | None:
        """Lists and gradients of all groups together, where there are several and one call can take them; else None."""
        if len(group_grads) < 2:
            return None
        members = [each.lists for each in group_grads]
        if any(lists.layout != members[0].layout or lists.masters is not members[0].masters for lists in members):
            return None
        if self._joint is None or not same_tensors(self._joint[0], members):
            self._joint = members, self.made([owner for lists in members for owner in lists.owners])
        joint = self._joint[1]
        grads = joint.grads([grad for each in group_grads for grad in each.grads])
        return (joint, grads) if isinstance(grads, TensorList) else None

    def _are_of(self, key: Key, params: list[Tensor]) -> bool:
        """Whether what is known under ``key`` is of parameters that are still in the group."""
        known = [lists.owners for lists in (self._lists.get(key), self._trainable.get(key)) if lists is not None]
        return bool(params) and set(params).issuperset(param for each in known for param in each)

    def _drop(self, key: Key) -> None:
        """Forgets lists of a group, whose parameters would stay in memory."""
        self._lists.pop(key, None)
        self._trainable.pop(key, None)
        self._by_layout.pop(key[0], None)
        self._joint = None
