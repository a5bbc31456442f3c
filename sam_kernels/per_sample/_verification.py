"""``unsupported="verify"``: gradients by rules beside those of a backward pass for each sample, once for each kind of call."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sam_kernels._memory_of import is_fake
from sam_kernels._sharding import is_dtensor
from sam_kernels._tensor_list import arithmetic_dtype
from sam_kernels.per_sample._call import Call
from sam_kernels.per_sample._gathered import Gathered
from sam_kernels.per_sample._graph import edges_of
from sam_kernels.per_sample._graph_reads import Read
from sam_kernels.per_sample._node_rules import BATCH_NORMS
from sam_kernels.per_sample._terms import shape_of

__all__ = ["Ledger", "Verification"]

_MIXED = (
    "but the gradient of the whole batch is right: a loss depends on other samples than its own, or rows change places, in the model or by "
    'a rule. Such losses have no gradients of samples; with unsupported="error" norms are of contributions to the gradient of the batch'
)
_TRIES = 3  # batches in which a call is compared whose gradient is zero, as that of a low-rank factor is at first


class Ledger(Gathered):
    """Terms of all parameters, kept, and the squared norms of each parameter by itself."""

    _gathers_small = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.square_norms_of: dict[int, Tensor] = {}  # (M,) float64, by the id of a parameter that is counted

    def _take_together(self, call: Any, terms: Any) -> bool:
        return False

    def _close(self, param: nn.Parameter) -> None:
        total, self._square_norms = self._square_norms, {}
        super()._close(param)
        own, self._square_norms = self._square_norms, total
        for device, square_norms in own.items():
            self._square_norms_on(device).add_(square_norms)
            if self.counts(param):
                self.square_norms_of[id(param)] = square_norms

    def weighted_of(self, weights: Tensor) -> dict[int, Tensor]:  # (M,)
        """The weighted gradients by the ids of the parameters. The terms stay."""
        found: dict[int, Tensor] = {}
        for param, place, term in self._kept:
            made = term.weighted(weights.to(param.device), shape_of(param, place))
            if place is None:
                found[id(param)] = made
            else:
                found.setdefault(id(param), torch.zeros_like(param, dtype=made.dtype))[slice(*place)] += made
        return found


@dataclass(frozen=True)
class _Bar:
    """How far roundings go: a part of the larger norm, and a part of the norm of the whole gradient, for gradients that are zero but for
    rounding (the bias of keys in an attention)."""

    relative: float
    floor: float


# Some modules compute in float32 whatever they are given; convolutions of devices multiply float32 with the digits of TF32.
_FLOAT64, _FLOAT32, _DEVICE, _HALF = _Bar(1e-4, 1e-6), _Bar(1e-3, 1e-5), _Bar(1e-2, 1e-4), _Bar(0.1, 1e-2)


class Verification:
    """Which kinds of calls are known to be right."""

    def __init__(self) -> None:
        self._left: dict[Hashable, int] = {}  # batches to compare still

    def is_due(self, losses: Tensor, calls: Sequence[Call]) -> bool:
        return any(self._left.get(call.kind, _TRIES) > 0 for call in calls) and not is_fake(losses)

    def check(self, losses: Tensor, calls: Sequence[Call], params: Iterable[tuple[str, nn.Parameter]], ledger: Ledger) -> None:
        """Compare norms, parameter by parameter and sample by sample (or micro-batch), and one randomly weighted gradient.

        A backward pass for each, through the graph of ``losses``, so that random numbers are the same; one sample's gradient is in memory
        at a time. Where layers take statistics from the batch, a sample's contribution is no gradient of its loss: then the batch's
        gradient is compared alone.

        Raises RuntimeError where a parameter is off, and while a CUDA graph is captured; NotImplementedError over shards.
        """
        named: dict[int, tuple[str, nn.Parameter]] = {}
        for name, param in params:
            named.setdefault(id(param), (name, param))
        if any(is_dtensor(param) for _, param in named.values()):
            raise NotImplementedError(
                'GradNorms: unsupported="verify" is not for shards, whose ranks may have batches of different sizes: verify the model in '
                'one process, and pass unsupported="error" over shards'
            )
        if losses.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                'GradNorms: unsupported="verify" reads numbers, which a CUDA graph cannot: run such a step before the capture'
            )
        takes_statistics, bar = _look_at(losses)
        comparison = _Comparison(losses, list(named.values()), ledger, bar)
        off = comparison.of_the_batch() if takes_statistics else comparison.of_samples()
        if off is not None:
            name, param, how = off
            mine = [call for call in calls if any(each is param for each in call.params.values())]
            where = " and ".join(sorted({_named(call, param) for call in mine})) or name
            mixed = not takes_statistics and comparison.of_the_batch() is None
            raise RuntimeError(f'GradNorms(unsupported="verify"): {where}: {how}; {_MIXED if mixed else _cure(mine)}')
        for call in calls:
            seen = comparison.is_finite and all(id(param) in comparison.nonzero for param in call.params.values())
            self._left[call.kind] = 0 if seen else max(0, self._left.get(call.kind, _TRIES) - 1)


class _Comparison:
    def __init__(self, losses: Tensor, params: list[tuple[str, nn.Parameter]], ledger: Ledger, bar: _Bar) -> None:
        self._losses, self._names, self._params = losses, [name for name, _ in params], [param for _, param in params]
        self._ledger, self._m, self._bar = ledger, ledger.m, bar
        self.is_finite = True
        self.nonzero: set[int] = set()  # ids of the parameters whose gradients were some numbers other than zero

    def of_samples(self) -> tuple[str, nn.Parameter, str] | None:
        """The name of the parameter that is off most, the parameter, and by how much."""
        m = self._m
        weights = torch.rand(m, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
        weights[1::2] *= -1.0
        sums: list[Tensor | None] = [None] * len(self._params)
        own = torch.zeros(m, len(self._params), dtype=torch.float64)
        for i, seed in enumerate(self._seeds()):
            grads = self._grads(seed)
            own[i] = _norms(grads)
            for j, grad in enumerate(grads):
                if grad is not None:
                    weighted, sum_so_far = grad.to(arithmetic_dtype((grad,))) * weights[i].item(), sums[j]
                    sums[j] = weighted if sum_so_far is None else sum_so_far.add_(weighted)
        total = own.square().sum(1, keepdim=True).sqrt()
        self.is_finite = bool(total.isfinite().all())
        by_rules = own.new_zeros(own.shape)
        for j, param in enumerate(self._params):
            counted = self._ledger.square_norms_of.get(id(param))
            if counted is not None:
                by_rules[:, j] = counted.cpu().sqrt()
            elif not self._ledger.counts(param):  # its norm was not asked for
                by_rules[:, j] = own[:, j]
        self.nonzero = {id(param) for j, param in enumerate(self._params) if bool((own[:, j] > 0).any())}
        excess = (by_rules - own).abs() - self._bar.relative * torch.maximum(by_rules, own) - self._bar.floor * total
        ratio = (by_rules - own).abs() / torch.maximum(by_rules, own)
        ratio = torch.where((excess > 0) & ratio.isfinite(), ratio, 0.0)  # numbers that are not finite cannot be compared
        if bool((ratio > 0).any()):
            i, j = divmod(int(ratio.argmax()), len(self._params))
            size = len(self._losses) // m
            of = f"losses[{i}]" if size == 1 else f"losses[{i * size}:{(i + 1) * size}]"
            how = f"the norm of its gradient of {of} is {by_rules[i, j]:.4g}, and by a backward pass of these alone {own[i, j]:.4g}"
            return self._names[j], self._params[j], f"{how} (off by {100 * ratio[i, j]:.2g} % of the larger)"
        squares = weights.square()
        scales = (squares.unsqueeze(1) * own.square()).sum(0).sqrt()
        return self._of_sums(self._ledger.weighted_of(weights), sums, scales, "a weighted sum of its gradients")

    def of_the_batch(self) -> tuple[str, nn.Parameter, str] | None:
        grads = self._grads(torch.ones_like(self._losses))
        scales = _norms(grads)
        self.is_finite = bool(scales.isfinite().all())
        self.nonzero = {id(param) for j, param in enumerate(self._params) if scales[j] > 0}
        ones = torch.ones(self._m, dtype=torch.float64)
        return self._of_sums(self._ledger.weighted_of(ones), grads, scales, "the sum of its gradients over the batch")

    def _of_sums(
        self, by_rules: dict[int, Tensor], sums: Sequence[Tensor | None], scales: Tensor, what: str
    ) -> tuple[str, nn.Parameter, str] | None:
        total, worst, found = scales.square().sum().sqrt(), 0.0, None
        for j, param in enumerate(self._params):
            made, right = by_rules.get(id(param)), sums[j]
            zero = torch.zeros((), dtype=torch.float64, device=param.device)
            difference = ((zero if made is None else made.double()) - (zero if right is None else right.double())).norm().cpu()
            size = torch.maximum(scales[j], zero.cpu() if made is None else made.double().norm().cpu())
            ratio = (difference / size).item()
            if bool(difference > self._bar.relative * size + self._bar.floor * total) and ratio > worst:
                worst = ratio
                found = self._names[j], param, f"{what} differs from that of ordinary backward passes by {100 * ratio:.2g} % of its norm"
        return found

    def _seeds(self) -> Iterable[Tensor]:  # (B,)
        for rows in torch.arange(len(self._losses), device=self._losses.device).chunk(self._m):
            seed = torch.zeros_like(self._losses)
            seed[rows] = 1.0
            yield seed

    def _grads(self, seed: Tensor) -> Sequence[Tensor | None]:
        return torch.autograd.grad(self._losses, self._params, seed, retain_graph=True, allow_unused=True)


def _norms(grads: Sequence[Tensor | None]) -> Tensor:  # (parameters,) float64, on the CPU
    """One transfer for each device."""
    norms = torch.zeros(len(grads), dtype=torch.float64)
    places: dict[torch.device, list[int]] = {}
    for j, grad in enumerate(grads):
        if grad is not None:
            places.setdefault(grad.device, []).append(j)
    for at in places.values():
        norms[at] = torch.stack([torch.linalg.vector_norm(grads[j], dtype=torch.float64) for j in at]).cpu()
    return norms


def _look_at(losses: Tensor) -> tuple[bool, _Bar]:
    """Whether a node takes statistics from the batch, and the bar for the types of the graph's tensors."""
    dtypes, takes_statistics = {losses.dtype}, False
    for _, node in edges_of(losses.grad_fn):
        outputs = getattr(node, "_input_metadata", ())
        dtypes.update(each.dtype for each in outputs)
        name = type(node).__name__
        if name in BATCH_NORMS or name in ("MiopenBatchNormBackward0", "SyncBatchNormBackward"):
            rows = outputs[0].shape[0] if outputs else 0  # one: an instance norm, whose channels are those of all samples
            takes_statistics |= bool(getattr(node, "_saved_training", True)) and rows != 1 and len(losses) > 1
    if any(dtype.is_floating_point and dtype.itemsize < 4 for dtype in dtypes):
        return takes_statistics, _HALF
    if losses.dtype is torch.float64:
        return takes_statistics, _FLOAT64
    return takes_statistics, _FLOAT32 if losses.device.type == "cpu" else _DEVICE


def _cure(calls: Sequence[Call]) -> str:
    """What to write, for calls that have the parameter which is off."""
    cures: list[str] = []
    for call in calls:
        kind = type(call.module).__name__
        if isinstance(call, Read):
            cure = (
                f"its gradients were found in the graph, at {type(call.nodes[0]).__name__}: write a rule with "
                f'@sam_kernels.per_sample.register_rule({kind}), or pass unsupported="vmap"'
            )
        else:
            cure = (
                f"its rule is not what {kind} computes: write one with @sam_kernels.per_sample.register_rule({kind}), or give the class a "
                'forward method of its own, whose parameters are found in the graph, or by unsupported="vmap"'
            )
        if cure not in cures:
            cures.append(cure)
    return "; ".join(cures) or "write a rule for the module that reads it, with @sam_kernels.per_sample.register_rule"


def _named(call: Call, param: nn.Parameter) -> str:
    if isinstance(call, Read):
        return call.name
    return " and ".join(f"{name} of {call.name}" for name, each in call.params.items() if each is param)
