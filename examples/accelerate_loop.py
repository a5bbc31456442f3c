"""Digits with 40 % wrong labels in a loop of accelerate, with accumulation (m-SAM): AdamW, then SAM, and the accuracy of both.

pip install "sam_kernels[accelerate,train]"
accelerate launch --cpu examples/accelerate_loop.py
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sam_kernels import SAM
from sam_kernels.integrations.accelerate import Accelerator

EPOCHS, WRONG, ACCUMULATION = 30, 0.4, 2


def data() -> tuple[TensorDataset, Tensor, Tensor]:
    images, labels = (torch.as_tensor(each) for each in load_digits(return_X_y=True))
    train, test = train_test_split(range(len(labels)), test_size=0.3, stratify=labels, random_state=0)
    noisy, chosen = labels[train].clone(), torch.randperm(len(train))[: round(WRONG * len(train))]
    noisy[chosen] = (noisy[chosen] + torch.randint(1, 10, (len(chosen),))) % 10
    pixels = images.float() / 16
    return TensorDataset(pixels[train], noisy), pixels[test], labels[test]


def train(accelerator: Accelerator, rho: float) -> float:
    torch.manual_seed(0)
    training, images, labels = data()
    model: Any = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    options: dict[str, Any] = {"lr": 2e-3, "weight_decay": 1e-2}
    base = torch.optim.AdamW
    optimizer: Any = SAM(model.parameters(), base, rho=rho, **options) if rho else base(model.parameters(), **options)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(training, batch_size=64, shuffle=True))
    for _ in range(EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(model):

                def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                    loss = F.cross_entropy(model(x), y)
                    accelerator.backward(loss)
                    return loss

                if rho:
                    optimizer.backward(closure)  # SAM's gradient in the place of the loss's
                else:
                    closure()
                optimizer.step()
                optimizer.zero_grad()
    return (model(images.to(accelerator.device)).argmax(1).cpu() == labels).float().mean().item()


def main() -> None:
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATION)
    for rho in (0.0, 0.2):
        accuracy = train(accelerator, rho)
        accelerator.print(f"{'SAM' if rho else 'AdamW'}: {100 * accuracy:.1f} % of clean test images, {100 * WRONG:.0f} % wrong labels")


if __name__ == "__main__":
    main()
