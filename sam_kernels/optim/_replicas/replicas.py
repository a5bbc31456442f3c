"""The replicas of ``DistributedDataParallel``: the passes that average gradients over them, and their agreement on a skipped step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from sam_kernels._validate import check_flag
from sam_kernels.optim._batches.closures import Closure, TwoPasses
from sam_kernels.optim._batches.micro_batches import GradientMean
from sam_kernels.optim._engine.passes import Passes
from sam_kernels.optim._part import FirstGradient
from sam_kernels.optim._replicas.grad_mean import average_grads_
from sam_kernels.optim._replicas.rank_mean import RankMean
from sam_kernels.optim._shards.layout import mean_of_ranks
from sam_kernels.optim._shards.shards import GROUP_IS_GONE, check_apart, loss_value
from sam_kernels.optim._types import ParamGroup
from sam_kernels.optim.descents import Descent
from sam_kernels.optim.directions import Direction

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Replicas", "is_blank", "modules_of", "replicated_modules"]


class Replicas:
    """The ``DistributedDataParallel`` modules among the optimizer's ``model``; without one, every method does nothing.

    Args:
        model: a module or a list of modules, as the optimizer was given them.
        direction, descent: the parts of the optimizer.
        local_ascent: every rank perturbs by its own gradient. None: it does so wherever a module has ``no_sync``.
        process_group: ranks that hold other parameters of the model, so that none of them may be a replica.
        freezes: first passes leave parameters out (``freeze_unperturbed``).

    Every collective here is issued by all ranks or by none, whatever the numbers of one rank are: the decision depends on the arguments of
    the optimizer and on the method that was called. Tensors are reduced where they are, so the host does not wait for a device.
    """

    has_groups = False  # of ranks that perturb one copy together: HSDP's, with a local ascent
    _freezes = False
    _is_averaged_by_hand = False  # the gradient of the last first pass

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module] | None,
        direction: Direction,
        descent: Descent,
        *,
        local_ascent: bool | None,
        process_group: ProcessGroup | None = None,
        freezes: bool = False,
    ) -> None:
        self._direction, self._descent, self._freezes = direction, descent, freezes
        self._replicated, others = _found(model)
        if local_ascent is None:
            self.ascends_locally = bool(self._replicated or others)
        else:
            self.ascends_locally = check_flag("SAM", "local_ascent", local_ascent)
        if local_ascent:
            self._check_can_ascend_locally(model)
        self._averaging: list[Any] = [*self._replicated, *others] if self.ascends_locally else []
        self._check_one_group()
        if process_group is not None and self._replicated:
            ranks = distributed.get_process_group_ranks(self._replicated[0].process_group)
            check_apart(process_group, ranks, "the parameters of the DistributedDataParallel module")
        self._check_static_graph()
        if self.ascends_locally:
            self._check_parts()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._replicated)

    # --- the passes ---

    @contextmanager
    def without_averaging(self) -> Iterator[None]:
        """Within it, forward and backward leave the rank's own gradients, where the ascent is local."""
        with ExitStack() as stack:
            for module in self._averaging:
                stack.enter_context(module.no_sync())
            yield

    @contextmanager
    def averaging(self) -> Iterator[None]:
        """Within it, unless the ascent is local, backward averages over ranks inside of the caller's ``no_sync()`` too: the ranks would
        perturb one micro-batch by gradients of their own, and the next one by the gradient of all."""
        modules = [] if self._averaging or self._is_averaged_by_hand else self._replicated
        deferring = [module for module in modules if not module.require_backward_grad_sync]
        if any(module.static_graph for module in deferring):
            raise ValueError(
                "SAM.backward under no_sync() with DistributedDataParallel(static_graph=True): torch then averages wrongly, without an "
                "error; leave static_graph out, or no_sync()"
            )
        try:
            for module in deferring:
                module.require_backward_grad_sync = True
            yield
        finally:
            for module in deferring:
                module.require_backward_grad_sync = False

    @contextmanager
    def averaging_by_hand(self, params: Sequence[Tensor]) -> Iterator[None]:
        """Around a first pass that gives only ``params`` gradients: with averaged gradients these become means here.

        ``DistributedDataParallel`` waits for the gradients of all parameters that required one when it was made.
        """
        if not self._replicated or self._averaging:
            yield
            return
        self._check_usable()
        self._check_hooks()
        self._is_averaged_by_hand = True
        try:
            with ExitStack() as stack:
                for module in self._replicated:
                    stack.enter_context(module.no_sync())
                yield
        except BaseException:
            self._is_averaged_by_hand = False
            raise
        ours = {id(param) for module in self._replicated for param in module._module_parameters}  # that it reduces
        may_differ = any(module.find_unused_parameters for module in self._replicated)
        average_grads_([param for param in params if id(param) in ours], self._replicated[0].process_group, may_differ=may_differ)

    def mean(self, count: int, passes: Passes) -> GradientMean | None:
        """The mean of the descent gradients of ``count`` micro-batches; None for one, whose gradient is the mean."""
        if count == 1:
            return None
        return RankMean(count, passes) if self._averaging else GradientMean(count, passes)

    def arranged(self, passes: Sequence[TwoPasses], mean: GradientMean | None, groups: list[ParamGroup]) -> Sequence[TwoPasses]:
        """The passes of a step. With a local ascent all but the last descent run without averaging: one all-reduce of gradients a step."""
        if not self._replicated and not self._averaging:
            return passes
        self._check_usable()
        descents = [self._local(descent) for _, descent in passes[:-1]] + [self._last(passes[-1][1], mean, groups)]
        return [(self.first_pass(ascent, groups), descent) for (ascent, _), descent in zip(passes, descents, strict=True)]

    def first_pass(self, closure: Closure, groups: list[ParamGroup], *, averages: bool = False) -> Closure:
        """The closure of a first pass: with a local ascent without averaging, and checked. ``averages``: see :meth:`averaging`."""

        def called() -> Any:
            with self.without_averaging(), self.averaging() if averages else nullcontext():
                loss = closure()
            self.check_first_pass(groups)
            return loss

        return called

    def index_of(self, micro_batch: int, count: int) -> int:
        """The place of this rank's micro-batch among those of all ranks, for what is drawn by it: rank by rank, ``count`` each."""
        if not self._averaging or not self._replicated:
            return micro_batch
        return distributed.get_rank(self._replicated[0].process_group) * count + micro_batch

    def index_of_call(self, made: int) -> int:
        """The place of this rank's call of ``backward`` among those of all ranks, where ``made`` calls came before in the step."""
        if not self._averaging or not self._replicated:
            return made
        group = self._replicated[0].process_group
        return made * distributed.get_world_size(group) + distributed.get_rank(group)

    def check_two_steps(self) -> None:
        """Before a first pass that the caller makes. Raises RuntimeError where its gradient cannot be that of a local ascent."""

    def check_first_pass(self, groups: list[ParamGroup]) -> None:
        """After the first pass. Raises RuntimeError where its gradient is averaged and should not be, or the other way round, and that
        would make another step, or replicas that drift apart. ``DistributedDataParallel`` notes how its last forward pass ran."""
        if not self._replicated or self._direction.first_gradient is FirstGradient.NONE:
            return
        averaged = [module.require_forward_param_sync for module in self._replicated]
        if self._averaging and all(averaged):
            raise RuntimeError(
                "SAM: local_ascent=True, but the first pass did not run under no_sync(); call the DistributedDataParallel module in the "
                "closure, and in the two-step API put the first forward and backward into `with ddp.no_sync():`"
            )
        uses_gradient = bool(self._direction.keeps) or self._descent.rewrites  # beyond the perturbation, which is undone
        by_hand, self._is_averaged_by_hand = self._is_averaged_by_hand, False
        if not self._averaging and uses_gradient and not all(averaged) and not by_hand:
            part = f"direction {self._direction.name!r}" if not self._descent.rewrites else f"descent {self._descent.name!r}"
            raise RuntimeError(
                f"SAM: {part} needs the gradient of all ranks in the first pass, and the last forward pass of the "
                "DistributedDataParallel module ran under no_sync() or torch.no_grad(); run it outside of both"
            )

    def _local(self, closure: Closure) -> Closure:
        def called() -> Any:
            with self.without_averaging():
                return closure()

        return called if self._averaging else closure

    def _last(self, closure: Closure, mean: GradientMean | None, groups: list[ParamGroup]) -> Closure:
        if not isinstance(mean, RankMean):
            return closure
        rank_mean = mean

        def called() -> Any:
            with rank_mean.carried_by_the_next_backward(groups):
                return closure()

        return called

    # --- what the ranks agree on ---

    def agree(self, found_inf: Tensor) -> None:  # ()
        """Sets ``found_inf`` where it is set on any rank: the replicas skip a step together. 4 bytes."""
        if self._replicated:
            self._check_usable()
            distributed.all_reduce(found_inf, op=distributed.ReduceOp.MAX, group=self._replicated[0].process_group)

    def mean_loss(self, loss: Any, device: torch.device) -> Any:  # () float64
        """The mean of the ranks' losses, for radii and step sizes that follow it: with averaged gradients each rank would have one of its
        own. With a local ascent, or where the loss is no number, it is returned as it is."""
        if not self._replicated or self._averaging:
            return loss
        self._check_usable()
        group = self._replicated[0].process_group

        def sum_over_ranks(sums: Tensor) -> Tensor:
            distributed.all_reduce(sums, group=group)
            return sums

        mean = mean_of_ranks(loss_value(loss, device), device, distributed.get_world_size(group), sum_over_ranks)
        return loss if mean is None else mean

    # --- what is refused ---

    def _check_can_ascend_locally(self, model: Any) -> None:
        if not self._replicated:
            raise ValueError(
                f"SAM: local_ascent=True needs a DistributedDataParallel module, or one of fully_shard on a mesh (replicate, shard), got "
                f"model={_type_names(model)}; write SAM(ddp.parameters(), ..., model=ddp, local_ascent=True) with "
                "ddp = DistributedDataParallel(module)"
            )
        if not distributed.is_initialized():
            raise ValueError("SAM: local_ascent=True needs a process group; call torch.distributed.init_process_group first")

    def _check_one_group(self) -> None:
        if len(self._replicated) < 2:
            return
        ranks = {tuple(distributed.get_process_group_ranks(module.process_group)) for module in self._replicated}
        if len(ranks) > 1:
            raise ValueError(
                f"SAM: the modules in model= are replicated over different ranks, {sorted(map(list, ranks))}; replicas agree on a skipped "
                "step over one process group: make one optimizer for the modules of each"
            )

    def _check_parts(self) -> None:
        """Refuses parts that would make an update, or a checkpoint, from numbers of one rank. SAM refuses the same parts for several
        micro-batches: with a local ascent, the ranks are micro-batches."""
        if self._descent.rewrites:
            raise ValueError(
                f"SAM: a local ascent with descent {self._descent.name!r}: the update would depend on the rank's own first pass, and the "
                "replicas would drift apart; use the plain descent, or leave local_ascent out"
            )
        if self._direction.first_gradient is FirstGradient.NONE:
            raise ValueError(
                f"SAM: a local ascent with direction {self._direction.name!r}: it takes no gradient before the ascent, so all ranks "
                "perturb alike; leave local_ascent out"
            )
        if self._direction.keeps:
            raise ValueError(
                f"SAM: a local ascent with direction {self._direction.name!r}: every rank would keep an average of its own, of which a "
                "checkpoint holds one; use a direction that keeps nothing, or leave local_ascent out"
            )

    def _check_usable(self) -> None:
        if not distributed.is_initialized():
            raise RuntimeError(GROUP_IS_GONE)
        if any(module._join_config.enable for module in self._replicated):
            raise RuntimeError(
                "SAM: DistributedDataParallel.join() is not supported: a rank without inputs makes no step, and the others would wait for "
                "its part in the agreement; give every rank the same number of batches (DistributedSampler does)"
            )
        self._check_static_graph()

    def _check_hooks(self) -> None:
        if any(module._comm_hooks for module in self._replicated):
            raise ValueError(
                "SAM: freeze_unperturbed=True with a communication hook of DistributedDataParallel: the gradient of the ascent is averaged "
                "without it; use local_ascent=True, leave the hook out, or leave freeze_unperturbed out"
            )

    def _check_static_graph(self) -> None:
        if self._freezes and any(module.static_graph for module in self._replicated):
            raise ValueError(
                "SAM: freeze_unperturbed=True with DistributedDataParallel(static_graph=True): the two passes of a step have different "
                "graphs; leave static_graph out"
            )
        if self._averaging and any(module.static_graph for module in self._replicated):
            raise ValueError(
                "SAM: a local ascent with DistributedDataParallel(static_graph=True): torch then averages wrongly, without an error, where "
                "some backward passes run under no_sync(); leave static_graph out (find_unused_parameters=True is supported)"
            )


def is_blank(groups: Sequence[ParamGroup]) -> bool:
    """Whether a plain step with these groups has lr = 0. ``torch.distributed.checkpoint`` makes such a step for the state that it is to
    fill, perhaps on one rank alone, which must not wait for the others."""
    rates = [group["lr"] for group in groups if "lr" in group]
    return bool(rates) and all((not isinstance(rate, Tensor) or rate.is_cpu) and float(rate) == 0.0 for rate in rates)


def replicated_modules(model: nn.Module | Sequence[nn.Module] | None) -> list[DistributedDataParallel]:
    """The ``DistributedDataParallel`` modules, inside of wrappers such as torch.compile's too."""
    return _found(model)[0]


def modules_of(model: nn.Module | Sequence[nn.Module] | None) -> list[nn.Module]:
    """The modules of an optimizer's ``model`` argument."""
    if model is None:
        return []
    return [model] if isinstance(model, nn.Module) else list(model)


def _found(model: nn.Module | Sequence[nn.Module] | None) -> tuple[list[DistributedDataParallel], list[nn.Module]]:
    """The ``DistributedDataParallel`` modules, inside of wrappers such as torch.compile's too; and others that have ``no_sync``."""
    replicated, others = [], []
    for module in modules_of(model):
        inner = [each for each in module.modules() if isinstance(each, DistributedDataParallel)]
        replicated += inner
        if not inner and callable(getattr(module, "no_sync", None)):
            others.append(module)
    return replicated, others


def _type_names(model: Any) -> str:
    if model is None or isinstance(model, nn.Module):
        return "None" if model is None else type(model).__name__
    return f"[{', '.join(type(module).__name__ for module in model)}]"
