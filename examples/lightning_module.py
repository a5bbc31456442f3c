"""Digits with 40 % wrong labels in PyTorch Lightning: SGD, then SAM, and the accuracy on clean test images of both.

pip install "sam_kernels[lightning,train]"
python examples/lightning_module.py
"""

from __future__ import annotations

import logging
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sam_kernels import SAM
from sam_kernels.integrations.lightning import SAMCallback

EPOCHS, WRONG = 30, 0.4
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def data() -> tuple[TensorDataset, Tensor, Tensor]:
    images, labels = (torch.as_tensor(each) for each in load_digits(return_X_y=True))
    train, test = train_test_split(range(len(labels)), test_size=0.3, stratify=labels, random_state=0)
    noisy, chosen = labels[train].clone(), torch.randperm(len(train))[: round(WRONG * len(train))]
    noisy[chosen] = (noisy[chosen] + torch.randint(1, 10, (len(chosen),))) % 10
    pixels = images.float() / 16
    return TensorDataset(pixels[train], noisy), pixels[test], labels[test]


class Digits(lightning.LightningModule):
    def __init__(self, rho: float) -> None:
        super().__init__()
        self.rho = rho
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        if self.rho == 0:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return SAM(self.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=self.rho)


def main() -> None:
    for rho in (0.0, 0.5):
        lightning.seed_everything(0, verbose=False)
        training, images, labels = data()
        module = Digits(rho)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        callbacks = [SAMCallback()] if rho else []
        trainer = lightning.Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=callbacks, **quiet)
        trainer.fit(module, DataLoader(training, batch_size=128, shuffle=True))
        accuracy = (module.net(images).argmax(1) == labels).float().mean()
        print(f"{'SAM' if rho else 'SGD'}: {100 * accuracy:.1f} % of clean test images, trained with {100 * WRONG:.0f} % wrong labels")


if __name__ == "__main__":
    main()
