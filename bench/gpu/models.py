"""The models whose whole training steps are measured, of plain torch layers: ResNet-50 and GPT-2 124M, and tiny ones of the same make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.per_sample.models import Transformer

__all__ = ["GPT2", "MODELS", "ModelKind", "ResNet50"]


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions around a shortcut (arXiv 1512.03385, figure 5). The 3×3 has the stride."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = self.expansion * width
        self.conv1, self.norm1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.norm3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        same = stride == 1 and channels == out
        self.shortcut = nn.Identity() if same else nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.shortcut(x))


class ResNet50(nn.Sequential):
    """arXiv 1512.03385, table 1: (B, 3, H, W) -> (B, classes)."""

    def __init__(self, *, width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                layers.append(Bottleneck(channels, width << stage, 2 if stage > 0 and block == 0 else 1))
                channels = Bottleneck.expansion * (width << stage)
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class GPT2(Transformer):
    """Radford et al., "Language models are unsupervised multitask learners", 2019: (B, T) -> (B, T, vocabulary). The head is the token
    embedding."""

    def __init__(self, *, dim: int = 768, layers: int = 12, heads: int = 12, tokens: int = 1024, vocabulary: int = 50257) -> None:
        super().__init__(dim=dim, layers=layers, heads=heads, tokens=tokens, vocabulary=vocabulary)
        nn.init.normal_(self.token.weight, std=0.02)  # as a head it multiplies what has a variance of 1
        self.head.weight = self.token.weight


@dataclass(frozen=True)
class ModelKind:
    """A model, how it is trained, and its batch. ``scales``: its loss is scaled, as gradients in float16 need it."""

    title: str
    make: Callable[[], nn.Module]
    make_tiny: Callable[[], nn.Module]
    base: str  # of bench.providers.BASES
    dtype: str  # of the arithmetic, as in the tables
    weights: torch.dtype
    scales: bool
    batch: int
    inputs: Callable[[int, bool], tuple[Tensor, Tensor]]  # (samples, tiny?) -> inputs and labels, on the current device


def _images(batch: int, is_tiny: bool) -> tuple[Tensor, Tensor]:
    size, classes = (32, 10) if is_tiny else (224, 1000)
    return torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last), torch.randint(classes, (batch,))


def _tokens(batch: int, is_tiny: bool) -> tuple[Tensor, Tensor]:
    tokens, vocabulary = (8, 50) if is_tiny else (1024, 50257)
    ids = torch.randint(vocabulary, (batch, tokens + 1))
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


MODELS = {
    "resnet50": ModelKind(
        "ResNet-50, 224×224, channels_last, float16 autocast and GradScaler",
        ResNet50,
        lambda: ResNet50(width=4, blocks=(1, 1, 1, 1), classes=10),
        "sgd",
        "fp16",
        torch.float32,
        scales=True,
        batch=128,
        inputs=_images,
    ),
    "gpt2_124m": ModelKind(
        "GPT-2 124M, 1,024 tokens, bfloat16",
        GPT2,
        lambda: GPT2(dim=16, layers=1, heads=2, tokens=8, vocabulary=50),
        "adamw",
        "bf16",
        torch.bfloat16,
        scales=False,
        batch=16,
        inputs=_tokens,
    ),
}
