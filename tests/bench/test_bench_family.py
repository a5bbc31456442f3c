"""The family's benchmark: equal work of all who take part, what it moves, what its bars and its page say."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from bench import turns
from bench.family import __main__ as program
from bench.family import report
from bench.family.bars import BARS, fastest_peer, judged
from bench.family.methods import METHODS, Method
from bench.family.options import ALPHA, KAPPA, LMBDA, LOOK_ALPHA, LOOK_EVERY, SIGMA, THETA
from bench.page import BEGIN, END
from bench.providers import BASES, REFERENCE, RHO, Provider
from bench.workloads import WORKLOADS, Workload, make_grads, make_params

ROOT = Path(__file__).parents[2]
SHAPES = ((5, 3), (7,), (4, 2, 3), (1,))
ONE = ((5, 3),)  # where norms of each tensor and of all are the same
STEPS = 2 * LOOK_EVERY
CASES = [(method, provider) for method in METHODS.values() for provider in method.providers]
IDS = [f"{method.name}-{provider.name}" for method, provider in CASES]
# Of the largest operand: float32 against float64. Each of ten steps rounds the weights twice and their increments, which are at most as
# large, a few times more; where a perturbation is taken off again instead of being forgotten, that is one more rounding of the weights.
# 1e-7 beside the norm (BingcongLi/VaSSO) is another relative 1e-8 of rho.
TOLERANCE = STEPS * 8 * 2.0**-24


def _dot(left: list[Tensor], right: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _mixed(a: Any, left: list[Tensor], b: Any, right: list[Tensor]) -> list[Tensor]:
    return [a * x + b * y for x, y in zip(left, right, strict=True)]


class Expected:
    """The formulas in float64, with SGD and momentum."""

    def __init__(self, method: str, weights: list[Tensor]) -> None:
        self.method = method
        self.weights = [w.double() for w in weights]
        self.average: list[Tensor] | None = None
        self.momentum: list[Tensor] | None = None
        self.orthogonal: list[Tensor] = []
        self.t = 0

    def direction(self, g: list[Tensor]) -> list[Tensor]:
        if self.method not in ("vasso", "fsam"):
            return g
        if self.average is None:
            self.average = g
            return g
        if self.method == "vasso":
            self.average = _mixed(1 - THETA, self.average, THETA, g)
            return self.average
        along = _mixed(1.0, g, -SIGMA, self.average)
        self.average = _mixed(LMBDA, self.average, 1 - LMBDA, g)
        return along

    def perturbed(self, first: list[Tensor]) -> list[Tensor]:
        if self.method == "looksam" and self.t % LOOK_EVERY:
            return self.weights
        d = self.direction([g.double() for g in first])
        return _mixed(1.0, self.weights, RHO / _dot(d, d).sqrt(), d)

    def descend(self, first: list[Tensor], second: list[Tensor]) -> None:
        g, g_p = [x.double() for x in first], [x.double() for x in second]
        along, beside = g_p, None
        if self.method == "gsam":
            along = _mixed(1 + ALPHA * _dot(g, g_p) / _dot(g_p, g_p), g_p, -ALPHA, g)
        elif self.method == "wsam":
            along, beside = g, _mixed(1.0, g_p, -1.0, g)
        elif self.method == "looksam" and self.t % LOOK_EVERY == 0:
            self.orthogonal = _mixed(1.0, g_p, -_dot(g, g_p) / _dot(g, g), g)
        elif self.method == "looksam":
            ratio = (_dot(g_p, g_p) / _dot(self.orthogonal, self.orthogonal)).sqrt()
            along = _mixed(1.0, g_p, LOOK_ALPHA * ratio, self.orthogonal)
        options = BASES["sgd"].kwargs
        self.momentum = along if self.momentum is None else _mixed(options["momentum"], self.momentum, 1.0, along)
        self.weights = _mixed(1.0, self.weights, -options["lr"], self.momentum)
        if beside is not None:
            self.weights = _mixed(1.0, self.weights, -options["lr"] * KAPPA / (1 - KAPPA), beside)
        self.t += 1


def _put(params: list[torch.nn.Parameter], grads: list[Tensor]) -> list[Tensor]:
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    return grads


def _assert_close(params: list[torch.nn.Parameter], expected: list[Tensor], what: str) -> None:
    scale = max(1.0, *(q.abs().max().item() for q in expected))
    for p, q in zip(params, expected, strict=True):
        error = (p.detach().double() - q).abs().max().item()
        assert error <= TOLERANCE * scale, f"{what}: off by {error:.2e}, bound {TOLERANCE * scale:.2e}"


def _skip_if_missing(provider: Provider) -> None:
    reason = provider.missing(len(SHAPES))
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(("method", "provider"), CASES, ids=IDS)
def test_every_step_is_the_formulas(method: Any, provider: Provider) -> None:
    _skip_if_missing(provider)
    shapes = ONE if method.name == "looksam" else SHAPES
    params = make_params(make_grads(shapes, torch.float32, seed=100))
    expected = Expected(method.name, [p.detach() for p in params])
    optimizer = provider.make(params, BASES["sgd"])
    for t in range(STEPS):
        first = _put(params, make_grads(shapes, torch.float32, seed=2 * t))
        optimizer.first_step()
        if not (method.name == "looksam" and provider.name.startswith("sam_kernels")):  # whose step is one call
            _assert_close(params, expected.perturbed(first), f"step {t}, ascent")
        second = _put(params, make_grads(shapes, torch.float32, seed=2 * t + 1))
        optimizer.second_step()
        expected.descend(first, second)
        _assert_close(params, expected.weights, f"step {t}, descent")


@pytest.mark.parametrize(("method", "provider"), CASES, ids=IDS)
def test_with_adamw_all_do_what_the_first_does(method: Any, provider: Provider) -> None:
    """The base is torch's own everywhere; what it is given is tested above."""
    _skip_if_missing(provider)
    shapes = ONE if method.name == "looksam" else SHAPES
    results = []
    for each in (method.providers[0], provider):
        params = make_params(make_grads(shapes, torch.float32, seed=100))
        optimizer = each.make(params, BASES["adamw"])
        for t in range(3):
            _put(params, make_grads(shapes, torch.float32, seed=2 * t))
            optimizer.first_step()
            _put(params, make_grads(shapes, torch.float32, seed=2 * t + 1))
            optimizer.second_step()
        results.append(params)
    # An update of AdamW is lr m / sqrt(v): errors of the gradients count with the inverse of the smallest of them, here about 1e-3.
    _assert_close(results[1], [p.detach().double() for p in results[0]], "after three steps")


@pytest.mark.parametrize(("method", "provider"), CASES, ids=IDS)
def test_who_writes_gradients_says_so(method: Any, provider: Provider) -> None:
    _skip_if_missing(provider)
    params = make_params(make_grads(SHAPES, torch.float32))
    optimizer = provider.make(params, BASES["sgd"])
    written = False
    for t in range(2):
        given = [make_grads(SHAPES, torch.float32, seed=2 * t + half) for half in (0, 1)]
        kept = [[g.clone() for g in half] for half in given]
        for half, step in enumerate((optimizer.first_step, optimizer.second_step)):
            for param, grad in zip(params, given[half], strict=True):
                param.grad = grad
            step()
        written |= any(not torch.equal(a, b) for half in (0, 1) for a, b in zip(given[half], kept[half], strict=True))
    assert written is provider.writes_grads


def test_every_method_has_the_reference_and_names_are_told_apart() -> None:
    for method in METHODS.values():
        names = [provider.name for provider in method.providers]
        assert names[0] == REFERENCE
        assert len(set(names)) == len(names)
    assert all(any(not p.name.startswith("sam_kernels/") for p in METHODS[bar.model].providers) for bar in BARS)


def test_bytes_of_a_step() -> None:
    """As the optimizers' docstrings have them; GSAM, WSAM and the first step of LookSAM's cycle copy a gradient beside (2)."""
    passes = {name: method.passes("sgd") for name, method in METHODS.items()}
    assert passes == {"vasso": 13, "fsam": 14, "gsam": 15 + 2, "wsam": 15 + 2, "looksam": 15 + 2 + 4 * 10}
    assert METHODS["vasso"].passes("adamw") == 15
    assert {name for name, method in METHODS.items() if method.copied == 2} == {"gsam", "wsam", "looksam"}


def test_a_cycle_is_timed_whole() -> None:
    calls: list[str] = []

    class Counted:
        def first_step(self) -> None:
            calls.append("first")

        def second_step(self) -> None:
            calls.append("second")

    one = Provider("one", "One", lambda params, base: Counted())
    stepper = Method("looksam", "", (one,), more_lists=0, every=3).timed()["one"].make([], BASES["sgd"])
    stepper.first_step()
    stepper.second_step()
    assert calls == ["first", "second"] * 3


def _stand_in(ms: Mapping[str, float]) -> Callable[..., dict[str, list[float]]]:
    def interleave(calls: Mapping[str, Any], *, rounds: int, before: Mapping[str, Any], **_: Any) -> dict[str, list[float]]:
        for name, call in calls.items():
            for _ in range(3):
                before.get(name, lambda: None)()
                call()
        return {name: [ms[name]] * rounds for name in calls}

    return interleave


def test_run_end_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken = {REFERENCE: 100.0, "published/fused": 290.0, "published/foreach": 400.0, "torch._foreach_/fused": 310.0}
    monkeypatch.setattr(turns, "interleave", _stand_in(taken))
    monkeypatch.setitem(WORKLOADS, "gpt2_124m", Workload("gpt2_124m", "GPT-2 124M", SHAPES))
    target = tmp_path / "out.json"
    arguments = ["--methods", "vasso,fsam", "--workloads", "gpt2_124m", "--bases", "sgd", "--providers", ",".join(taken), "--no-gate"]
    arguments += ["--allocator", "default"]
    run = CliRunner().invoke(program.main, [*arguments, "--json", str(target)])
    assert run.exit_code == 0, run.output
    result = json.loads(target.read_text())
    assert result["gate"] == "skipped"
    measured = [(row["method"], row["backend"]) for row in result["rows"]]
    assert sorted(measured) == sorted((method, name) for method in ("vasso", "fsam") for name in taken)
    assert all(row["over_reference_50"] == row["ms_50"] / 100.0 for row in result["rows"])
    assert "FAIL  vasso: " in run.output
    assert "2.900 (≥ 3)" in run.output
    docs = tmp_path / "docs.md"
    docs.write_text(f"# Title\n{BEGIN}\n{END}\n")
    assert CliRunner().invoke(report.main, [str(target), "--docs", str(docs)]).exit_code == 0
    assert "| authors' loop, fused base | 2.90× |" in docs.read_text()
    assert CliRunner().invoke(report.main, [str(target), "--docs", str(docs), "--check"]).exit_code == 0
    docs.write_text(docs.read_text().replace("| 2.90× |", "| 1.90× |"))
    assert CliRunner().invoke(report.main, [str(target), "--docs", str(docs), "--check"]).exit_code == 1


def test_the_bar_is_over_the_fastest_of_all_others() -> None:
    common = {"method": "fsam", "workload": "gpt2_124m", "base": "sgd", "dtype": "fp32"}
    row = {"over_reference_50": 1.0, **common}
    rows = [
        {**row, "backend": REFERENCE},
        {**row, "backend": "sam_kernels/foreach", "over_reference_50": 1.2},
        {**row, "backend": "torch._foreach_/fused", "over_reference_50": 3.2},
        {**row, "backend": "published/fused", "over_reference_50": 3.5},
        {**row, "backend": "pytorch_optimizer/foreach", "over_reference_50": 3.1},
        {**row, "backend": "published/foreach", "over_reference_50": 1.1, "base": "adamw"},
    ]
    found = fastest_peer(rows, "fsam", "gpt2_124m", "sgd")
    assert found is not None
    assert found["backend"] == "pytorch_optimizer/foreach"
    ((bar, figure, reached),) = judged(rows)
    assert (bar.model, figure, reached) == ("fsam", 3.1, True)
    rows[2]["over_reference_50"] = 2.9
    assert [(figure, reached) for _, figure, reached in judged(rows)] == [(2.9, False)]
    assert list(judged(rows[:2])) == []


def test_the_gate_runs_what_is_measured() -> None:
    assert all((ROOT / name).exists() for name in program.TESTS)
    assert "tests/bench/test_bench_family.py" in program.TESTS


@pytest.mark.stored
def test_the_page_shows_the_stored_result() -> None:
    stored = list((ROOT / "bench" / "results").glob("*/family.json"))
    if not stored:
        assert f"{BEGIN}\n{END}" in (ROOT / "docs" / "family.md").read_text()
        return
    assert len(stored) == 1
    run = CliRunner().invoke(report.main, [str(stored[0]), "--check"])
    assert run.exit_code == 0, run.output
