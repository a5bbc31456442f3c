"""The benchmark of gradient norms per sample: that it runs, that providers agree, what its bars and its page say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from bench.per_sample import report
from bench.per_sample.__main__ import main
from bench.per_sample.bars import BARS, judged
from bench.per_sample.models import MODELS, make_problem
from bench.per_sample.providers import PROVIDERS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("model", MODELS)
def test_providers_agree(model: str) -> None:
    norms = {}
    for name in PROVIDERS:
        problem = make_problem(model, batch=2)
        if PROVIDERS[name].missing(problem) is None:
            norms[name] = PROVIDERS[name].make(problem)()
    exact = norms["norms"]
    assert exact is not None
    assert exact.shape == (2,)
    for name, found in norms.items():
        assert (found is None) == (name in ("plain", "floor"))
        if found is not None:
            torch.testing.assert_close(found.float(), exact, rtol=1e-4, atol=0)  # vmap's are summed in float32


@pytest.mark.parametrize("name", ["norms+weighted", "norms+backward"])
def test_gradients_are_those_of_a_plain_pass(name: str) -> None:
    ours, plain = make_problem("mlp", batch=3), make_problem("mlp", batch=3)
    PROVIDERS[name].make(ours)()
    PROVIDERS["plain"].make(plain)()
    for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6)


def test_run_end_to_end(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    arguments = [
        "--model",
        "mlp",
        "--providers",
        "plain,norms+backward",
        "--rounds",
        "1",
        "--no-gate",
        "--no-memory",
        "--json",
        str(target),
    ]
    run = CliRunner().invoke(main, arguments)
    assert run.exit_code == 0, run.output
    result = json.loads(target.read_text())
    assert result["gate"] == "skipped"
    assert [(row["model"], row["provider"]) for row in result["rows"]] == [("mlp", "plain"), ("mlp", "norms+backward")]
    assert "norms beside the gradient over a plain pass" in run.output
    docs = tmp_path / "docs.md"
    docs.write_text("# Title\n<!-- bench:begin -->\n<!-- bench:end -->\n")
    assert CliRunner().invoke(report.main, [str(target), "--docs", str(docs)]).exit_code == 0
    assert MODELS["mlp"].title in docs.read_text()
    assert CliRunner().invoke(report.main, [str(target), "--docs", str(docs), "--check"]).exit_code == 0
    docs.write_text(docs.read_text().replace("| mlp:", "| other:"))
    assert CliRunner().invoke(report.main, [str(target), "--docs", str(docs), "--check"]).exit_code == 1


def test_bars_judge_both_ways() -> None:
    at_least = next(bar for bar in BARS if not bar.at_most)
    for factor, reached in ((1.01, True), (0.99, False)):
        rows = [
            {"model": at_least.model, "provider": at_least.of, at_least.key: 100.0 * at_least.limit * factor},
            {"model": at_least.model, "provider": at_least.over, at_least.key: 100.0},
        ]
        assert [(bar, ok) for bar, _, ok in judged(rows) if bar is at_least] == [(at_least, reached)]


@pytest.mark.stored
def test_the_page_shows_the_stored_result() -> None:
    stored = list((ROOT / "bench" / "results").glob("*/per_sample.json"))
    assert len(stored) == 1
    run = CliRunner().invoke(report.main, [str(stored[0]), "--check"])
    assert run.exit_code == 0, run.output
