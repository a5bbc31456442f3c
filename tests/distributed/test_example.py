"""The example over shards, as a reader runs it: a run that is resumed on other ranks ends as one that was not interrupted."""

from __future__ import annotations

import io
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

from torch import distributed

from tests.helpers.ranks import on_ranks, one_at_a_time

pytestmark = one_at_a_time
ROOT = Path(__file__).parents[2]
EXAMPLE = "examples/fsdp2_gpt.py"


def launched(*arguments: str, ranks: int) -> str:
    """What is printed of the command that the example's docstring has."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launcher, EXAMPLE, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=240)
    # The last line. torch aborts a rank now and then as it exits, with gloo, after all has been printed: no test of this repository's.
    assert "ranks, 0 skipped" in done.stdout, done.stderr
    return done.stdout


def _main(rank: int, *arguments: str) -> str:
    """The same in a process that has its group already."""
    printed = io.StringIO()
    main = runpy.run_path(str(ROOT / EXAMPLE))["main"]
    with redirect_stdout(printed), mock.patch.multiple(distributed, init_process_group=mock.DEFAULT, destroy_process_group=mock.DEFAULT):
        main.main([*arguments], standalone_mode=False)
    return printed.getvalue()


def losses(printed: str) -> dict[int, str]:
    """The loss of each step that is printed."""
    return {int(step): loss for step, loss in re.findall(r"step (\d+): loss (\S+)", printed)}


def test_a_resumed_run_is_that_of_one_without_a_break(tmp_path: Path) -> None:
    """Whole and saved by ranks of the tests, resumed by the launcher, and by one rank alone."""
    folder = ("--checkpoints", str(tmp_path / "checkpoints"))
    whole = losses(on_ranks(_main, tmp_path / "whole", "--steps", "4")[0])
    assert float(whole[3]) < float(whole[0])
    assert losses(on_ranks(_main, tmp_path / "saved", "--steps", "2", *folder)[0]).keys() == {0, 1}
    resumed = losses(launched("--steps", "4", *folder, ranks=2))
    assert resumed == {step: loss for step, loss in whole.items() if step >= 2}  # to the last digit printed
    alone = on_ranks(_main, tmp_path / "alone", "--steps", "5", *folder, ranks=1)
    assert losses(alone[0]).keys() == {4}  # from two ranks' checkpoint
