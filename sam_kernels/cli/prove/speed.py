"""The optimizer's step beside a loop of torch's own operations, and norms per sample beside one backward pass for each sample."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sam_kernels
from sam_kernels.cli.prove.claims import Bar, Jobs, Measured
from sam_kernels.cli.train.peer import PlainSAM

__all__ = ["gradient_norms", "optimizer_step"]

RHO, LR, MOMENTUM = 0.05, 0.1, 0.9
CLOSE = 1e-5  # relative, of norms in float32


def optimizer_step(quick: bool, jobs: Jobs) -> Measured:
    """Ascent and update of 11 million weights in 62 tensors, as of a ResNet-18, by SGD with momentum: medians of rounds in turns."""
    torch.manual_seed(0)
    shapes = _resnet18()
    ours, theirs = ([nn.Parameter(torch.empty(shape)) for shape in shapes] for _ in range(2))
    for a, b in zip(ours, theirs, strict=True):
        nn.init.normal_(a, std=0.01)
        b.data.copy_(a)
    grads = [torch.randn(shape) for shape in shapes]
    optimizer = sam_kernels.SAM(ours, torch.optim.SGD, rho=RHO, lr=LR, momentum=MOMENTUM)
    base = torch.optim.SGD(theirs, lr=LR, momentum=MOMENTUM, fused=True)
    loop = PlainSAM(base, nn.ParameterList(theirs), RHO)

    def one(params: list[nn.Parameter], first: Callable[[], None], second: Callable[[], None]) -> float:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()
        start = time.perf_counter()
        first()
        second()
        return time.perf_counter() - start

    rounds = []
    for _ in range(15 if quick else 40):
        own = one(ours, optimizer.first_step, optimizer.second_step)
        rounds.append((own, one(theirs, loop.first_step, loop.second_step)))
    rounds = rounds[3:]
    is_right = all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(ours, theirs, strict=True))
    bars = [Bar(label, 1e3 * statistics.median(each[k] for each in rounds), None) for k, label in enumerate(("sam_kernels", "torch loop"))]
    settings = {"weights": sum(map(torch.numel, ours)), "threads": torch.get_num_threads(), "rounds": len(rounds)}
    return Measured(statistics.median(b / a for a, b in rounds), None, bars, settings, "ms", is_right)


def _resnet18() -> list[tuple[int, ...]]:
    """Weights of ResNet-18 for 10 classes: convolutions, normalisations, the head."""
    shapes: list[tuple[int, ...]] = [(64, 3, 3, 3), (64,), (64,)]
    channels = 64
    for width in (64, 128, 256, 512):
        for block in range(2):
            inputs = channels if block == 0 else width
            shapes += [(width, inputs, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if block == 0 and inputs != width:
                shapes += [(width, inputs, 1, 1), (width,), (width,)]
        channels = width
    return [*shapes, (10, 512), (10,)]


def gradient_norms(quick: bool, jobs: Jobs) -> Measured:
    """Norms of 128 samples' gradients from one pass, and from a backward pass for each: equal to 1e-5, and times."""
    torch.manual_seed(0)
    samples = 64 if quick else 128
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()
    )
    model.extend([nn.Flatten(), nn.Linear(32 * 14 * 14, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 10)])
    images, labels = torch.randn(samples, 1, 28, 28), torch.randint(0, 10, (samples,))
    engine, params = sam_kernels.per_sample.GradNorms(model), list(model.parameters())

    def at_once() -> Tensor:
        with engine:
            losses = F.cross_entropy(model(images), labels, reduction="none")
        return engine(losses, keep=False)

    def one_by_one() -> Tensor:
        norms = []
        for i in range(samples):
            grads = torch.autograd.grad(F.cross_entropy(model(images[i : i + 1]), labels[i : i + 1]), params)
            norms.append(torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt())
        return torch.stack(norms)

    def timed(make: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        make()
        return time.perf_counter() - start

    error = ((at_once().double() - one_by_one()).abs() / one_by_one()).max().item()
    rounds = [(timed(at_once), timed(one_by_one)) for _ in range(5)]
    bars = [Bar(label, 1e3 * statistics.median(each[k] for each in rounds), None) for k, label in enumerate(("GradNorms", "one by one"))]
    settings = {"samples": samples, "largest_relative_error": error, "threads": torch.get_num_threads()}
    return Measured(statistics.median(b / a for a, b in rounds), None, bars, settings, "ms", error <= CLOSE)
