"""The map of RW-SAM: how radii and β are chosen, what is run once, verdicts, and the covariance of gradients."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

import numpy as np
import pytest
import torch

from bench.papers.msharpness import verdict
from bench.papers.sharpness_runs import IN_TIME, METHODS, Budget, Job, Scene, covariance, runs_of_scene
from sam_kernels.cli.train.model import small_cnn

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_job_is_json() -> None:
    job = Job(Scene("group", 0.4), METHODS[4], 0.1, 0.5, 1, 0, held_out=True)
    assert Job.of(json.loads(json.dumps(asdict(job)))) == job


def test_a_verdict_needs_two_standard_errors() -> None:
    spread = np.array([-1.0, 1.0, -1.0, 1.0])  # a standard error of 0.577
    assert [verdict(mean + spread) for mean in (1.2, 1.1, 0.0, -1.1, -1.2)] == ["ahead", "level", "level", "level", "behind"]
    assert verdict(np.zeros(4)) == "level"


def test_what_is_chosen_on_held_out_images_is_scored_on_others() -> None:
    scene, budget = Scene("group", 0.4), Budget(epochs=8, radii=(0.1, 0.2), tuning=1, evaluation=2)
    made: list[Job] = []

    def runner(jobs: Iterable[Job]) -> list[dict[str, float]]:
        made.extend(given := list(jobs))
        return [{"accuracy": 10 * job.rho + job.beta + job.seed, "variance": 1.0, "mean_square": 2.0} for job in given]

    found = runs_of_scene(scene, budget, runner, {method.title: 2.0 for method in METHODS})
    assert all(job.held_out == (job.seed == 0) for job in made)
    assert (found["RW-SAM, β > 0"].rho, found["RW-SAM, β > 0"].beta) == (0.2, 1.5)
    assert (found["RW-SAM, β < 0"].beta, found["SAM"].beta, found["SGD"].rho) == (-0.5, None, None)
    assert found["SAM"].accuracy.tolist() == [3.0, 4.0]  # of seeds 1 and 2
    assert (found[IN_TIME].method, found[IN_TIME].epochs, found["SAM"].epochs) == ("RW-SAM, β > 0", 4, 8)


def test_the_covariance_is_that_of_single_gradients() -> None:
    torch.manual_seed(0)
    model, images, labels = small_cnn(8, normalization="none").double(), torch.randn(5, 1, 8, 8, dtype=torch.float64), torch.arange(5)
    grads = []
    for i in range(5):
        loss = torch.nn.functional.cross_entropy(model(images[i : i + 1]), labels[i : i + 1])
        grads.append(torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))]))
    each = torch.stack(grads)
    found = covariance(model, images, labels)
    assert found["variance"] == pytest.approx((each - each.mean(0)).square().sum(1).mean().item(), rel=1e-9)
    assert found["mean_square"] == pytest.approx(each.mean(0).square().sum().item(), rel=1e-9)
