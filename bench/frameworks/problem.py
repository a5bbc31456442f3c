"""What all loops train: a small GPT-2 of transformers, or a model whose passes take no time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bench.frameworks.operators import define_operators

__all__ = ["Problem", "Rows", "Stub"]

VOCABULARY = 512


class Stub(nn.Module):
    """Its forward pass returns at once: what is left of a step is what others do around the model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": self.weight.sum()}


class Rows(Dataset[dict[str, Tensor]]):
    """``length`` rows of tokens, the same ``kept`` ones again and again."""

    kept = 64

    def __init__(self, tokens: int, length: int) -> None:
        self.ids = torch.randint(0, VOCABULARY, (self.kept, tokens), generator=torch.Generator().manual_seed(0))
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index % self.kept]
        return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Problem:
    """A model and its batches. ``layers`` = 0: the :class:`Stub`."""

    layers: int = 4
    width: int = 128
    tokens: int = 64
    batch: int = 8

    def model(self) -> nn.Module:
        """Return a new model, the same whenever it is called. Its output has a key "loss"."""
        if self.layers == 0:
            return Stub()
        define_operators()
        import transformers

        torch.manual_seed(0)
        shape = {"vocab_size": VOCABULARY, "n_positions": self.tokens, "n_embd": self.width, "n_layer": self.layers, "n_head": 4}
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config = transformers.GPT2Config(**shape, **no_dropout, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLMLoss")
        model: nn.Module = transformers.GPT2LMHeadModel(config)
        return model.train()

    def rows(self, steps: int) -> Rows:
        return Rows(self.tokens, steps * self.batch)

    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("layers", "width", "tokens", "batch")}
