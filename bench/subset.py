"""``python -m bench.subset``: a whole training step of SAM on a part of the parameters, over a step of the base optimizer.

Forward and backward passes are included. Steps of all providers take turns in one process, each with a model of its own; the ratio is the
median of the ratios of each round. With one thread, times are the thread's own on a processor, so that other processes count less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter_ns, thread_time_ns
from typing import Any

import click
import torch
from rich.table import Table
from torch import nn

from bench import options
from bench.command import begin, write
from bench.environment import environment
from bench.per_sample.models import MODELS, make_problem
from bench.providers import BASES, RHO
from bench.timing import interleave, quantiles
from sam_kernels import SAM, last_layers, norm_layers

__all__ = ["BAR", "FROZEN_NORMS", "PROVIDERS", "bars", "main", "measure"]

BASE, FROZEN_NORMS = "base", "SAM, norm layers, frozen"
LR = 1e-6  # so small that every step is the same step
BAR = 1.75  # times a base step
Groups = Callable[[nn.Module], Any]
PROVIDERS: dict[str, tuple[Groups, bool]] = {  # parameter groups, and freeze_unperturbed
    "SAM": (lambda model: model.parameters(), False),
    "SAM, norm layers": (norm_layers, False),
    FROZEN_NORMS: (norm_layers, True),
    "SAM, last:1, frozen": (partial(last_layers, k=1), True),
}


def _step(model_name: str, batch: int | None, provider: str) -> Callable[[], object]:
    problem, base = make_problem(model_name, batch), BASES["sgd"]
    kwargs = {**base.kwargs, "lr": LR}
    optimizer: Any
    if provider == BASE:
        optimizer = base.optimizer(problem.model.parameters(), **kwargs, fused=True)
    else:
        groups, freezes = PROVIDERS[provider]
        optimizer = SAM(groups(problem.model), base.optimizer, rho=RHO, model=problem.model, freeze_unperturbed=freezes, **kwargs)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = problem.losses().mean()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's own is untyped
        return loss

    return partial(optimizer.step, closure)


def measure(model_name: str, *, rounds: int, batch: int | None = None) -> dict[str, Any]:
    """Milliseconds of a training step of each, and the median of their ratios to the base's."""
    calls = {provider: _step(model_name, batch, provider) for provider in (BASE, *PROVIDERS)}
    clock = thread_time_ns if torch.get_num_threads() == 1 else perf_counter_ns
    samples = interleave(calls, rounds=rounds, warmup=2, clock=clock)
    found = {provider: quantiles(each) for provider, each in samples.items()}
    return {
        "model": model_name,
        "batch": MODELS[model_name].batch if batch is None else batch,
        "threads": torch.get_num_threads(),
        "ms": {provider: [each.ms_20, each.ms_50, each.ms_80] for provider, each in found.items()},
        "of_base": {
            provider: round(median(ours / base for ours, base in zip(each, samples[BASE], strict=True)), 3)
            for provider, each in samples.items()
        },
    }


def bars(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line a model: the ratio to reach, the ratio measured, pass or FAIL."""
    found = [(row["model"], row["of_base"][FROZEN_NORMS]) for row in rows]
    return [f"{model}: at most {BAR} base steps: {ratio:.2f}: {'pass' if ratio <= BAR else 'FAIL'}" for model, ratio in found]


@options.command
@options.names("--models", known=[name for name in MODELS if name != "mlp"], help="Models; the MLP has no normalisation layers.")
@click.option("--batch", type=click.IntRange(min=1), help="Samples in a batch. Default: the model's.")
@click.option("--rounds", type=click.IntRange(min=1), default=15, show_default=True, help="Steps of each.")
@options.threads("Threads of torch. Default: torch's.")
@options.store("subset")
@options.JSON
def main(models: Sequence[str], batch: int | None, rounds: int, threads: int | None, store: bool, json_path: Path | None) -> None:
    """Compare training steps of SAM on a part of the parameters with steps of the base optimizer."""
    console = begin(threads)
    table = Table("model", "batch", *(f"{provider}, ms" if provider == BASE else f"{provider}, of base" for provider in (BASE, *PROVIDERS)))
    rows = []
    for name in models:
        row = measure(name, rounds=rounds, batch=batch)
        rows.append(row)
        ratios = [f"{row['of_base'][provider]:.2f}" for provider in PROVIDERS]
        table.add_row(name, str(row["batch"]), f"{row['ms'][BASE][1]:.1f}", *ratios)
    console.print(table)
    for line in bars(rows):
        console.print(line, highlight=False)
    write({**environment(), "gate": "skipped", "rows": rows}, json_path, "subset" if store else None)


if __name__ == "__main__":
    main()
