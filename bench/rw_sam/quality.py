"""How well the weights of RWSAM rank samples: against the norm of each sample's gradient, by autograd, one by one, in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import sam_kernels
from bench.per_sample.models import mlp, sample_losses
from bench.rw_sam.providers import has_norm_layers
from sam_kernels.cli.train.data import load
from sam_kernels.cli.train.model import small_cnn

__all__ = ["ESTIMATES", "MODELS", "Estimate", "Trained", "brute_force_norms", "measure", "trained"]

SAMPLES = 256
DRAWS = 9  # of random directions


@dataclass(frozen=True)
class Model:
    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of an image


# The network with BatchNorm is used in evaluation mode: there a sample has a gradient of its own.
MODELS = {
    "mnist_mlp": Model("MLP 784-1024-1024-1024-10, MNIST", mlp, (784,)),
    "mnist_cnn": Model("CNN of `train`, BatchNorm in evaluation mode, MNIST", lambda: small_cnn(28), (1, 28, 28)),
}


@dataclass(frozen=True)
class Estimate:
    title: str
    options: dict[str, Any]
    is_random: bool = False


ESTIMATES = {
    "exact": Estimate("exact", {"norms": "exact"}),
    "finite_difference": Estimate("finite differences, K = 1", {"norms": "finite_difference"}, is_random=True),
    "finite_difference_16": Estimate("finite differences, K = 16", {"norms": "finite_difference", "num_directions": 16}, is_random=True),
    "jvp": Estimate("directional derivatives, K = 1", {"norms": "jvp"}, is_random=True),
    "last_layer": Estimate("last layer", {"norms": "last_layer"}),
    "norm_layers": Estimate("normalisation layers", {"norms": "norm_layers"}),
}


@dataclass
class Trained:
    """A model after some steps, when some samples are learnt and others are not, and samples it was trained on."""

    model: nn.Module
    inputs: Tensor
    labels: Tensor

    def losses(self) -> Tensor:
        return sample_losses(self.model(self.inputs), self.labels)


def trained(name: str, *, steps: int = 60, samples: int = SAMPLES) -> Trained:
    """By SGD on batches of 64 images. The same numbers at every call."""
    torch.manual_seed(0)
    data = load("mnist5k")
    images, labels = data.train_images.reshape(-1, *MODELS[name].shape), data.train_labels
    model = MODELS[name].make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
    chosen = torch.randperm(len(labels))[:samples]
    return Trained(model.eval(), images[chosen], labels[chosen])


def brute_force_norms(problem: Trained) -> Tensor:  # (B,) float64
    model, inputs = copy.deepcopy(problem.model).double(), problem.inputs.double()
    norms = []
    for sample, label in zip(inputs.split(1), problem.labels.split(1), strict=True):
        grads = torch.autograd.grad(sample_losses(model(sample), label).sum(), list(model.parameters()))
        norms.append(torch.stack([grad.square().sum() for grad in grads]).sum().sqrt())
    return torch.stack(norms)


def measure(name: str, problem: Trained, *, draws: int = DRAWS) -> Iterator[dict[str, Any]]:
    """A row an estimate: the median rank correlation over the draws of its directions, the least and the greatest."""
    truth = brute_force_norms(problem)
    for estimate, kind in ESTIMATES.items():
        if kind.options["norms"] == "norm_layers" and not has_norm_layers(problem.model):
            continue
        found = [_rank_correlation(problem, truth, kind.options, seed) for seed in range(draws if kind.is_random else 1)]
        yield {
            "kind": "quality",
            "model": name,
            "provider": estimate,
            "draws": len(found),
            "rank_correlation": float(np.median(found)),
            "least": min(found),
            "greatest": max(found),
        }


def _rank_correlation(problem: Trained, truth: Tensor, options: dict[str, Any], seed: int) -> float:
    beta = 1.0 / truth.mean().item()  # small enough for no weight to be rounded to 0, where ranks are lost
    # A step of length 0 restores the weights bit for bit: the next estimate finds the same model.
    optimizer = sam_kernels.RWSAM(problem.model, torch.optim.SGD, beta=beta, seed=seed, lr=0.0, **options)
    optimizer.step(problem.losses)
    return float(spearmanr(optimizer.last_weights.numpy(), truth.numpy()).statistic)
