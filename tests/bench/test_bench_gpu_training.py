"""Whole training steps on a device, without one: the models, what is counted of them, and tiny ones in the same steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bench.gpu import gate, limits, training
from bench.gpu.models import GPT2, MODELS, ResNet50
from bench.gpu.timing import HostClock
from bench.gpu.training import PROVIDERS, REWEIGHTED, SAM_STEP, TrainingRun
from bench.gpu.work import base_step_bytes, work_of
from bench.gpu.workloads import GPU_WORKLOADS

OPEN = gate.Gate("", is_off=True)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_parameters_of_its_paper(name: str) -> None:
    with torch.device("meta"):
        params = list(MODELS[name].make().parameters())
    assert (len(params), sum(param.numel() for param in params)) == {"resnet50": (161, 25_557_032), "gpt2_124m": (148, 124_439_808)}[name]
    sizes = sorted(param.numel() for param in params)
    assert sizes == sorted(torch.Size(shape).numel() for shape in GPU_WORKLOADS[name].shapes)


def test_the_head_of_gpt2_is_its_token_embedding_and_looks_back_only() -> None:
    torch.manual_seed(0)
    model = GPT2(dim=16, layers=1, heads=2, tokens=8, vocabulary=50)
    assert model.head.weight is model.token.weight
    ids = torch.randint(50, (1, 8))
    later = ids.clone()
    later[0, -1] = (later[0, -1] + 1) % 50
    before, after = model(ids), model(later)
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])


def test_flops_are_those_of_the_layers() -> None:
    model = lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 5))  # noqa: E731
    work = work_of(model, lambda: (torch.randn(2, 3, 4, 4), torch.randint(5, (2,))), 2)
    conv, linear = 2 * 16 * 27 * 8, 2 * 128 * 5
    assert work.pass_flops == 2 * (2 * conv + 3 * linear)  # no gradient of the images
    # By the Gram form: 16 positions squared times 27 + 8, and one times 128 + 5.
    assert work.norm_flops == 2 * (min(256 * 35, conv) + 133)
    of_norms = 2 * (16 * 3 * (27 + 8) + 2 * 16 * 8 + 10 * 8 * 16) + 2 * (128 + 3 * 5)
    assert work.norm_bytes == 2 * of_norms


def test_bytes_of_two_base_steps_and_one_of_sam() -> None:
    assert base_step_bytes("sgd", 10, 4, scales=False) == 5 * 40
    assert base_step_bytes("sgd", 10, 4, scales=True) == 7 * 40
    # SAM with SGD moves one sweep more than two base steps: 1 ms of 100.
    assert limits.sam_ratio(100.0, 10 * 10**9, 11 * 10**9, 1000.0) == pytest.approx(1.02)
    assert limits.sam_ratio(100.0, 14 * 10**9, 13 * 10**9, 1000.0) == pytest.approx(1.01)


@pytest.fixture(scope="module")
def measured() -> tuple[list[dict[str, Any]], list[str]]:
    said: list[str] = []
    return list(training.measure(HostClock(), "cpu", OPEN, 1e18, copy_gbps=10.0, say=said.append)), said


def test_a_dry_run_measures_every_step_of_every_model(measured: tuple[list[dict[str, Any]], list[str]]) -> None:
    rows, said = measured
    assert said == []
    assert [(row["workload"], row["backend"]) for row in rows] == [(name, provider) for name in MODELS for provider in PROVIDERS]
    assert not any(row["skipped"] for row in rows)
    assert all(row["wall_ms"] > 0 and row["flops"] > 0 and row["bytes"] > 0 for row in rows)
    assert all((row["norm_flops"] > 0) == (row["backend"] == REWEIGHTED) for row in rows)
    assert len(training.lines(rows)) == 1 + len(MODELS)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_call_is_two_forward_passes_and_an_update(provider: str) -> None:
    run = TrainingRun(MODELS["resnet50"], provider, "cpu", is_tiny=True, backend=None)
    run.optimizer.param_groups[0]["lr"] = 0.1
    passes: list[nn.Module] = []
    run.model.register_forward_hook(lambda module, inputs, output: passes.append(module))
    before = [param.detach().clone() for param in run.model.parameters()]
    run.step()
    assert len(passes) == 2
    assert all(not torch.equal(param, old) for param, old in zip(run.model.parameters(), before, strict=True) if old.dim() == 4)
    conv = next(module for module in run.model.modules() if isinstance(module, nn.Conv2d))
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_steps_that_are_skipped_are_found() -> None:
    run = TrainingRun(MODELS["resnet50"], SAM_STEP, "cpu", is_tiny=True, backend=None)
    run.warm_up()
    before = run.skips
    run.step()
    assert run.skips == before
    run.inputs = run.inputs * float("nan")
    run.step()
    assert run.skips != before
    with pytest.raises(RuntimeError, match="were skipped"):
        run.warm_up()


def test_what_has_no_green_test_is_left_out() -> None:
    said: list[str] = []
    closed = gate.Gate("", frozenset())
    found = training._runs("resnet50", MODELS["resnet50"], "cpu", closed, "native", 1e18, said.append)
    assert REWEIGHTED not in found
    assert said == [f"left out: training steps of resnet50, {REWEIGHTED}: no green test of its norms per sample"]
    late: list[str] = []
    assert training._runs("resnet50", MODELS["resnet50"], "cpu", OPEN, "native", 0.0, late.append) == {}
    assert all(line.endswith("out of time") for line in late)
    assert isinstance(MODELS["resnet50"].make_tiny(), ResNet50)
