"""Federated runs: clients with unlike labels, whose networks a server averages after each round; the clients train by SGD or by SAM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_kernels import SAM
from sam_kernels.cli.train.data import CLASSES, load
from sam_kernels.cli.train.model import small_cnn
from sam_kernels.optim.directions import Direction, FirstGradient, PerturbOptions

__all__ = ["BATCH", "CLIENTS", "DATA", "METHODS", "PER_ROUND", "Server", "average", "one_run", "split"]

DATA = "mnist5k"
CLIENTS, PER_ROUND = 10, 5  # of which that many are drawn in each round
BATCH = 32
LEAST = BATCH  # images of a client; a split that leaves one with fewer is drawn again
KEEPS = 5  # every fifth image of a client is held out where a radius is chosen
METHODS = {"fedavg": "FedAvg", "fedsam": "FedSAM", "server": "server's direction"}


class Server(Direction):
    """d = the change of the server's weights that the last round took back, the previous weights minus the present ones.

    The change follows the global gradient's negative, so d points uphill for all clients alike (FedLESAM, arXiv 2405.18890, with the last
    round in the place of the client's last active one). d needs no gradient: one forward and one backward pass a step. Memory: d, N s.

    Args:
        change: d of each parameter, in its shape.
    """

    name = "server"
    keeps = ("server",)
    first_gradient = FirstGradient.NONE

    def __init__(self, change: Mapping[Tensor, Tensor]) -> None:
        self._change = change

    def group_grads(self, step: Any) -> Any:
        if step.t == 1:
            for i, each in enumerate(step.groups):
                for _, lists in step.lists_of(i, each.group["params"]):
                    step.keep(self.keeps[0], lists, [self._change[param] for param in lists.params])
        return step.kept_as_grads(self.keeps[0])

    def perturb_options(self, step: Any, current: Any) -> PerturbOptions:
        return PerturbOptions(is_scaled=False)  # d is no gradient of a scaled loss


def one_run(method: str, lr: float, rho: float, alpha: float, seed: int, rounds: int, held_out: bool) -> dict[str, Any]:
    """Accuracy of the server's network in % after each round.

    The split, the initial weights, the clients of each round and their batches depend on ``seed`` alone. ``held_out``: a fifth of each
    client's images are kept back, and scored in the place of the test images.
    """
    images, labels, *scored = _data()
    generator = np.random.default_rng(seed)
    clients = split(labels, CLIENTS, alpha, generator)
    if held_out:
        kept = torch.cat([client[::KEEPS] for client in clients])
        scored = [images[kept], labels[kept]]
        clients = [client[torch.arange(len(client)) % KEEPS != 0] for client in clients]
    torch.manual_seed(seed)
    model = small_cnn(images.shape[-1], normalization="group")  # an average of running statistics would be no client's
    params, previous, accuracies = list(model.parameters()), None, []
    for _ in range(rounds):
        current = [param.detach().clone() for param in params]
        change = None if previous is None else {p: old - new for p, old, new in zip(params, previous, current, strict=True)}
        drawn = [clients[i] for i in generator.choice(CLIENTS, PER_ROUND, replace=False)]
        found = []
        for client in drawn:
            _set(params, current)
            optimizer = _optimizer(method, model, lr, rho, change)
            for batch in _batches(client, generator):
                _step(optimizer, model, images[batch], labels[batch])
            found.append([param.detach().clone() for param in params])
        _set(params, average(found, [len(client) for client in drawn]))
        previous = current
        accuracies.append(_accuracy(model, *scored))
    return {"accuracy": accuracies}


def split(labels: Tensor, clients: int, alpha: float, generator: np.random.Generator) -> list[Tensor]:
    """Indices of each client's images: those of each label are shared out in proportions drawn from a Dirichlet distribution."""
    while True:
        parts: list[list[Tensor]] = [[] for _ in range(clients)]
        for label in range(CLASSES):
            indices = torch.as_tensor(generator.permutation((labels == label).nonzero().flatten().numpy()))
            ends = (np.cumsum(generator.dirichlet(np.full(clients, alpha)))[:-1] * len(indices)).round().astype(int)
            for part, share in zip(parts, indices.tensor_split(torch.as_tensor(ends)), strict=True):
                part.append(share)
        found = [torch.as_tensor(generator.permutation(torch.cat(part).numpy())) for part in parts]
        if min(map(len, found)) >= LEAST:
            return found


def average(weights: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> list[Tensor]:
    """The mean of the clients' weights, each client counting by its images."""
    shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
    return [torch.einsum("i,i...->...", shares, torch.stack(each).double()).to(each[0].dtype) for each in zip(*weights, strict=True)]


@cache
def _data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images of 14 x 14, each pixel the mean of four, and labels: to train on, and to test on."""
    data = load(DATA)
    return F.avg_pool2d(data.train_images, 2), data.train_labels, F.avg_pool2d(data.test_images, 2), data.test_labels


def _optimizer(method: str, model: nn.Module, lr: float, rho: float, change: Mapping[Tensor, Tensor] | None) -> SAM:
    """A client's, new in each round. With rho = 0, as in the first round of the server's direction, a step is SGD's, with one pass."""
    is_perturbed = method == "fedsam" or (method == "server" and change is not None)
    options: dict[str, Any] = {"direction": Server(change)} if method == "server" and change is not None else {}
    return SAM(model.parameters(), torch.optim.SGD, lr=lr, rho=rho if is_perturbed else 0.0, model=model, **options)


def _batches(client: Tensor, generator: np.random.Generator) -> Iterator[Tensor]:
    """One epoch."""
    yield from client[torch.as_tensor(generator.permutation(len(client)))].split(BATCH)


def _step(optimizer: SAM, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    optimizer.step(closure)


@torch.no_grad()
def _set(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        param.copy_(value)


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * (model(images).argmax(1) == labels).double().mean().item()
