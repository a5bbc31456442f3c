"""The models whose training steps are measured, and the batch and base optimizer of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.gpu.models import GPT2
from bench.per_sample.models import Transformer, resnet18
from bench.training.lora import add_lora
from sam_kernels.cli.train.model import small_cnn

__all__ = ["MODELS", "Kind", "loss_of", "stack"]

VOCABULARY = 1000  # of the small transformer


@dataclass(frozen=True)
class Kind:
    """A model, its batch and its base optimizer.

    Args:
        make: the model; ``make_quick``: a smaller one of the same make, for ``--quick``.
        base: a name of ``bench.providers.BASES``.
        batch, quick_batch: samples.
        inputs: samples -> inputs and labels, drawn from torch's generator.
        micro_batches: > 1: steps of m-SAM. The base takes one step over the whole batch.
        sets: how often models and optimizers are made anew, because where small tensors lie in memory moves a step by some percent.
        workload: a name of ``bench.workloads.WORKLOADS`` with the same shapes but for stem and head: memory is measured at these.
    """

    title: str
    make: Callable[[], nn.Module]
    make_quick: Callable[[], nn.Module]
    base: str
    batch: int
    quick_batch: int
    inputs: Callable[[int], tuple[Tensor, Tensor]]
    micro_batches: int = 1
    sets: int = 1
    workload: str | None = None


def loss_of(outputs: Tensor, labels: Tensor) -> Tensor:  # (B, classes) or (B, T, classes) -> ()
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def _mlp(hidden: int) -> nn.Module:
    layers = [nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
    return nn.Sequential(*layers)


def _images(channels: int, size: int, batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, channels, size, size), torch.randint(10, (batch,))


def _tokens(tokens: int, vocabulary: int, batch: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(vocabulary, (batch, tokens + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def _quick_transformer() -> nn.Module:
    return Transformer(layers=2, vocabulary=VOCABULARY)


_RESNET = {"make": resnet18, "make_quick": resnet18, "base": "sgd", "inputs": partial(_images, 3, 32)}
_TRANSFORMER = {"base": "adamw", "batch": 8, "quick_batch": 1, "inputs": partial(_tokens, 128, VOCABULARY)}
MODELS = {
    "mlp": Kind(
        "MLP 784-1024-1024-10, batch 128",
        partial(_mlp, 1024),
        partial(_mlp, 128),
        "sgd",
        128,
        16,
        lambda batch: (torch.randn(batch, 784), torch.randint(10, (batch,))),
        sets=4,
    ),
    "cnn": Kind(
        "CNN of `train`, 28×28, batch 128",
        partial(small_cnn, 28),
        partial(small_cnn, 28, width=8),
        "sgd",
        128,
        8,
        partial(_images, 1, 28),
        sets=4,
    ),
    "resnet18": Kind("ResNet-18, 32×32, batch 32", batch=32, quick_batch=2, workload="resnet18", **_RESNET),
    "transformer": Kind("transformer, 6 layers, d 384, 8 × 128 tokens", Transformer, _quick_transformer, **_TRANSFORMER),
    "gpt2_124m": Kind(
        "GPT-2 124M, 1 × 64 tokens",
        GPT2,
        lambda: GPT2(layers=2, vocabulary=5000),
        "adamw",
        1,
        1,
        partial(_tokens, 64, 5000),
        workload="gpt2_124m",
    ),
    "lora": Kind(
        "LoRA of rank 8 on the transformer", lambda: add_lora(Transformer()), lambda: add_lora(_quick_transformer()), **_TRANSFORMER
    ),
    "msam": Kind("m-SAM, 4 micro-batches, ResNet-18, batch 32", batch=32, quick_batch=8, micro_batches=4, **_RESNET),
}


def _stack(tensors: int, width: int) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(tensors)), nn.Linear(width, 10, bias=False))


def stack(tensors: int, elements: int, batch: int) -> Kind:
    """Linear layers of one width, one behind the other: so many parameters of so many elements altogether (the head of 10 apart)."""
    width = round((elements / (tensors - 1)) ** 0.5)
    make = partial(_stack, tensors - 1, width)
    title = f"{tensors} tensors, {elements:,} elements, batch {batch}"
    return Kind(title, make, make, "adamw", batch, batch, lambda count: (torch.randn(count, width), torch.randint(10, (count,))), sets=2)
