"""The lists of every parameter group that are kept between steps, and the backups."""

from __future__ import annotations

from torch import Tensor

from sam_kernels._tensor_list import TensorList
from sam_kernels.optim._base.identity import IdentityCheck
from sam_kernels.optim._engine.lists import Copies, GroupGrads, GroupLists, check_grads, same_tensors, with_grads
from sam_kernels.optim._types import ParamGroup

__all__ = ["KeptLists"]


class KeptLists:
    """By the index of a group, lists of its parameters. They are made anew only where a parameter was replaced or has moved.

    ``check`` looks at all groups when lists are made anew: a parameter may have come that is another's memory.
    """

    def __init__(self, check: IdentityCheck) -> None:
        self.backups = Copies()
        self._check = check
        self._lists: dict[int, GroupLists] = {}  # of the parameters that have a gradient
        self._trainable: dict[int, GroupLists] = {}  # where not every trainable parameter has a gradient
        self._joint: tuple[list[GroupLists], GroupLists] | None = None  # several groups' lists, and those of all their parameters

    def release(self) -> None:
        """Frees the backups."""
        self.backups = Copies()
        self._lists = {}
        self._trainable = {}
        self._joint = None

    def group_grads(self, groups: list[ParamGroup]) -> list[GroupGrads]:
        """The parameters that have a gradient, and their gradients, by group; groups without any are left out."""
        found = []
        for i in [i for i in (*self._lists, *self._trainable) if i >= len(groups)]:
            self._drop(i)
        for i, group in enumerate(groups):
            lists = self._lists.get(i)
            trusted = None if lists is None else lists.current_grads(group["params"])
            if lists is not None and trusted is not None:  # the usual case: nothing moved, every parameter has a gradient
                found.append(GroupGrads(i, group, lists, trusted))
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
            if described is grads:  # not trusted: perhaps one of them is no dense tensor
                check_grads(group, i)
            found.append(GroupGrads(i, group, lists, described))
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

    def joined(self, group_grads: list[GroupGrads]) -> tuple[GroupLists, TensorList] | None:
        """Lists and gradients of all groups together, where there are several and one call can take them; else None."""
        if len(group_grads) < 2:
            return None
        members = [each.lists for each in group_grads]
        if self._joint is None or not same_tensors(self._joint[0], members):
            self._joint = members, GroupLists([param for lists in members for param in lists.params], self.backups)
        joint = self._joint[1]
        grads = joint.grads([grad for each in group_grads for grad in each.grads])
        return (joint, grads) if isinstance(grads, TensorList) else None

    def _are_of(self, i: int, params: list[Tensor]) -> bool:
        """Whether what is known of group i is of parameters that are still in it."""
        known = [lists.params for lists in (self._lists.get(i), self._trainable.get(i)) if lists is not None]
        return bool(params) and set(params).issuperset(param for each in known for param in each)

    def _drop(self, i: int) -> None:
        """Forgets lists of group i, whose parameters would stay in memory."""
        self._lists.pop(i, None)
        self._trainable.pop(i, None)
        self._joint = None
