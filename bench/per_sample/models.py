"""Models of plain torch layers, which every provider takes, and a batch for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from sam_kernels.cli.train.model import small_cnn

__all__ = ["MODELS", "Problem", "make_problem", "runs_of"]


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.projection = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, dim)
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(attended.transpose(1, 2).reshape(batch, tokens, dim))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Token and position embeddings, blocks, a head of its own."""

    def __init__(self, *, dim: int = 384, layers: int = 6, heads: int = 6, tokens: int = 128, vocabulary: int = 1000) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, dim), nn.Embedding(tokens, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:  # (B, T) -> (B, T, vocabulary)
        positions = torch.arange(ids.shape[1], device=ids.device).repeat(
            len(ids), 1
        )  # every sample its own: contiguous, as Opacus wants it
        return self.head(self.norm(self.blocks(self.token(ids) + self.position(positions))))


class Residual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet18() -> nn.Module:
    """For 32×32 images: a stem of 3×3, no pooling before the first stage."""
    stages = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
    stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*stem, *(Residual(*stage) for stage in stages), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


def mlp() -> nn.Module:
    sizes = (784, 1024, 1024, 1024)
    layers = [layer for d, p in pairwise(sizes) for layer in (nn.Linear(d, p), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


@dataclass(frozen=True)
class Kind:
    title: str
    make: Callable[[], nn.Module]
    batch: int
    inputs: Callable[[int], Tensor]
    labels: Callable[[int], Tensor]
    turns: int = 1  # times as many rounds, where a pass takes milliseconds
    has_batch_norm: bool = False  # samples depend on each other: nothing to compare a single sample's gradient with


MODELS = {
    "transformer": Kind(
        "6-layer transformer, d 384, T 128, B 32",
        Transformer,
        32,
        lambda b: torch.randint(0, 1000, (b, 128)),
        lambda b: torch.randint(0, 1000, (b, 128)),
    ),
    "mlp": Kind("MLP 784-1024-1024-1024-10, B 256", mlp, 256, lambda b: torch.randn(b, 784), lambda b: torch.randint(0, 10, (b,)), turns=4),
    "resnet18": Kind(
        "ResNet-18, 32×32, B 32",
        resnet18,
        32,
        lambda b: torch.randn(b, 3, 32, 32),
        lambda b: torch.randint(0, 10, (b,)),
        has_batch_norm=True,
    ),
    "train_mnist": Kind(
        "CNN of `train`, BatchNorm, 28×28, B 128",
        lambda: small_cnn(28),
        128,
        lambda b: torch.randn(b, 1, 28, 28),
        lambda b: torch.randint(0, 10, (b,)),
        turns=8,
        has_batch_norm=True,
    ),
    "train_digits": Kind(
        "CNN of `train`, GroupNorm, 8×8, B 256",
        lambda: small_cnn(8, normalization="group"),
        256,
        lambda b: torch.randn(b, 1, 8, 8),
        lambda b: torch.randint(0, 10, (b,)),
        turns=8,
    ),
}


@dataclass
class Problem:
    """A model, a batch and the loss of every sample."""

    kind: Kind
    model: nn.Module
    inputs: Tensor
    labels: Tensor

    def losses(self, model: Any = None) -> Tensor:  # (B,)
        return sample_losses((model or self.model)(self.inputs), self.labels)


def sample_losses(outputs: Tensor, labels: Tensor) -> Tensor:  # (B, classes) or (B, T, classes) -> (B,)
    if outputs.dim() == 2:
        return F.cross_entropy(outputs, labels, reduction="none")
    return F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).sum(1)


def make_problem(name: str, batch: int | None = None) -> Problem:
    """The same numbers at every call."""
    kind = MODELS[name]
    torch.manual_seed(0)
    size = batch or kind.batch
    return Problem(kind, kind.make(), kind.inputs(size), kind.labels(size))


def runs_of(model: str, names: Sequence[str], providers: Mapping[str, Any], console: Console) -> dict[str, Callable[[], Any]]:
    """Return what is timed, by provider. Each has a model of its own: weights, gradients and hooks are not shared."""
    runs = {}
    for name in names:
        problem = make_problem(model)
        if (reason := providers[name].missing(problem)) is not None:
            console.print(f"{model}: skipped {name}: {reason}", style="dim", highlight=False)
        else:
            runs[name] = providers[name].make(problem)
    return runs
