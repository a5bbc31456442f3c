"""Whole steps without forward and backward, every provider on parameters and state of its own: ``first_step`` and ``second_step``, or a
step of m-SAM from closures that only put a gradient in place."""

from __future__ import annotations

import ctypes
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from time import monotonic
from typing import Any, cast

from torch import Tensor

from bench.byte_model import step_bytes
from bench.environment import last_level_cache_bytes
from bench.page import count
from bench.providers import BASES, PROVIDERS, REFERENCE, Base, MicroBatchStepper, Provider, Stepper
from bench.timing import quantiles, quantiles_of_ratios
from bench.turns import Turns, timed_turns
from bench.workloads import DTYPES, Workload, make_grads, make_params

__all__ = ["COMBINATIONS", "MICRO_BATCH_COMBINATIONS", "batches", "measure", "participants", "share"]

Say = Callable[[str], None]

# 16-bit parameters are trained with Adam; SGD there would only repeat the table.
COMBINATIONS = (("sgd", "fp32"), ("adamw", "fp32"), ("adamw", "bf16"))
MICRO_BATCH_COMBINATIONS = (("sgd", "fp32"),)  # the base's share of such a step is small


def share(end: float, left: Sequence[Workload]) -> float:
    """Return the seconds of the first of the rows that are left until ``end``. What earlier rows did not use is for later ones."""
    weights = [3.0 if workload.numel > 50e6 else 1.0 for workload in left]  # a round of the largest takes seconds
    return (end - monotonic()) * weights[0] / sum(weights)


def participants(
    names: Sequence[str], n_tensors: int, say: Say, known: Mapping[str, Provider] = PROVIDERS
) -> tuple[list[Provider], dict[str, str]]:
    """The providers that run here, and the reasons of those that do not, which are also said aloud."""
    missing = {name: reason for name in names if (reason := known[name].missing(n_tensors)) is not None}
    for name, reason in missing.items():
        say(f"skipped {name}: {reason}")
    return [known[name] for name in names if name not in missing], missing


def batches(providers: Sequence[Provider], bytes_each: int, bytes_shared: int, budget: int) -> list[list[Provider]]:
    """Groups that fit into memory together. The reference takes part in every group, so each speed-up is measured within one group."""
    reference = [provider for provider in providers if provider.name == REFERENCE]
    others = [provider for provider in providers if provider.name != REFERENCE]
    room = max(1, (budget - bytes_shared) // bytes_each - len(reference))
    count = max(1, math.ceil(len(others) / room))
    size = math.ceil(len(others) / count) if others else 1
    return [reference + others[i : i + size] for i in range(0, max(1, len(others)), size)]


def _step(stepper: Stepper, params: Sequence[Tensor], grads: Sequence[Tensor], micro_batches: int) -> Callable[[], None]:
    def run() -> None:
        stepper.first_step()
        stepper.second_step()

    def closure() -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad

    return run if micro_batches == 1 else partial(cast(MicroBatchStepper, stepper).micro_batch_step, [closure] * micro_batches)


def _make_turns(providers: Sequence[Provider], base: Base, grads: list[Tensor], say: Say, micro_batches: int) -> Turns:
    """One optimizer of each provider, after its first step. A provider that fails there is left out by name."""
    calls, before = dict[str, Callable[[], object]](), dict[str, Callable[[], object]]()
    for provider in providers:
        own = [grad.clone() for grad in grads] if provider.writes_grads else grads
        params = make_params(own)
        step = _step(provider.make(params, base), params, own, micro_batches)
        try:
            step()  # compiles, where there is something to compile
        except Exception as error:  # a peer that fails here must not take the others' results along
            if provider.name == REFERENCE:
                raise
            say(f"skipped {provider.name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        calls[provider.name] = step
        if provider.writes_grads:  # every step begins as after a backward pass
            before[provider.name] = partial(_put, params, own, grads)
    return Turns(calls, before)


def _put(params: Sequence[Tensor], own: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    for param, mine, grad in zip(params, own, grads, strict=True):
        param.grad = mine.copy_(grad)


def _release_memory() -> None:
    """Between groups: what the last group held must not sit in glibc's free lists beside what the next one allocates."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # not glibc
        return


def measure(
    workload: Workload,
    base_name: str,
    dtype_name: str,
    names: Sequence[str],
    *,
    seconds: float,
    rounds: int | None,
    memory: int,
    say: Say,
    micro_batches: int = 1,
    known: Mapping[str, Provider] = PROVIDERS,
    passes: int | None = None,
    more_lists: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yield rows of the result file. ``over_reference_*``: quantiles of the ratios to ``REFERENCE`` in the same round.

    Args:
        seconds, rounds: as :func:`bench.turns.timed_turns` has them.
        memory: bytes that optimizers measured together may hold.
        micro_batches: > 1: steps of m-SAM, of the providers that take them.
        known, passes, more_lists: the providers of another method than SAM, the lists that a step of it reads and writes, and those that it
            holds beside SAM's.
    """
    base, dtype = BASES[base_name], DTYPES[dtype_name]
    names = [name for name in names if micro_batches == 1 or known[name].takes_micro_batches]
    providers, _ = participants(names, workload.n_tensors, say, known)
    one_list = workload.numel * dtype.itemsize
    held = one_list * (2 + more_lists + (micro_batches > 1) + sum(key != "step" for key in base.state_keys))
    # State is used again at every step, as in training; whether it is still cached then is the workload's size, not our choice.
    regime = "cached" if held + one_list < last_level_cache_bytes() else "memory"
    grads = make_grads(workload.shapes, dtype)
    nbytes = step_bytes(base_name, workload.numel, dtype.itemsize, micro_batches) if passes is None else passes * one_list
    seen_reference = False
    groups = batches(providers, held, 3 * one_list, memory)
    end = monotonic() + seconds
    for number, group in enumerate(groups):
        kind = f"{workload.name} {dtype_name} {base_name}" + (f", {micro_batches} micro-batches" if micro_batches > 1 else "")
        samples = timed_turns(
            partial(_make_turns, group, base, grads, say, micro_batches),
            sets=workload.sets,
            seconds=(end - monotonic()) / (len(groups) - number),
            rounds=rounds,
            settle=1 if regime == "cached" else 0,
        )
        _release_memory()
        say(f"{kind}: {count(len(next(iter(samples.values()), [])), 'round')} of {', '.join(samples)}")
        reference = samples.get(REFERENCE)
        for name, values in samples.items():
            if name == REFERENCE and seen_reference:
                continue
            seen_reference |= name == REFERENCE
            q = quantiles(values)
            over = None if reference is None else quantiles_of_ratios(values, reference)
            yield {
                "kind": "step",
                "op": "step",
                "workload": workload.name,
                "dtype": dtype_name,
                "base": base_name,
                "micro_batches": micro_batches,
                "backend": name,
                "n_tensors": workload.n_tensors,
                "numel": workload.numel,
                "bytes": nbytes,
                "ms_20": q.ms_20,
                "ms_50": q.ms_50,
                "ms_80": q.ms_80,
                "gbps": nbytes / q.ms_50 / 1e6,
                **{f"over_reference_{share}": None if over is None else getattr(over, f"ms_{share}") for share in (20, 50, 80)},
                "samples": len(values),
                "regime": regime,
                "group": number,
                "note": known[name].note,
            }
