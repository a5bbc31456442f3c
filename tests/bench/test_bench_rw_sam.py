"""The benchmark of RWSAM: that every step runs, that ranks are compared with the truth, what its bars and its page say."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import sam_kernels
from bench.page import BEGIN, END
from bench.per_sample.bars import judged
from bench.per_sample.models import MODELS, make_problem
from bench.rw_sam import __main__ as program
from bench.rw_sam import quality, report
from bench.rw_sam.bars import BARS
from bench.rw_sam.providers import PROVIDERS
from sam_kernels.per_sample import GradNorms

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Batches this small are not worth waking a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_step_of_every_model(model: str, provider: str) -> None:
    problem = make_problem(model, batch=2)
    if PROVIDERS[provider].missing(problem):
        assert (model, provider) == ("mlp", "norm_layers")
        return
    before = [param.detach().clone() for param in problem.model.parameters()]
    loss = problem.losses().mean().item()
    found = PROVIDERS[provider].make(problem)()
    assert torch.as_tensor(found).item() == pytest.approx(loss, rel=1e-4)
    moved = [(a - b).abs().max().item() for a, b in zip(before, problem.model.parameters(), strict=True)]
    assert 0 < max(moved) < 1e-2  # so small a step that rounds are alike


@pytest.mark.parametrize("model", ["mlp", "resnet18"])
def test_weights_differ_and_none_is_lost(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    plain = sam_kernels.RWSAM
    monkeypatch.setattr(sam_kernels, "RWSAM", lambda *args, **kwargs: made.append(plain(*args, **kwargs)) or made[-1])
    PROVIDERS["exact"].make(make_problem(model, batch=8))()
    weights = made[0].last_weights
    assert weights.shape == (8,)
    assert weights.min() > 1e-3
    assert weights.max() > 1.01 * weights.min()


@pytest.fixture(scope="module", params=quality.MODELS)
def trained(request: pytest.FixtureRequest) -> tuple[str, quality.Trained]:
    return request.param, quality.trained(request.param, steps=20, samples=24)


def test_the_truth_is_that_of_the_engine(trained: tuple[str, quality.Trained]) -> None:
    _, problem = trained
    with GradNorms(problem.model) as engine:
        losses = problem.losses()
    truth = quality.brute_force_norms(problem)
    assert truth.dtype is torch.float64
    torch.testing.assert_close(engine(losses).double(), truth, rtol=1e-4, atol=1e-6)
    assert truth.max() > 2 * truth.min()  # ranks of equal norms would mean nothing


def test_rank_correlations(trained: tuple[str, quality.Trained]) -> None:
    name, problem = trained
    before = {key: value.clone() for key, value in problem.model.state_dict().items()}
    rows = {row["provider"]: row for row in quality.measure(name, problem, draws=3)}
    assert set(quality.ESTIMATES) - set(rows) == ({"norm_layers"} if name == "mnist_mlp" else set())
    assert rows["exact"]["rank_correlation"] >= 0.999
    for estimate, row in rows.items():
        assert row["draws"] == (3 if quality.ESTIMATES[estimate].is_random else 1)
        assert row["least"] <= row["rank_correlation"] <= row["greatest"]
    assert rows["finite_difference"]["least"] < rows["finite_difference"]["greatest"]  # of other directions each
    for key, value in problem.model.state_dict().items():
        assert torch.equal(value, before[key])  # every estimate finds the same model


def test_wrong_weights_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = quality.trained("mnist_mlp", steps=5, samples=24)
    plain = sam_kernels.RWSAM

    class Wrong(plain):
        @property
        def last_weights(self) -> torch.Tensor:
            return super().last_weights.flip(0)

    monkeypatch.setattr(sam_kernels, "RWSAM", Wrong)
    rows = list(quality.measure("mnist_mlp", problem, draws=1))
    reached = {bar.model: ok for bar, _, ok in judged(rows, BARS)}
    assert reached == {"mnist_mlp": False}


def test_run_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken = {"sam": 100.0, "exact": 104.0, "finite_difference": 150.0}

    def stand_in(calls: Mapping[str, Any], *, rounds: int, warmup: int) -> dict[str, list[float]]:
        for call in calls.values():
            call()
        return {name: [taken[name]] * rounds for name in calls}

    monkeypatch.setattr(program, "interleave", stand_in)
    monkeypatch.setattr("bench.per_sample.models.make_problem", partial(make_problem, batch=2))
    monkeypatch.setattr(quality, "MODELS", {"mnist_cnn": quality.MODELS["mnist_cnn"]})
    monkeypatch.setattr(quality, "trained", partial(quality.trained, steps=5, samples=16))
    monkeypatch.setattr(quality, "measure", partial(quality.measure, draws=1))
    target = tmp_path / "out.json"
    arguments = ["--model", "mlp", "--providers", ",".join(taken), "--rounds", "1", "--no-gate", "--json", str(target)]
    run = CliRunner().invoke(program.main, arguments)
    assert run.exit_code == 0, run.output
    result = json.loads(target.read_text())
    assert result["gate"] == "skipped"
    steps = [row for row in result["rows"] if row["kind"] == "rw_sam"]
    assert [(row["model"], row["provider"], row["ms_50"]) for row in steps] == [("mlp", name, ms) for name, ms in taken.items()]
    assert steps[0]["rounds"] == MODELS["mlp"].turns
    assert "pass  mlp: a step with exact norms over SAM's, median of the rounds: 1.040 (≤ 1.05)" in run.output
    assert "pass  mnist_cnn: exact norms: rank correlation" in run.output
    docs = tmp_path / "docs.md"
    docs.write_text(f"# Title\n{BEGIN}\n{END}\n")
    assert CliRunner().invoke(report.main, [str(target), "--docs", str(docs)]).exit_code == 0
    assert "| RWSAM, finite differences, K = 1 | 150.0 / 150.0 / 150.0 | 1.50 / 1.50 / 1.50 |" in docs.read_text()
    assert quality.MODELS["mnist_cnn"].title in docs.read_text()
    assert CliRunner().invoke(report.main, [str(target), "--docs", str(docs), "--check"]).exit_code == 0
    docs.write_text(docs.read_text().replace("| 1.50 / 1.50", "| 1.40 / 1.50"))
    assert CliRunner().invoke(report.main, [str(target), "--docs", str(docs), "--check"]).exit_code == 1


@pytest.mark.parametrize("factor", [0.99, 1.01])
@pytest.mark.parametrize("bar", BARS, ids=lambda bar: bar.model)
def test_bars(bar: Any, factor: float) -> None:
    rows = [{"model": bar.model, "provider": bar.of, bar.key: bar.limit * factor * (1.0 if bar.over is None else 80.0)}]
    if bar.over is not None:
        assert list(judged(rows, BARS)) == []  # nothing to compare with
        rows.append({"model": bar.model, "provider": bar.over, bar.key: 80.0})
    ((found, figure, reached),) = judged(rows, BARS)
    assert found is bar
    assert figure == pytest.approx(bar.limit * factor)
    assert reached == ((factor < 1) is bar.at_most)


def test_the_gate_runs_what_is_measured() -> None:
    assert all((ROOT / name).exists() for name in program.TESTS)
    assert {"tests/per_sample", "tests/ops/test_sharpness.py"} <= set(program.TESTS)
    assert {f"tests/optim/{path.name}" for path in (ROOT / "tests" / "optim").glob("test_rwsam*.py")} <= set(program.TESTS)


@pytest.mark.stored
def test_the_page_shows_the_stored_result() -> None:
    stored = list((ROOT / "bench" / "results").glob("*/rw_sam.json"))
    if not stored:
        assert f"{BEGIN}\n{END}" in (ROOT / "docs" / "rw_sam.md").read_text()
        return
    assert len(stored) == 1
    run = CliRunner().invoke(report.main, [str(stored[0]), "--check"])
    assert run.exit_code == 0, run.output
