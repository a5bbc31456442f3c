"""bfloat16 and float16 autocast in ``accelerate`` and ``SAMTrainer``, against the formula under the same autocast; loss scaling.

accelerate has no scaler and no autocast for float16 on a CPU: the tests put both into its accelerator.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_kernels import SAM
from tests.frameworks.conftest import Compared
from tests.frameworks.formula import RHO, SAM_OR_M, by_formula, error_of
from tests.frameworks.hugging_face import (
    LR,
    STEPS,
    arguments,
    batches,
    forget_accelerate,
    gpt2,
    loss_of,
    micro_batches_of,
    net,
    recording,
    texts,
)  # fmt: skip

integration: Any = pytest.importorskip("sam_kernels.integrations.accelerate")
fresh = pytest.fixture(autouse=True)(forget_accelerate)
SCALE = 1024.0
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Weights that differ in their last float32 bit may be rounded to neighbouring 16-bit numbers. Plain SGD is off by 0.6.
CLOSE = 1e-4
CLOSE_OF_GPT2 = {"bf16": 1e-5, "fp16": 2e-3}  # whose biases begin with zeros, and are small
LINES = r"write\n    with accelerator\.accumulate\(model\):[\s\S]*loss = optimizer\.backward\(closure\)"


def scaled(accelerator: Any) -> Any:
    """With what accelerate has for float16 on a GPU."""
    if accelerator.mixed_precision == "fp16":
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=SCALE)
    return accelerator


class Loop:
    """A loop of accelerate. ``factors``: what the losses of its forward passes are multiplied by, one after another."""

    def __init__(self, precision: str = "fp16", accumulation: int = 1, **options: Any) -> None:
        self.accelerator = scaled(integration.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=accumulation))
        model = net(torch.float32)
        optimizer: Any = SAM(model.parameters(), torch.optim.SGD, lr=LR, rho=RHO, **options)
        scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, optimizer, scheduler)
        self.factors: list[float] = []

    @property
    def scale(self) -> float:
        return float(self.accelerator.scaler.get_scale())

    @property
    def weights(self) -> list[Tensor]:
        return [param.detach().clone() for param in self.model.parameters()]

    def closure_of(self, batch: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            loss = loss_of(self.model, batch) * (self.factors.pop(0) if self.factors else 1.0)
            self.accelerator.backward(loss)
            return loss

        return closure

    def run(self, given: list[Any], way: str = "backward", clip: float = 0.0) -> None:
        for batch in given:
            with self.accelerator.accumulate(self.model):
                WAYS[way](self, self.closure_of(batch), clip)
                self.scheduler.step()
                self.optimizer.zero_grad()

    def clip(self, max_norm: float) -> None:
        if max_norm and self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)


def _backward(loop: Loop, closure: Callable[[], Tensor], clip: float) -> None:
    loop.optimizer.backward(closure)
    loop.clip(clip)
    loop.optimizer.step()


def _two_steps(loop: Loop, closure: Callable[[], Tensor], clip: float) -> None:
    closure()
    loop.optimizer.first_step(zero_grad=True)
    closure()
    loop.clip(clip)
    loop.optimizer.second_step(zero_grad=True)


def _closure(loop: Loop, closure: Callable[[], Tensor], clip: float) -> None:
    assert not clip
    loop.optimizer.step(lambda: loop.optimizer.zero_grad() or closure())


WAYS = {"backward": _backward, "first_step, second_step": _two_steps, "step(closure)": _closure}


def formula(given: list[Any], precision: str, accumulation: int = 1, first: int = 0, **options: Any) -> nn.Module:
    """``first``: steps of the scheduler that are over."""
    expected = net(torch.float32)

    def loss(model: nn.Module, batch: Any, _: int) -> Tensor:
        with torch.autocast("cpu", DTYPES[precision]):
            logits = model(batch[0])
        return F.cross_entropy(logits.float(), batch[1]) / accumulation

    base = torch.optim.SGD(expected.parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.LambdaLR(base, lambda step: 1.0 / (1 + step))
    usual: dict[str, Any] = {"whole": False, "clip": 0.0, "scale": SCALE if precision == "fp16" else 1.0, **options}
    by_formula(expected, base, micro_batches_of(given, accumulation), loss, after=scheduler.step, **usual)
    return expected


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("accumulation", "clip", "lambd"), [(1, 0.0, 1.0), (1, 0.3, 0.4), (2, 0.0, 0.4), (2, 0.3, 1.0)])
def test_accelerate_takes_sams_steps(precision: str, accumulation: int, clip: float, lambd: float, compared: Compared) -> None:
    loop, given = Loop(precision, accumulation, lambd=lambd), batches(STEPS * accumulation, dtype=torch.float32)
    loop.run(given, clip=clip)
    expected = formula(given, precision, accumulation, clip=clip, lambd=lambd)
    what = f"{precision}: weights after {STEPS} steps, clip {clip}, λ = {lambd}"
    compared("accelerate", SAM_OR_M[accumulation], what, error_of(loop.model, expected), CLOSE)


@pytest.mark.parametrize(("way", "clip"), [("first_step, second_step", 0.3), ("first_step, second_step", 0.0), ("step(closure)", 0.0)])
@pytest.mark.parametrize("lambd", [1.0, 0.4])
def test_one_batch_in_other_ways(way: str, clip: float, lambd: float, compared: Compared) -> None:
    loop, given = Loop(lambd=lambd), batches(STEPS, dtype=torch.float32)
    loop.run(given, way, clip)
    expected = formula(given, "fp16", clip=clip, lambd=lambd)
    compared("accelerate", "SAM", f"fp16, {way}: clip {clip}, λ = {lambd}", error_of(loop.model, expected), CLOSE)


INF = float("inf")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad_pass", [0, 1])
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_a_step_that_is_not_finite_is_skipped(way: str, bad_pass: int, clip: float) -> None:
    """Weights, scale and the scheduler are as accelerate promises, whichever pass it was; the steps after it are those of the formula."""
    if way == "step(closure)" and clip:
        pytest.skip("a closure's gradient is clipped by max_grad_norm=")
    loop, given = Loop(), batches(3, dtype=torch.float32)
    loop.run(given[:1], way, clip)
    assert not loop.optimizer.step_was_skipped
    before, rate = loop.weights, loop.scheduler.get_last_lr()
    loop.factors = [INF if i == bad_pass else 1.0 for i in range(2)]
    loop.run(given[1:2], way, clip)
    assert loop.optimizer.step_was_skipped
    assert loop.accelerator.optimizer_step_was_skipped
    assert all(map(torch.equal, loop.weights, before))
    assert (loop.scale, loop.scheduler.get_last_lr(), loop.optimizer.optimizer.skipped_steps) == (SCALE / 2, rate, 1)
    loop.run(given[2:], way, clip)
    assert not loop.optimizer.step_was_skipped
    assert loop.scale == SCALE / 2
    assert error_of(loop.model, formula([given[0], given[2]], "fp16", clip=clip)) <= CLOSE


@pytest.mark.parametrize("bad_pass", range(4))
def test_one_bad_micro_batch_skips_the_step(bad_pass: int) -> None:
    loop, given = Loop(accumulation=2), batches(4, dtype=torch.float32)
    before = loop.weights
    loop.factors = [INF if i == bad_pass else 1.0 for i in range(4)]
    loop.run(given[:2])
    assert all(map(torch.equal, loop.weights, before))
    assert (loop.scale, loop.optimizer.step_was_skipped) == (SCALE / 2, True)
    loop.run(given[2:])
    assert error_of(loop.model, formula(given[2:], "fp16", 2)) <= CLOSE


# --- orders that are none ---


@pytest.mark.parametrize("call", ["clip_grad_norm_", "unscale_gradients"])
def test_the_first_pass_is_not_unscaled(call: str) -> None:
    loop = Loop()
    loop.closure_of(batches(1, dtype=torch.float32)[0])()
    loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1.0) if call == "clip_grad_norm_" else loop.accelerator.unscale_gradients()
    words = r"SAM\.first_step: accelerator\.clip_grad_norm_ or unscale_gradients .* after the second accelerator\.backward\(loss\)"
    with pytest.raises(RuntimeError, match=words):
        loop.optimizer.first_step(zero_grad=True)


def test_no_micro_batch_is_added_to_unscaled_gradients() -> None:
    loop, given = Loop(accumulation=2), batches(2, dtype=torch.float32)
    with loop.accelerator.accumulate(loop.model):
        loop.optimizer.backward(loop.closure_of(given[0]))
        loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1.0)  # without `if accelerator.sync_gradients`
        loop.optimizer.step()
    with (
        loop.accelerator.accumulate(loop.model),
        pytest.raises(RuntimeError, match=r"unscaled already, .*after the last one alone: " + LINES),
    ):
        loop.optimizer.backward(loop.closure_of(given[1]))


@pytest.mark.parametrize("has_gradient", [False, True])
def test_a_step_without_sams_gradient_is_an_error(has_gradient: bool) -> None:
    """torch's scaler would say "No inf checks were recorded", or make a step of the base."""
    loop = Loop()
    if has_gradient:
        loop.closure_of(batches(1, dtype=torch.float32)[0])()
    with pytest.raises(RuntimeError, match=r"step\(\) without a gradient of SAM.*" + LINES):
        loop.optimizer.step()


# --- SAMTrainer ---


def trainer_of(folder: Path, precision: str, model: Any, sam: dict[str, Any], **options: Any) -> Any:
    integration: Any = pytest.importorskip("sam_kernels.integrations.transformers")

    class Scaled(integration.SAMTrainer):
        factors: list[float] = []  # noqa: RUF012

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            scaled(self.accelerator)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * (self.factors.pop(0) if self.factors else 1.0)

    args = arguments(folder, **{precision: True}, **options)
    return recording(Scaled)(model, args, train_dataset=texts(), sam=sam)


def token_loss(precision: str, model: Any, batch: Any, count: int) -> Tensor:
    with torch.autocast("cpu", DTYPES[precision]):
        logits = model(input_ids=batch["input_ids"]).logits
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100) / count


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("accumulation", "ascent", "clip"), [(1, "micro_batch", 0.5), (2, "micro_batch", 0.0), (2, "batch", 0.5)])
def test_the_trainer_takes_sams_steps(
    precision: str, accumulation: int, ascent: str, clip: float, tmp_path: Path, compared: Compared
) -> None:
    model, expected = gpt2(torch.float32), gpt2(torch.float32)
    options = {"gradient_accumulation_steps": accumulation, "max_grad_norm": clip}
    trainer = trainer_of(tmp_path, precision, model, {"rho": RHO, "ascent": ascent}, **options)
    trainer.train()
    assert (trainer.accelerator.scaler is not None) is (precision == "fp16")
    scale = SCALE if precision == "fp16" else 1.0
    base = torch.optim.SGD(expected.parameters(), lr=LR)
    by_formula(
        expected, base, trainer.seen[:STEPS], lambda m, b, i: token_loss(precision, m, b, trainer.counts[i]), whole=ascent == "batch",
        clip=clip, scale=scale,
    )  # fmt: skip
    algorithm = "SAM of the accumulated batch" if ascent == "batch" else SAM_OR_M[accumulation]
    what = f"Trainer, {precision}: weights after {STEPS} steps, clip {clip}"
    bar = CLOSE_OF_GPT2[precision]
    if precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # emulated products: the two runs may round one otherwise
        bar = torch.finfo(torch.bfloat16).eps / 2
    compared("transformers", algorithm, what, error_of(model, expected), bar)


@pytest.mark.parametrize("ascent", ["micro_batch", "batch"])
@pytest.mark.parametrize("bad_pass", range(4))
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_the_trainer_skips_a_step_that_is_not_finite(ascent: str, bad_pass: int, clip: float, tmp_path: Path) -> None:
    """Two micro-batches of two passes: the first step is skipped, the scheduler waits, and the others are those of the formula."""
    model, expected = gpt2(torch.float32), gpt2(torch.float32)
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": clip, "max_steps": 3, "lr_scheduler_type": "linear"}
    trainer = trainer_of(tmp_path, "fp16", model, {"rho": RHO, "ascent": ascent}, **options)
    trainer.factors = [INF if i == bad_pass else 1.0 for i in range(4)]
    trainer.train()
    logs = trainer.state.log_history
    assert [each["sam_skipped_steps"] for each in logs[:3]] == [1.0, 1.0, 1.0]
    assert [each["learning_rate"] for each in logs[:3]] == pytest.approx([LR, LR, LR * 2 / 3])
    assert trainer.accelerator.scaler.get_scale() == SCALE / 2
    base = torch.optim.SGD(expected.parameters(), lr=LR)

    def next_rate() -> None:
        base.param_groups[0]["lr"] = LR * 2 / 3

    by_formula(
        expected, base, trainer.seen[1:3], lambda m, b, i: token_loss("fp16", m, b, trainer.counts[1 + i]), whole=ascent == "batch",
        clip=clip, scale=SCALE / 2, after=next_rate,
    )  # fmt: skip
    assert error_of(model, expected) <= CLOSE_OF_GPT2["fp16"]
