"""Norms, inner products and weighted gradients of real models, by default, against a backward pass for every sample in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sam_kernels import RWSAM
from sam_kernels.per_sample import GradNorms
from tests.frameworks.conftest import Compared
from tests.frameworks.models import BATCH, MODELS, token_losses
from tests.per_sample.brute import assert_right, run_engine, trainable

# Some layers compute in float32 whatever they are given: RMS norms of language models, positions of rotary attention.
FLOAT32_INSIDE = 1e-5
LARGE = 5_000_000  # parameters, of which B gradients in float64 are made: weighted gradients are left to the smaller models


@pytest.mark.parametrize("name", MODELS)
def test_the_gradients_of_samples(name: str, compared: Compared) -> None:
    torch.manual_seed(0)
    model, losses, x = MODELS[name]()
    model, x = model.double(), x.double() if x.is_floating_point() else x
    if sum(param.numel() for param in trainable(model).values()) < LARGE:
        error = assert_right(model, lambda: losses(model, x), relative=FLOAT32_INSIDE)
        compared(package_of(model), "GradNorms", f"{name}: norms, inner products, weighted gradients", error, FLOAT32_INSIDE)
        return
    _, made, norms = run_engine(model, lambda: losses(model, x))
    error = 0.0
    for i in range(BATCH):
        grads = torch.autograd.grad(made[i], list(trainable(model).values()), retain_graph=True, allow_unused=True)
        own = torch.stack([grad.square().sum() for grad in grads if grad is not None]).sum().sqrt()
        error = max(error, abs(norms[i].item() / own.item() - 1))
    compared(package_of(model), "GradNorms", f"{name}: norms", error, FLOAT32_INSIDE)


# Positions and relative biases made in one block and used in another, RMS norms and Conv1D without a rule, factors without a batch.
CHECKPOINTED = ("gpt2", "llama", "gemma", "gemma3", "phi3", "bert", "t5", "vit", "lora", "lora of gpt2", "dora")


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_the_gradients_of_samples_inside_checkpoints(name: str, compared: Compared) -> None:
    model, losses, x = checkpointed(name)
    model, x = model.double(), x.double() if x.is_floating_point() else x
    error = assert_right(model, lambda: losses(model, x), relative=FLOAT32_INSIDE, again=True)
    compared(package_of(model), "GradNorms", f"{name}, gradient checkpointing: norms, weighted gradients", error, FLOAT32_INSIDE)


def checkpointed(name: str) -> Any:
    """In training mode, with checkpoints as ``gradient_checkpointing_enable`` makes them without arguments."""
    torch.manual_seed(0)
    model, losses, x = MODELS[name]()
    model.train()
    model.gradient_checkpointing_enable()  # type: ignore[operator]
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return model, losses, x


@pytest.mark.parametrize("name", MODELS)
def test_verification_raises_no_alarm(name: str) -> None:
    """In training mode, so that random numbers are drawn, and samples depend on each other where a model's norms make them."""
    torch.manual_seed(0)
    model, losses, x = MODELS[name]()
    engine = GradNorms(model.train(), unsupported="verify")
    with engine:
        made = losses(model, x)
    assert engine(made, keep=False).isfinite().all()


def package_of(model: nn.Module) -> str:
    return type(model).__module__.partition(".")[0]


def test_a_mixture_of_experts_is_refused_by_name() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    model = transformers.MixtralForCausalLM(config)
    engine = GradNorms(model)
    with engine:
        losses = token_losses(model, torch.randint(0, 37, (BATCH, 7)))
    with pytest.raises(NotImplementedError, match=r"experts \(MixtralExperts\).*has no rule.*gate_up_proj.*Write a rule"):
        engine(losses)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "lora", "timm vit"])
def test_rwsam_takes_steps(name: str) -> None:
    torch.manual_seed(0)
    model, losses, x = MODELS[name]()
    optimizer = RWSAM(model, torch.optim.AdamW, lr=1e-3, beta=1.0, rho=0.05)
    found = [optimizer.step(lambda: losses(model, x)).item() for _ in range(5)]
    assert found[-1] < found[0]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_rwsam_takes_steps_through_checkpoints(name: str) -> None:
    model, losses, x = checkpointed(name)
    optimizer = RWSAM(model, torch.optim.AdamW, lr=1e-3, beta=1.0, rho=0.05)
    found = [optimizer.step(lambda: losses(model, x)).item() for _ in range(5)]
    assert found[-1] < found[0]


def test_reentrant_checkpoints_are_refused_by_name() -> None:
    torch.manual_seed(0)
    model, losses, x = MODELS["llama"]()
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})  # type: ignore[operator]
    model.enable_input_require_grads()  # type: ignore[operator]
    with (
        pytest.raises(RuntimeError, match=r"reentrant checkpoint.*gradient_checkpointing_kwargs={'use_reentrant': False}"),
        GradNorms(model),
    ):
        losses(model, x)
