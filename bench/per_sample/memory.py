"""How far the resident set rises during one run: ``python -m bench.per_sample.memory MODEL PROVIDER``, a process each.

Freed blocks are handed back to the system at once, so that the resident set tells what is in use.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from bench.allocator import variables
from bench.memory import resident_rise
from bench.per_sample.models import make_problem
from bench.per_sample.providers import PROVIDERS

__all__ = ["peak_bytes"]

TIME_LIMIT = 600


def peak_bytes(model: str, provider: str) -> int | None:
    """None where the system does not tell."""
    command = [sys.executable, "-W", "ignore", "-m", "bench.per_sample.memory", model, provider]
    env = variables("returning")
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=TIME_LIMIT, check=True)
    found: int | None = json.loads(result.stdout.strip().splitlines()[-1])
    return found


def _measure_here(model: str, provider: str) -> int | None:
    problem = make_problem(model)
    run = PROVIDERS[provider].make(problem)
    run()  # what is allocated once
    problem.model.zero_grad()
    return resident_rise(run)


if __name__ == "__main__":
    print(json.dumps(_measure_here(*sys.argv[1:3])))
