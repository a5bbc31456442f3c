"""The federated runs: splits, averages, the server's direction, which images and seeds are used for what."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.papers import federated, federated_runs
from bench.papers.federated import Budget, tune
from bench.papers.federated_runs import Server, average, one_run, split
from sam_kernels import SAM

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = torch.arange(2000) % 10


@pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
def test_a_split_gives_every_image_to_one_client(alpha: float) -> None:
    clients = split(LABELS, 10, alpha, np.random.default_rng(0))
    assert torch.cat(clients).sort().values.tolist() == list(range(2000))
    assert min(map(len, clients)) >= federated_runs.LEAST


def test_a_small_alpha_gives_a_client_few_labels() -> None:
    def largest_share(alpha: float) -> float:
        clients = split(LABELS, 10, alpha, np.random.default_rng(0))
        return float(np.mean([LABELS[client].bincount(minlength=10).max() / len(client) for client in clients]))

    assert largest_share(0.1) > 0.45 > largest_share(1.0) > 0.2 > largest_share(100.0)


def test_an_average_counts_each_client_by_its_images() -> None:
    first, second = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.tensor([5.0, 4.0]), torch.tensor(-1.0)]
    found = average([first, second], [3, 1])
    assert [each.tolist() for each in found] == [[2.0, 2.5], 2.0]


def test_the_server_s_direction_is_the_change_of_the_last_round() -> None:
    """Two steps on sum(a x^4) / 4 in float64: each gradient is that at x + ρ d / ‖d‖, and the closure runs once."""
    generator = torch.Generator().manual_seed(0)
    a, start, change = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(3))
    x = start.clone().requires_grad_()
    optimizer = SAM([x], torch.optim.SGD, lr=0.1, rho=0.3, direction=Server({x: change}))
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = (a * x**4).sum() / 4
        loss.backward()
        return loss

    wanted = start
    for _ in range(2):
        optimizer.step(closure)
        wanted = wanted - 0.1 * a * (wanted + 0.3 * change / change.norm()) ** 3
    assert calls == 2
    torch.testing.assert_close(x.detach(), wanted, rtol=1e-12, atol=1e-12)  # some ten operations of 2^-53 on numbers near 1


def seen(monkeypatch: pytest.MonkeyPatch, held_out: bool) -> tuple[set[int], set[int]]:
    """Numbers of the images that a run of one round trains on and scores, among 400 made for the purpose; test images are 400 to 449."""
    numbers = torch.arange(450.0).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)
    labels = torch.arange(450) % 10
    monkeypatch.setattr(federated_runs, "_data", lambda: (numbers[:400], labels[:400], numbers[400:], labels[400:]))
    trained, scored = set[int](), set[int]()
    monkeypatch.setattr(federated_runs, "_step", lambda optimizer, model, images, labels: trained.update(images[:, 0, 0, 0].int().tolist()))
    monkeypatch.setattr(federated_runs, "_accuracy", lambda model, images, labels: scored.update(images[:, 0, 0, 0].int().tolist()))
    one_run("fedavg", 0.1, 0.0, 100.0, 0, 4, held_out)
    return trained, scored


def test_a_radius_is_chosen_on_images_that_no_client_trains_on(monkeypatch: pytest.MonkeyPatch) -> None:
    trained, scored = seen(monkeypatch, held_out=True)
    assert not trained & scored
    assert max(trained | scored) < 400
    assert 80 <= len(scored) <= 90  # a fifth of each client's, rounded up
    trained, scored = seen(monkeypatch, held_out=False)
    assert max(trained) < 400
    assert scored == set(range(400, 450))


def test_only_the_first_round_of_the_server_s_direction_is_fedavg_s(monkeypatch: pytest.MonkeyPatch) -> None:
    data = federated_runs._data()
    monkeypatch.setattr(federated_runs, "_data", lambda: tuple(each[:600] for each in data))
    fedavg, server = (one_run(method, 0.1, rho, 1.0, 0, 2, False)["accuracy"] for method, rho in (("fedavg", 0.0), ("server", 0.5)))
    assert fedavg[0] == server[0]
    assert fedavg[1] != server[1]


def test_the_learning_rate_is_fedavg_s_and_each_radius_its_method_s() -> None:
    made: list[dict[str, Any]] = []

    class Fake:
        def map(self, run: Any, jobs: Iterable[dict[str, Any]], title: str) -> list[dict[str, Any]]:
            made.extend(given := list(jobs))
            best = {"fedavg": 0.0, "fedsam": 0.05, "server": 0.1}
            return [{"accuracy": [-abs(job["rho"] - best[job["method"]]) - abs(job["lr"] - 0.3)] * 8} for job in given]

    tuning = tune(Fake(), 0.1, Budget(8, (0.1, 0.3), (0.02, 0.05, 0.1), (100, 101), (0, 1)))  # type: ignore[arg-type]
    assert (tuning.lr, tuning.rho) == (0.3, {"fedsam": 0.05, "server": 0.1})
    assert all(job["held_out"] for job in made)
    assert {job["seed"] for job in made} == {100, 101}
    assert {job["lr"] for job in made if job["method"] != "fedavg"} == {0.3}


def test_a_score_is_the_mean_of_the_last_rounds() -> None:
    assert federated.score([0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]) == 3.0
