"""A small language model on 8 KiB of text, by AdamW, SAM and RW-SAM: more epochs than the text supports, so that AdamW overfits.

    pip install sam_kernels
    python examples/rwsam_language_model.py [seed]

It prints bits per character before and after training, and those of the best epoch, which is chosen on the held-out text itself. RW-SAM's
diagnostics show how uneven the samples' weights p are: the effective sample size is 1 / Σ p², the size of the batch where all are equal.
"""

from __future__ import annotations

import math
import sys
from pydoc_data.topics import topics  # the text of Python's help, which is wherever Python is
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_kernels import RWSAM, SAM

CHARACTERS, CONTEXT, WIDTH, WINDOWS, BATCH, EPOCHS, LR, RHO, BETA = 128, 32, 64, 256, 16, 30, 3e-3, 0.8, 1.0
torch.set_num_threads(1)  # so small a model has no work for more


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(CHARACTERS, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.block = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, F.gelu, batch_first=True, norm_first=True)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHARACTERS))

    def sample_losses(self, windows: Tensor) -> Tensor:  # (B, CONTEXT + 1) -> (B,)
        x = self.tokens(windows[:, :-1]) + self.positions(torch.arange(CONTEXT))
        logits = self.head(self.block(x, nn.Transformer.generate_square_subsequent_mask(CONTEXT), is_causal=True))
        return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none").mean(1)

    def bits(self, windows: Tensor) -> float:
        with torch.no_grad():
            return self.sample_losses(windows).mean().item() / math.log(2)


def backward(model: Model, optimizer: Any, batch: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = model.sample_losses(batch).mean()
    loss.backward()
    return loss


def train(name: str, training: Tensor, held_out: Tensor) -> None:
    model, diagnostics = Model(), []
    best = before = model.bits(held_out)
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=LR)
    if name != "AdamW":
        optimizer = SAM(model.parameters(), optimizer, rho=RHO) if name == "SAM" else RWSAM(model, optimizer, rho=RHO, beta=BETA)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for batch in training[torch.randperm(WINDOWS)].split(BATCH):
            if name == "RW-SAM":  # takes the samples' losses and makes the gradients
                optimizer.step(lambda batch=batch: model.sample_losses(batch))
                diagnostics.append(optimizer.diagnostics())
            else:
                optimizer.step(lambda batch=batch: backward(model, optimizer, batch))
        schedule.step()
        best = min(best, model.bits(held_out))
    last, fitted = model.bits(held_out), model.bits(training)
    print(f"{name}: held-out text {before:.3f} -> {last:.3f} (best epoch: {best:.3f}), training text {fitted:.3f}", flush=True)
    for when, found in zip(("first", "last"), diagnostics[:1] + diagnostics[-1:], strict=False):
        print(f"  {when} step: effective sample size {found['effective_sample_size']:.1f}, largest weight {found['max_weight']:.2f}")


if __name__ == "__main__":
    pages = sorted(topics.values(), key=len)[-24:]
    texts = (torch.tensor(list("\n".join(part).encode("ascii", "replace"))) for part in (pages[::2], pages[1::2]))
    training, held_out = (text.unfold(0, CONTEXT + 1, CONTEXT)[:WINDOWS] for text in texts)
    for name in ("AdamW", "SAM", "RW-SAM"):
        torch.manual_seed(int(sys.argv[1]) if len(sys.argv) > 1 else 0)  # the same initial weights and batches for all
        train(name, training, held_out)
