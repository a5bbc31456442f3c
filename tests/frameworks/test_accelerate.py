"""SAM in loops of ``accelerate`` after five steps, against the formula in float64; runs that are continued, bit for bit; wrong orders."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_kernels import RWSAM, SAM
from tests.frameworks.conftest import Compared
from tests.frameworks.formula import LR, RHO, SAM_OR_M, STEPS, by_formula, error_of, reweighted, same_bits
from tests.frameworks.hugging_face import batches, forget_accelerate, loss_of, micro_batches_of, net

integration: Any = pytest.importorskip("sam_kernels.integrations.accelerate")
fresh = pytest.fixture(autouse=True)(forget_accelerate)
SGD: dict[str, Any] = {"lr": LR, "momentum": 0.9, "rho": RHO}
CLOSE = 1e-12  # float64, five steps


def prepared(accumulation: int = 1, **options: Any) -> tuple[Any, Any, Any]:
    """The accelerator, the model and the optimizer."""
    accelerator, model = integration.Accelerator(cpu=True, gradient_accumulation_steps=accumulation), net()
    return accelerator, *accelerator.prepare(model, SAM(model.parameters(), torch.optim.SGD, **SGD, **options))


def closure_of(accelerator: Any, model: nn.Module, batch: Any) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = loss_of(model, batch)
        accelerator.backward(loss)
        return loss

    return closure


def train(accelerator: Any, model: nn.Module, optimizer: Any, given: list[Any], *, clip: float = 0.0, scheduler: Any = None) -> list[float]:
    losses = []
    for batch in given:
        with accelerator.accumulate(model):
            losses.append(optimizer.backward(closure_of(accelerator, model, batch)).item())
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
    return losses


def formula(given: list[Any], accumulation: int, **options: Any) -> nn.Module:
    expected = net()
    base = torch.optim.SGD(expected.parameters(), lr=LR, momentum=0.9)
    usual: dict[str, Any] = {"whole": False, "clip": 0.0, **options}
    by_formula(expected, base, micro_batches_of(given, accumulation), lambda m, b, _: loss_of(m, b) / accumulation, **usual)
    return expected


@pytest.mark.parametrize(("accumulation", "clip", "lambd"), [(1, 0.0, 1.0), (1, 0.3, 1.0), (2, 0.3, 1.0), (3, 0.0, 0.4)])
def test_accelerate_takes_sams_steps(accumulation: int, clip: float, lambd: float, compared: Compared) -> None:
    accelerator, model, optimizer = prepared(accumulation, lambd=lambd)
    given = batches(STEPS * accumulation)
    losses = train(accelerator, model, optimizer, given, clip=clip)
    expected = formula(given, accumulation, clip=clip, lambd=lambd)
    what = f"backward: weights after {STEPS} steps, clip {clip}, λ = {lambd}"
    compared("accelerate", SAM_OR_M[accumulation], what, error_of(model, expected), CLOSE)
    assert losses[:accumulation] == pytest.approx([loss_of(net(), each).item() for each in given[:accumulation]], rel=CLOSE)  # undivided


@pytest.mark.parametrize("way", ["first_step, second_step", "step(closure)"])
def test_one_batch_in_other_ways(way: str, compared: Compared) -> None:
    accelerator, model, optimizer = prepared()
    given = batches(STEPS)
    for batch in given:
        closure = closure_of(accelerator, model, batch)
        if way == "step(closure)":
            loss = optimizer.step(lambda closure=closure: optimizer.zero_grad() or closure())
            assert isinstance(loss, Tensor)
            continue
        closure()
        optimizer.first_step(zero_grad=True)
        closure()
        optimizer.second_step(zero_grad=True)
    compared("accelerate", "SAM", f"{way}: weights after {STEPS} steps", error_of(model, formula(given, 1)), CLOSE)


def test_two_rounds_over_the_micro_batches(compared: Compared) -> None:
    """``first_step`` and ``second_step`` within ``accumulate``: SAM on the whole batch."""
    k = 3
    accelerator, model, optimizer = prepared(k)
    given = batches(STEPS * k)
    for step in micro_batches_of(given, k):
        for half in (optimizer.first_step, optimizer.second_step):
            for batch in step:
                with accelerator.accumulate(model):
                    closure_of(accelerator, model, batch)()
                    half(zero_grad=True)
    expected = formula(given, k, whole=True)
    compared("accelerate", "SAM of the accumulated batch", f"two rounds: weights after {STEPS} steps", error_of(model, expected), CLOSE)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_samples_are_weighted(accumulation: int, compared: Compared) -> None:
    """The closure returns losses and calls no backward, so that nobody divides them but the optimizer."""
    accelerator, model = integration.Accelerator(cpu=True, gradient_accumulation_steps=accumulation), net()
    model, optimizer = accelerator.prepare(model, RWSAM(model, torch.optim.SGD, beta=2.0, **SGD))
    given = batches(STEPS * accumulation)

    def losses(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    means = []
    for batch in given:
        with accelerator.accumulate(model):
            means.append(optimizer.backward(lambda batch=batch: losses(model, batch)).item())
            optimizer.step()
            optimizer.zero_grad()
    expected = net()
    base = torch.optim.SGD(expected.parameters(), lr=LR, momentum=0.9)
    reweighted(expected, base, micro_batches_of(given, accumulation), losses, beta=2.0)
    algorithm = "RW-SAM" if accumulation == 1 else "RW-SAM by accumulation"
    compared("accelerate", algorithm, f"backward: weights after {STEPS} steps", error_of(model, expected), CLOSE)
    assert means[0] == pytest.approx(losses(net(), given[0]).mean().item(), rel=CLOSE)  # undivided


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_is_continued_bit_for_bit(accumulation: int, tmp_path: Path, compared: Compared) -> None:
    """4 + 4 steps with ``save_state`` and ``load_state`` in between are 8 steps; the scheduler's rates too."""

    def made() -> tuple[Any, Any, Any, Any]:
        accelerator, model = integration.Accelerator(cpu=True, gradient_accumulation_steps=accumulation), net()
        optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=0.01, rho=lambda t: RHO / t)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        return accelerator, *accelerator.prepare(model, optimizer, scheduler)

    given = batches(8 * accumulation)
    accelerator, model, optimizer, scheduler = made()
    train(accelerator, model, optimizer, given[: 4 * accumulation], scheduler=scheduler)
    accelerator.save_state(str(tmp_path))
    train(accelerator, model, optimizer, given[4 * accumulation :], scheduler=scheduler)
    accelerator, other, optimizer, scheduler = made()
    assert same_bits(other, model) != 0.0
    accelerator.load_state(str(tmp_path))
    assert optimizer.param_groups[0]["sam_step"] == 4
    train(accelerator, other, optimizer, given[4 * accumulation :], scheduler=scheduler)
    compared("accelerate", SAM_OR_M[accumulation], "load_state: 4 + 4 steps against 8", same_bits(other, model), 0.0)


# --- what is prepared ---


def test_other_optimizers_are_prepared_as_ever() -> None:
    accelerator, model = integration.Accelerator(cpu=True), net()
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=LR))
    assert type(optimizer).__name__ == "AcceleratedOptimizer"
    assert accelerator._optimizers == [optimizer]


def test_an_optimizer_is_prepared_once() -> None:
    accelerator, _, optimizer = prepared()
    assert accelerator.prepare(optimizer) is optimizer
    assert accelerator.prepare_optimizer(optimizer) is optimizer
    assert accelerator._optimizers == [optimizer]
    other = integration.Accelerator(cpu=True).prepare(optimizer.optimizer)
    assert other.optimizer is optimizer.optimizer


def test_a_prepared_optimizer_can_be_pickled() -> None:
    _, _, optimizer = prepared()
    copied = pickle.loads(pickle.dumps(optimizer))
    assert isinstance(copied, integration.AcceleratedSAM)
    assert copied.optimizer.param_groups[0]["rho"] == RHO


def test_something_around_sam_is_refused() -> None:
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, optimizer: Any) -> None:
            self.optimizer = optimizer
            super().__init__(optimizer.param_groups, {})

    model = net()
    with pytest.raises(TypeError, match=r"Lookahead around an optimizer of SAM; put SAM around the other optimizer"):
        integration.Accelerator(cpu=True).prepare(Lookahead(SAM(model.parameters(), torch.optim.SGD, lr=LR)))


# --- orders that are none ---

LINES = r"write\n    with accelerator\.accumulate\(model\):[\s\S]*loss = optimizer\.backward\(closure\)"


def test_a_step_without_sams_gradient_is_an_error() -> None:
    accelerator, model, optimizer = prepared()
    before = [param.clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match=r"SAM: step\(\) without a gradient of SAM: .* makes a step of SGD; " + LINES):
        optimizer.step()
    closure_of(accelerator, model, batches(1)[0])()
    with pytest.raises(RuntimeError, match=LINES):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    optimizer.zero_grad()
    train(accelerator, model, optimizer, batches(1))
    with pytest.raises(RuntimeError, match=LINES):
        optimizer.step()


def test_steps_that_perturb_nothing_need_no_gradient_of_sam() -> None:
    accelerator, model = integration.Accelerator(cpu=True), net()
    model, optimizer = accelerator.prepare(model, SAM(model.parameters(), torch.optim.SGD, lr=LR, rho=lambda t: 0.0))
    before = [param.clone() for param in model.parameters()]
    closure_of(accelerator, model, batches(1)[0])()
    optimizer.step()
    assert not any(map(torch.equal, model.parameters(), before))


def test_a_closure_is_no_micro_batch() -> None:
    accelerator, model, optimizer = prepared(2)
    with (
        accelerator.accumulate(model),
        pytest.raises(ValueError, match=r"a closure is one batch, and accelerate accumulates several; " + LINES),
    ):
        optimizer.step(closure_of(accelerator, model, batches(1)[0]))


def test_both_halves_in_one_micro_batch_are_an_error() -> None:
    """The first half perturbs nothing before the last micro-batch: the second pass would be another first one."""
    accelerator, model, optimizer = prepared(2)
    closure = closure_of(accelerator, model, batches(1)[0])
    with accelerator.accumulate(model):
        closure()
        optimizer.first_step(zero_grad=True)
        closure()
        with pytest.raises(
            RuntimeError, match=r"second_step: call first_step first.*goes through all micro-batches twice\. For m-SAM " + LINES
        ):
            optimizer.second_step(zero_grad=True)


@pytest.mark.parametrize("plugin", ["DEEPSPEED", "MEGATRON_LM", "FSDP"])
@pytest.mark.parametrize("way", ["prepare", "prepare_optimizer"])
def test_plugins_with_weights_of_their_own_are_refused(plugin: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither package is here, and accelerate leaves FSDP out on a CPU: the accelerator says what it would say with them."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import DistributedType

    accelerator, model = integration.Accelerator(cpu=True), net()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=LR)
    if plugin == "FSDP":
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    else:
        monkeypatch.setattr(type(accelerator), "distributed_type", DistributedType[plugin])
    words = r"FSDP version 1 .*set fsdp_version=2" if plugin == "FSDP" else f"SAM: {plugin} updates its own copies .*use DDP"
    with pytest.raises(ValueError, match=words):
        accelerator.prepare(model, optimizer) if way == "prepare" else accelerator.prepare_optimizer(optimizer)
    assert not accelerator._optimizers
