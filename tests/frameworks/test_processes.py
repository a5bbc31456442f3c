"""``SAMTrainer`` and ``accelerate`` on two processes: the step of one process with the batches of both, on equal replicas."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.frameworks.conftest import Compared
from tests.frameworks.formula import LR, RHO, STEPS, by_formula, error_of, reweighted
from tests.frameworks.hugging_face import batches, gpt2, loss_of, micro_batches_of, net, token_loss
from tests.frameworks.processes import BETA, LOOPS, RANKS, TRAINERS, in_trainers_and_loops, losses_of
from tests.helpers.ranks import on_ranks, one_at_a_time

pytest.importorskip("sam_kernels.integrations.transformers")
pytestmark = one_at_a_time
Pieces = tuple[Any, ...]  # of one micro-batch, a piece of each rank


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("processes")
    return on_ranks(in_trainers_and_loops, folder / "ranks", folder, ranks=RANKS, timeout=600.0)


def with_weights(model: nn.Module, weights: list[Tensor]) -> nn.Module:
    with torch.no_grad():
        for param, value in zip(model.parameters(), weights, strict=True):
            param.copy_(value)
    return model


def assert_equal_replicas(found: list[dict[str, Any]], name: str) -> list[Tensor]:
    left, right = (each[name]["weights"] for each in found)
    assert all(map(torch.equal, left, right))
    assert [each[name]["wrapped"] for each in found] == ["DistributedDataParallel"] * RANKS
    return left


def arranged(steps: list[list[Pieces]], *, is_local: bool) -> list[list[Pieces]]:
    """With a local ascent each rank's piece is a micro-batch of its own."""
    return [[(piece,) for pieces in step for piece in pieces] for step in steps] if is_local else steps


def name_of(name: str) -> str:
    """Of the algorithm that one process would run."""
    kind = "RW-SAM" if "RW-SAM" in name else "SAM"
    many = "accumul" in name or "local" in name or name in ("radius of the loss", "RW-SAM")
    return f"{kind} on 2 processes" if not many or kind == "RW-SAM" else "m-SAM on 2 processes"


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers(found: list[dict[str, Any]], name: str, compared: Compared) -> None:
    sam, _ = TRAINERS[name]
    model, expected = with_weights(gpt2(), assert_equal_replicas(found, f"trainer: {name}")), gpt2()
    of_ranks = [each[f"trainer: {name}"] for each in found]
    assert of_ranks[0]["counts"] == of_ranks[1]["counts"]  # of the tokens of both
    assert not torch.equal(of_ranks[0]["seen"][0][0]["input_ids"], of_ranks[1]["seen"][0][0]["input_ids"])
    steps = [list(zip(*step, strict=True)) for step in zip(*(each["seen"] for each in of_ranks), strict=True)]
    steps = arranged(steps, is_local=sam.get("local_ascent", False))
    base = torch.optim.SGD(expected.parameters(), lr=LR)
    if "beta" in sam:

        def losses(model: Any, pieces: Pieces) -> Tensor:
            ids, labels = (torch.cat([piece[key] for piece in pieces]) for key in ("input_ids", "labels"))
            logits = model(input_ids=ids).logits[:, :-1].transpose(1, 2)
            each = F.cross_entropy(logits, labels[:, 1:], reduction="none", ignore_index=-100)
            return each.sum(1) / (labels[:, 1:] != -100).sum(1)

        reweighted(expected, base, steps, losses, beta=BETA)
    else:

        def loss(model: nn.Module, pieces: Pieces, i: int) -> Tensor:
            return torch.stack([token_loss(model, piece, of_ranks[0]["counts"][i]) for piece in pieces]).sum()

        by_formula(expected, base, steps, loss, whole=False, clip=0.0, lambd=sam.get("lambd", 1.0))
    compared("transformers", name_of(name), f"Trainer, DDP: {name}", error_of(model, expected), 1e-12 if "beta" in sam else 1e-5)


@pytest.mark.parametrize("name", LOOPS)
def test_loops_of_accelerate(found: list[dict[str, Any]], name: str, compared: Compared) -> None:
    accumulation, options = LOOPS[name]
    model, expected = with_weights(net(), assert_equal_replicas(found, f"loop: {name}")), net()
    micro_batches = list(zip(*(batches(STEPS * accumulation, rank) for rank in range(RANKS)), strict=True))
    steps = arranged(micro_batches_of(micro_batches, accumulation), is_local=name == "local ascent")
    base = torch.optim.SGD(expected.parameters(), lr=LR, momentum=0.9)
    if "beta" in options:
        reweighted(expected, base, steps, lambda m, pieces: torch.cat([losses_of(m, piece) for piece in pieces]), beta=BETA)
    else:

        def loss(model: nn.Module, pieces: Pieces, i: int) -> Tensor:
            return torch.stack([loss_of(model, piece) for piece in pieces]).sum() / (RANKS * accumulation)

        rho = (lambda share: RHO * accumulation * share) if name == "radius of the loss" else None
        by_formula(expected, base, steps, loss, whole=name == "two rounds", clip=0.0, rho=rho)
    compared("accelerate", name_of(name), f"DDP: {name}", error_of(model, expected), 1e-12)


@pytest.mark.parametrize("name", ["SAM, accumulation", "RW-SAM"])
def test_a_trainer_is_resumed_bit_for_bit(found: list[dict[str, Any]], name: str, compared: Compared) -> None:
    whole, *others = chain.from_iterable(each[f"resumed: {name}"] for each in found)
    same = all(torch.equal(*pair) for other in others for pair in zip(whole, other, strict=True))
    compared("transformers", name_of(name), f"Trainer, DDP: resumed after 3 of {STEPS} steps", 0.0 if same else 1.0, 0.0)


def test_an_ascent_that_is_not_finite_on_one_rank_is_skipped_on_both(found: list[dict[str, Any]]) -> None:
    assert [each["one rank is not finite"] for each in found] == [(True, 512.0, True)] * RANKS


def test_one_perturbation_for_the_accumulated_batch_is_refused(found: list[dict[str, Any]]) -> None:
    for each in found:
        assert each["ascent='batch'"].startswith("ValueError: SAMTrainer: ascent='batch' accumulates the first gradients")
        assert "gradient_accumulation_steps=1" in each["ascent='batch'"]


SCRIPT = """
import tests.frameworks.hugging_face as problem
import sys, torch
from sam_kernels.integrations.transformers import SAMTrainer
folder = sys.argv[1]
args = problem.arguments(folder, gradient_accumulation_steps=2)
trainer = SAMTrainer(problem.gpt2(), args, train_dataset=problem.texts(96), sam={"rho": 0.05})
trainer.train()
torch.save([param.detach() for param in trainer.model.parameters()], f"{folder}/{args.process_index}.pt")
"""


def test_torchrun_makes_the_same_run(found: list[dict[str, Any]], tmp_path: Path) -> None:
    """A script, as users start it."""
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    root = str(Path(__file__).parents[2])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    command = [*launcher, str(tmp_path / "script.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    expected = found[0]["trainer: SAM, accumulation"]["weights"]
    for rank in range(RANKS):
        assert all(map(torch.equal, torch.load(tmp_path / f"{rank}.pt"), expected))
