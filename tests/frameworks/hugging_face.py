"""A small GPT-2, its batches, and trainers that note what they are given: for the tests of ``transformers`` and ``accelerate``."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tests.frameworks.conftest  # noqa: F401  # before transformers is imported, in processes of their own too
from tests.frameworks.formula import LR, STEPS

__all__ = [
    "VOCABULARY", "arguments", "batches", "forget", "forget_accelerate", "gpt2", "loss_of", "micro_batches_of", "net",
    "recording", "texts", "token_loss",
]  # fmt: skip

VOCABULARY = 37
Batch = tuple[Tensor, Tensor]


def forget() -> None:
    """accelerate keeps mixed precision, processes, accumulation and data loaders that have ended for the whole process."""
    state: Any = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    gc.collect()


def forget_accelerate() -> Iterator[None]:
    """A fixture's body: :func:`forget` after the test."""
    yield
    forget()


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batches(count: int, rank: int = 0, dtype: torch.dtype = torch.float64) -> list[Batch]:
    generator = torch.Generator().manual_seed(1 + rank)
    inputs = [torch.randn(4, 5, dtype=torch.float64, generator=generator).to(dtype) for _ in range(count)]
    return [(x, torch.randint(0, 3, (4,), generator=generator)) for x in inputs]


def loss_of(model: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def micro_batches_of(given: list[Any], accumulation: int) -> list[list[Any]]:
    return [given[i : i + accumulation] for i in range(0, len(given), accumulation)]


def gpt2(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=False, **options,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).to(dtype)


def texts(count: int = 48) -> list[dict[str, Tensor]]:
    """Every second one has labels that are not counted."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, VOCABULARY, (7,), generator=generator) for _ in range(count)]
    return [
        {"input_ids": each, "labels": each.clone().masked_fill(each % 3 == 0, -100) if i % 2 else each.clone()}
        for i, each in enumerate(ids)
    ]


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


def recording(trainer: type[Any]) -> type[Any]:
    """A subclass that keeps the micro-batches of each step in ``seen``, and in ``counts`` the tokens by which it divides their losses."""

    class Recording(trainer):  # type: ignore[misc]
        seen: list[list[Any]]
        counts: list[int]

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            found = super().get_batch_samples(*args, **kwargs)
            if not hasattr(self, "seen"):
                self.seen, self.counts = [], []
            self.seen.append([{name: value.clone() for name, value in each.items()} for each in found[0]])
            self.counts.append(0 if found[1] is None else int(found[1]))
            return found

    return Recording


def token_loss(model: Any, batch: Any, count: int, *, smoothing: float = 0.0) -> Tensor:
    """A micro-batch's share of the mean over ``count`` tokens."""
    logits, labels = model(input_ids=batch["input_ids"]).logits[:, :-1], batch["labels"][:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100, label_smoothing=smoothing)
    return total / count
