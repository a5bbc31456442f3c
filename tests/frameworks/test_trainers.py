"""SAM inside of trainers, after five steps, against the formula in float64; resumed runs, bit for bit; what is refused."""

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

RHO, LR, STEPS = 0.05, 0.1, 5
VOCABULARY = 37
SAM_OR_M = {1: "SAM", 2: "m-SAM by accumulation", 3: "m-SAM by accumulation"}
Losses = Callable[[nn.Module, Any, int], Tensor]


def by_formula(model: nn.Module, base: torch.optim.Optimizer, steps: list[list[Any]], loss: Losses, *, whole: bool, clip: float) -> None:
    """SAM written out. ``steps``: the micro-batches of each; ``whole``: one perturbation for all of a step. ``loss(model, batch, i)`` is a
    micro-batch's share of the loss of step i."""
    params = list(model.parameters())
    for i, micro_batches in enumerate(steps):
        total = [torch.zeros_like(param) for param in params]
        for group in [micro_batches] if whole else [[each] for each in micro_batches]:
            grads = torch.autograd.grad(torch.stack([loss(model, each, i) for each in group]).sum(), params)
            norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
            start = [param.detach().clone() for param in params]
            with torch.no_grad():
                for param, grad in zip(params, grads, strict=True):
                    param.add_(RHO * grad / (norm + 1e-12))
            sharp = torch.autograd.grad(torch.stack([loss(model, each, i) for each in group]).sum(), params)
            with torch.no_grad():
                for param, old in zip(params, start, strict=True):
                    param.copy_(old)
            total = [before + grad for before, grad in zip(total, sharp, strict=True)]
        if clip:
            length = torch.stack([grad.square().sum() for grad in total]).sum().sqrt()
            total = [grad * min(1.0, clip / (length.item() + 1e-6)) for grad in total]
        for param, grad in zip(params, total, strict=True):
            param.grad = grad
        base.step()


def error_of(model: nn.Module, expected: nn.Module) -> float:
    """The largest relative error of a parameter."""
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    return max(((param - right).norm() / right.norm()).item() for param, right in pairs)


# --- Hugging Face's Trainer ---


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).double()


def texts() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, VOCABULARY, (7,), generator=generator) for _ in range(48)]
    return [{"input_ids": each, "labels": each.clone()} for each in ids]


def arguments(folder: Path, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    usual = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "optim": "sgd",  # Adam would make large differences of the smallest gradients, which are float32 in a loss of transformers
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
    }
    return transformers.TrainingArguments(**{**usual, **options})


@pytest.mark.parametrize(("accumulation", "ascent", "clip"), [(1, "micro_batch", 0.5), (2, "micro_batch", 0.0), (2, "batch", 0.5)])
def test_the_trainer_takes_sams_steps(tmp_path: Path, accumulation: int, ascent: str, clip: float, compared: Compared) -> None:
    integration: Any = pytest.importorskip("sam_kernels.integrations.transformers")
    seen: list[list[Any]] = []
    counts: list[int] = []  # of tokens, as the trainer counts them, by which it divides a sum of losses

    class Recording(integration.SAMTrainer):
        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            found = super().get_batch_samples(*args, **kwargs)
            seen.append([{name: value.clone() for name, value in each.items()} for each in found[0]])
            counts.append(int(found[1]))
            return found

    model, expected = gpt2(), gpt2()
    options = arguments(tmp_path, gradient_accumulation_steps=accumulation, max_grad_norm=clip)
    trainer = Recording(model, options, train_dataset=texts(), sam={"rho": RHO, "ascent": ascent})
    trainer.train()

    def loss(model: Any, batch: Any, i: int) -> Tensor:
        logits, labels = model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / counts[i]

    base = torch.optim.SGD(expected.parameters(), lr=LR)
    by_formula(expected, base, seen[:STEPS], loss, whole=ascent == "batch", clip=clip)
    algorithm = "SAM of the accumulated batch" if ascent == "batch" else SAM_OR_M[accumulation]
    compared("transformers", algorithm, f"Trainer: weights after {STEPS} steps, clip {clip}", error_of(model, expected), 1e-5)
    log = trainer.state.log_history
    assert {"loss", "sam_rho", "sam_skipped_steps"} <= log[0].keys()
    first = torch.stack([loss(gpt2(), each, 0) for each in seen[0]]).sum().item()
    assert log[0]["loss"] == pytest.approx(first, rel=1e-6)  # at the weights


def test_a_trainer_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    integration: Any = pytest.importorskip("sam_kernels.integrations.transformers")

    def run(folder: Path, resume: bool) -> nn.Module:
        model = gpt2()
        options = arguments(folder, save_strategy="steps", save_steps=3, lr_scheduler_type="linear", optim="adamw_torch")
        trainer = integration.SAMTrainer(model, options, train_dataset=texts(), sam={"rho": RHO})
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
        return model

    whole, continued = run(tmp_path, False), run(tmp_path, True)
    for param, right in zip(continued.parameters(), whole.parameters(), strict=True):
        assert torch.equal(param, right)


@pytest.mark.parametrize("has_samples", [True, False])
def test_the_trainer_with_reweighted_samples(tmp_path: Path, has_samples: bool) -> None:
    integration: Any = pytest.importorskip("sam_kernels.integrations.transformers")

    class Reduced(integration.SAMTrainer):
        def compute_sample_losses(self, model: Any, inputs: Any) -> Tensor:
            loss: Tensor = model(**inputs).loss
            return loss

    kind = integration.SAMTrainer if has_samples else Reduced
    trainer = kind(gpt2(), arguments(tmp_path), train_dataset=texts(), sam={"rho": RHO, "beta": 1.0})
    if has_samples:
        trainer.train()
        losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
        assert len(losses) == STEPS
        return
    with pytest.raises(TypeError, match=r"compute_sample_losses must return the samples' losses, shape \(B,\).*reduction='none'"):
        trainer.train()


def test_a_trainer_without_the_mixin_is_not_silent(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    model = gpt2()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=LR, rho=RHO)
    trainer = transformers.Trainer(model, arguments(tmp_path), train_dataset=texts(), optimizers=(optimizer, None))
    with pytest.warns(UserWarning, match=r"step\(closure\)"):
        trainer.train()


def test_a_trainer_with_another_optimizer_is_refused(tmp_path: Path) -> None:
    integration: Any = pytest.importorskip("sam_kernels.integrations.transformers")
    with pytest.raises(ValueError, match="one of 'micro_batch', 'batch', got 'all'"):
        integration.SAMTrainer(gpt2(), arguments(tmp_path), sam={"ascent": "all"})

    class Changed(integration.SAMTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
            return self.optimizer

    with pytest.raises(RuntimeError, match=r"Changed\(..., sam=dict\(rho=0.05\)\)"):
        Changed(gpt2(), arguments(tmp_path), train_dataset=texts()).train()


# --- accelerate ---


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("is_two_step", [False, True])
def test_accelerate_takes_sams_steps(accumulation: int, is_two_step: bool, tmp_path: Path, compared: Compared) -> None:
    integration: Any = pytest.importorskip("sam_kernels.integrations.accelerate")
    if is_two_step and accumulation > 1:
        pytest.skip("the two-step API has one batch a step")

    def model_of() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    batches = [(torch.randn(4, 5, dtype=torch.float64), torch.randint(0, 3, (4,))) for _ in range(STEPS * accumulation)]
    accelerator = integration.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model, optimizer = model_of(), None
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=LR, momentum=0.9, rho=RHO)
    model, optimizer = accelerator.prepare(model, optimizer)
    for x, y in batches:
        with accelerator.accumulate(model):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                return loss

            if is_two_step:
                closure()
                optimizer.first_step(zero_grad=True)
                closure()
                optimizer.second_step(zero_grad=True)
                continue
            optimizer.backward(closure)
            optimizer.step()
            optimizer.zero_grad()
    expected = model_of()
    steps = [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]
    base = torch.optim.SGD(expected.parameters(), lr=LR, momentum=0.9)
    by_formula(expected, base, steps, lambda m, b, _: F.cross_entropy(m(b[0]), b[1]) / accumulation, whole=False, clip=0.0)
    api = "first_step, second_step" if is_two_step else "backward"
    compared("accelerate", SAM_OR_M[accumulation], f"{api}: weights after {STEPS} steps", error_of(model, expected), 1e-12)
    accelerator.save_state(str(tmp_path))
    before = [value.clone() for value in next(iter(optimizer.state.values())).values() if isinstance(value, Tensor)]
    accelerator.load_state(str(tmp_path))
    after = [value for value in next(iter(optimizer.state.values())).values() if isinstance(value, Tensor)]
    assert all(map(torch.equal, before, after))
