"""Norms, inner products and weighted gradients of real models, by default, against a backward pass for every sample in float64."""

from __future__ import annotations

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
