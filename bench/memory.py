"""Bytes a provider needs beyond parameters, gradients and the base optimizer's state: held between steps, and at the peak of one.

Run as ``python -m bench.memory PROVIDER WORKLOAD DTYPE BASE``, one process each and with freed blocks handed back to the system at once,
so that the resident set tells what is in use.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.allocator import variables
from bench.providers import BASES, PROVIDERS, Base, Stepper
from bench.workloads import DTYPES, WORKLOADS, Workload, make_grads, make_params

__all__ = ["held_bytes", "measure", "reachable_tensors", "resident_rise"]

TIME_LIMIT = 600  # seconds
AT_A_TIME = 2


def reachable_tensors(root: object) -> Iterator[Tensor]:
    """Tensors that an optimizer holds, through attributes and containers of this library's and its peers' making."""
    seen: set[int] = set()
    pending = [root]
    while pending:
        item = pending.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
            if item.grad is not None:
                pending.append(item.grad)
        elif isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set | frozenset):
            pending += item
        elif hasattr(item, "__dict__") and not isinstance(item, type) and not callable(item):
            pending += vars(item).values()
        elif hasattr(item, "__slots__"):
            pending += [getattr(item, name) for name in item.__slots__ if hasattr(item, name)]


def held_bytes(stepper: Stepper, params: Sequence[torch.nn.Parameter], base: Base) -> int:
    """Storage held that is neither a parameter, nor a gradient, nor the base's state (one list for each of its keys)."""
    expected = {tensor.untyped_storage().data_ptr() for p in params for tensor in (p, p.grad) if tensor is not None}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in reachable_tensors(stepper)}
    total = sum(nbytes for pointer, nbytes in storages.items() if pointer not in expected)
    state = sum(p.numel() * p.element_size() for p in params) * sum(key != "step" for key in base.state_keys)
    steps = 4 * len(params) if "step" in base.state_keys else 0
    return max(0, total - state - steps)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def resident_rise(run: Callable[[], object]) -> int | None:
    """How far the resident set rises during a run. None where the system does not let us reset its high-water mark."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, KeyError):
        return None


def _transient_bytes(stepper: Stepper) -> int | None:
    def step() -> None:
        stepper.first_step()
        stepper.second_step()

    return resident_rise(step)


def _measure_here(provider: str, workload: str, dtype: str, base_name: str) -> dict[str, Any]:
    base = BASES[base_name]
    params = make_params(make_grads(WORKLOADS[workload].shapes, DTYPES[dtype]))
    stepper = PROVIDERS[provider].make(params, base)
    for _ in range(3):
        stepper.first_step()
        stepper.second_step()
    held = held_bytes(stepper, params, base)
    transient = _transient_bytes(stepper)
    return {"held_bytes": held, "peak_bytes": None if transient is None else held + transient}


def measure(workload: Workload, base: str, dtype: str, names: Sequence[str], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yield a row for each provider that runs here. Two processes run at a time: nothing is timed."""
    present = [name for name in names if PROVIDERS[name].missing(workload.n_tensors) is None]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for name, found in zip(present, pool.map(lambda name: _in_a_process(name, workload.name, dtype, base), present), strict=True):
            if isinstance(found, str):
                say(f"skipped memory of {name}: {found}")
                continue
            row = {"kind": "memory", "op": "step", "workload": workload.name, "dtype": dtype, "base": base, "backend": name}
            yield {**row, "n_tensors": workload.n_tensors, "numel": workload.numel, **found}


def _in_a_process(*arguments: str) -> dict[str, Any] | str:
    """Return the bytes, or the error that kept them from being measured."""
    command = [sys.executable, "-m", "bench.memory", *arguments]
    root = Path(__file__).parent.parent
    try:
        result = subprocess.run(
            command, cwd=root, env=variables("returning"), capture_output=True, text=True, timeout=TIME_LIMIT, check=True
        )
        found: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    except (subprocess.SubprocessError, json.JSONDecodeError, IndexError) as error:
        return type(error).__name__
    return found


if __name__ == "__main__":
    print(json.dumps(_measure_here(*sys.argv[1:5])))
