"""``SAMTrainer`` after five steps, against the formula in float64; what it logs, and runs that are resumed, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.frameworks.conftest import Compared
from tests.frameworks.formula import LR, RHO, SAM_OR_M, STEPS, by_formula, error_of, reweighted, same_bits
from tests.frameworks.hugging_face import VOCABULARY, arguments, forget_accelerate, gpt2, recording, texts, token_loss

integration: Any = pytest.importorskip("sam_kernels.integrations.transformers")
fresh = pytest.fixture(autouse=True)(forget_accelerate)


@pytest.mark.parametrize(("accumulation", "ascent", "clip"), [(1, "micro_batch", 0.5), (2, "micro_batch", 0.0), (2, "batch", 0.5)])
def test_the_trainer_takes_sams_steps(tmp_path: Path, accumulation: int, ascent: str, clip: float, compared: Compared) -> None:
    model, expected = gpt2(), gpt2()
    options = arguments(tmp_path, gradient_accumulation_steps=accumulation, max_grad_norm=clip)
    trainer = recording(integration.SAMTrainer)(model, options, train_dataset=texts(), sam={"rho": RHO, "ascent": ascent})
    trainer.train()

    def loss(model: nn.Module, batch: Any, i: int) -> Tensor:
        return token_loss(model, batch, trainer.counts[i])

    base = torch.optim.SGD(expected.parameters(), lr=LR)
    by_formula(expected, base, trainer.seen[:STEPS], loss, whole=ascent == "batch", clip=clip)
    algorithm = "SAM of the accumulated batch" if ascent == "batch" else SAM_OR_M[accumulation]
    compared("transformers", algorithm, f"Trainer: weights after {STEPS} steps, clip {clip}", error_of(model, expected), 1e-5)
    log = trainer.state.log_history
    assert {"loss", "sam_rho", "sam_skipped_steps"} <= log[0].keys()
    first = torch.stack([loss(gpt2(), each, 0) for each in trainer.seen[0]]).sum().item()
    assert log[0]["loss"] == pytest.approx(first, rel=1e-6)  # at the weights


@pytest.mark.parametrize("accumulation", [1, 2])
def test_label_smoothing_and_a_schedule(tmp_path: Path, accumulation: int, compared: Compared) -> None:
    model, expected = gpt2(), gpt2()
    options = arguments(
        tmp_path, gradient_accumulation_steps=accumulation, label_smoothing_factor=0.2, lr_scheduler_type="linear", warmup_steps=2
    )
    trainer = recording(integration.SAMTrainer)(model, options, train_dataset=texts(), sam={"rho": RHO})
    trainer.train()

    def loss(model: nn.Module, batch: Any, i: int) -> Tensor:
        return token_loss(model, batch, trainer.counts[i], smoothing=0.2)

    base = torch.optim.SGD(expected.parameters(), lr=LR)
    rates = iter([0.5 * LR, LR, *(LR * (STEPS - i) / (STEPS - 2) for i in range(3, STEPS + 1))])

    def next_rate() -> None:
        base.param_groups[0]["lr"] = next(rates)

    base.param_groups[0]["lr"] = 0.0  # of the first step of the warm-up
    by_formula(expected, base, trainer.seen[:STEPS], loss, whole=False, clip=0.0, after=next_rate)
    what = f"Trainer: label smoothing, warm-up and decay, {STEPS} steps"
    compared("transformers", SAM_OR_M[accumulation], what, error_of(model, expected), 1e-5)


@pytest.mark.parametrize("kind", ["λ = 0.3", "a mean of the batch"])
def test_micro_batches_have_gradients_of_their_own_length(tmp_path: Path, kind: str, compared: Compared) -> None:
    """USAM's perturbation is as long as the gradient; a loss without the number of tokens is divided by the number of micro-batches. An
    epoch of seven micro-batches ends with a step of one."""
    seen_epoch, k = 7, 2

    class MeanOfTheBatch(integration.SAMTrainer):
        loss_is_scaled_for_ga = False

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
            labels = inputs.pop("labels")
            return F.cross_entropy(model(**inputs).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    kind_of_trainer = integration.SAMTrainer if kind.startswith("λ") else MeanOfTheBatch
    lambd = 0.3 if kind.startswith("λ") else 1.0
    model, expected = gpt2(), gpt2()
    options = arguments(tmp_path, gradient_accumulation_steps=k)
    data = texts(4 * seen_epoch)
    trainer = recording(kind_of_trainer)(model, options, train_dataset=data, sam={"rho": RHO, "lambd": lambd})
    trainer.train()
    steps = trainer.seen[:STEPS]
    assert [len(each) for each in steps] == [2, 2, 2, 1, 2]

    def loss(model: nn.Module, batch: Any, i: int) -> Tensor:
        if kind_of_trainer is integration.SAMTrainer:
            return token_loss(model, batch, trainer.counts[i])
        return token_loss(model, batch, int((batch["labels"][:, 1:] != -100).sum())) / len(steps[i])

    by_formula(expected, torch.optim.SGD(expected.parameters(), lr=LR), steps, loss, whole=False, clip=0.0, lambd=lambd)
    compared("transformers", "m-SAM by accumulation", f"Trainer: {kind}, a shorter last step", error_of(model, expected), 1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_trainer_weights_samples(tmp_path: Path, accumulation: int, smoothing: float, compared: Compared) -> None:
    model, expected = gpt2(), gpt2()
    options = arguments(tmp_path, gradient_accumulation_steps=accumulation, label_smoothing_factor=smoothing)
    trainer = recording(integration.SAMTrainer)(model, options, train_dataset=texts(), sam={"rho": RHO, "beta": 2.0})
    trainer.train()

    def losses(model: Any, batch: Any) -> Tensor:
        logits, labels = model(input_ids=batch["input_ids"]).logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:]
        each = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100, label_smoothing=smoothing)
        return each.sum(1) / (labels != -100).sum(1)

    reweighted(expected, torch.optim.SGD(expected.parameters(), lr=LR), trainer.seen[:STEPS], losses, beta=2.0)
    algorithm = "RW-SAM" if accumulation == 1 else "RW-SAM by accumulation"
    what = f"Trainer: weights after {STEPS} steps, label smoothing {smoothing}"
    compared("transformers", algorithm, what, error_of(model, expected), 1e-12)
    first = torch.stack([losses(gpt2(), each).mean() for each in trainer.seen[0]]).mean().item()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(first, rel=1e-6)  # the trainer adds up in float32
    assert 1.0 < log["sam_effective_sample_size"] < 4.0
    assert log["sam_min_norm"] < log["sam_mean_norm"] < log["sam_max_norm"]


@pytest.mark.parametrize("algorithm", ["SAM", "RW-SAM"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_is_resumed_bit_for_bit(tmp_path: Path, algorithm: str, accumulation: int, compared: Compared) -> None:
    sam: dict[str, Any] = {"rho": RHO} if algorithm == "SAM" else {"rho": RHO, "beta": 1.0, "sampling": "draw", "draws": 2}

    def run(folder: Path, resume: bool) -> nn.Module:
        model = gpt2()
        options = arguments(
            folder, save_strategy="steps", save_steps=3, lr_scheduler_type="linear", optim="adamw_torch",
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer = integration.SAMTrainer(model, options, train_dataset=texts(), sam=sam)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
        return model

    whole, continued = run(tmp_path, False), run(tmp_path, True)
    assert same_bits(whole, gpt2()) != 0.0
    what = f"Trainer: resumed after 3 of {STEPS} steps, accumulation {accumulation}"
    compared("transformers", algorithm, what, same_bits(continued, whole), 0.0)


class Theirs:
    """What a subclass of Trainer may have: a loss and a step of its own."""

    calls: int
    passes: list[bool]

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        labels = inputs.pop("labels")  # of a copy
        this: Any = self
        this.passes.append(this.is_second_pass)
        logits = model(**inputs).logits
        loss = F.mse_loss(logits[:, :-1], F.one_hot(labels[:, 1:].clamp(min=0), VOCABULARY).to(logits.dtype))
        return (loss, {"logits": logits}) if return_outputs else loss

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        inputs["input_ids"] = inputs["input_ids"].flip(1)  # of the batch: within the mixin, of a copy
        inner: Any = super()
        loss: Tensor = inner.training_step(model, inputs, *args, **kwargs)
        return loss


@pytest.mark.parametrize("order", ["mixin before the trainer", "subclass of SAMTrainer"])
def test_another_trainers_loss_and_step(tmp_path: Path, order: str, compared: Compared) -> None:
    """The mixin runs the step of the trainer behind it twice. A step before it runs once, and what it calls runs twice."""
    import transformers

    class TheirTrainer(Theirs, transformers.Trainer):  # type: ignore[misc]
        pass

    before, behind = type("Before", (Theirs, integration.SAMTrainer), {}), type("Behind", (integration.SAMMixin, TheirTrainer), {})
    model, expected = gpt2(), gpt2()
    kind: Any = behind if order == "mixin before the trainer" else before
    trainer = recording(kind)(model, arguments(tmp_path), train_dataset=texts(), sam={"rho": RHO})
    trainer.calls, trainer.passes, trainer.loss_is_scaled_for_ga = 0, [], False
    trainer.train()
    assert trainer.calls == (2 if kind is behind else 1) * STEPS
    assert trainer.passes == [False, True] * STEPS

    def loss(model: Any, batch: Any, _: int) -> Tensor:
        logits = model(input_ids=batch["input_ids"].flip(1)).logits[:, :-1]
        return F.mse_loss(logits, F.one_hot(batch["labels"][:, 1:].clamp(min=0), VOCABULARY).double())

    base = torch.optim.SGD(expected.parameters(), lr=LR)
    by_formula(expected, base, trainer.seen[:STEPS], loss, whole=False, clip=0.0)
    compared("transformers", "SAM", f"Trainer: own loss and step, {order}", error_of(model, expected), 1e-12)


def test_an_optimizer_of_ones_own(tmp_path: Path, compared: Compared) -> None:
    """``optimizers=(SAM(...), None)``, with a radius that is a function: accelerate loads the optimizer's own checkpoint into it."""
    import warnings

    from sam_kernels import SAM

    model, expected = gpt2(), gpt2()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=LR, rho=lambda t: RHO)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="SAM")
        trainer = recording(integration.SAMTrainer)(model, arguments(tmp_path), train_dataset=texts(), optimizers=(optimizer, None))
        trainer.train()
    base = torch.optim.SGD(expected.parameters(), lr=LR)
    by_formula(expected, base, trainer.seen[:STEPS], lambda m, b, i: token_loss(m, b, trainer.counts[i]), whole=False, clip=0.0)
    compared("transformers", "SAM", "Trainer: optimizers=(SAM(...), None), rho a function", error_of(model, expected), 1e-5)
