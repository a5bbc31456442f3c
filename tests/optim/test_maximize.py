"""Maximising f is minimising -f, for every member, group by group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import RWSAM, SAM
from tests.optim.family import MEMBERS as FAMILY
from tests.optim.family_runs import close, everything_of, make
from tests.optim.problem import loss_of, make_batch, make_model, twin, weights

MEMBERS = [
    "SAM",
    "VaSSO",
    "FriendlySAM",
    "Extragradient",
    "GCSAM",
    "RSAM",
    "GSAM",
    "WSAM-coupled",
    "WSAM-decoupled",
    "LookSAM",
    "MomentumSAM",
    "S2SAM",
]
BASES = ["sgd-momentum", "adamw", "rmsprop"]
CASES = [(name, BASES[(i + shift) % 3]) for i, name in enumerate(MEMBERS) for shift in (0, 1)]
CASES = [(name, base if (name, base) != ("MomentumSAM", "rmsprop") else "adam") for name, base in CASES]


def signed(optimizer: Any, model: nn.Module, signs: tuple[float, float], batch: Any) -> Callable[[], Tensor]:
    """The gradient of each layer multiplied by its sign, as if they were of two players."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        for layer, sign in zip((model[0], model[2]), signs, strict=True):
            for param in layer.parameters():
                if param.grad is not None:
                    param.grad.mul_(sign)
        return loss

    return closure


def groups_of(model: nn.Module, maximize: tuple[bool, bool] | None) -> list[dict[str, Any]]:
    options: list[dict[str, Any]] = [{}, {}] if maximize is None else [{"maximize": each} for each in maximize]
    return [{"params": list(model[i].parameters()), **option} for i, option in zip((0, 2), options, strict=True)]


@pytest.mark.parametrize("maximize", [(True, True), (True, False)], ids=["both", "one"])
@pytest.mark.parametrize(("name", "base"), CASES)
def test_maximising_is_minimising_the_negative(name: str, base: str, maximize: tuple[bool, bool]) -> None:
    model = make_model(torch.float64)
    other = twin(model)
    optimizer, expected = make(name, groups_of(model, maximize), base), make(name, groups_of(other, None), base)
    for step in range(4):
        batch = make_batch(torch.float64, step)
        optimizer.step(signed(optimizer, model, (1.0, 1.0), batch))
        expected.step(signed(expected, other, tuple(-1.0 if each else 1.0 for each in maximize), batch))  # type: ignore[arg-type]
    close(weights(model), weights(other), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("maximize", [(True, True), (True, False)], ids=["both", "one"])
@pytest.mark.parametrize("base", BASES)
def test_of_micro_batches_and_gradients_too(base: str, maximize: tuple[bool, bool]) -> None:
    signs: Any = tuple(-1.0 if each else 1.0 for each in maximize)
    for how in ("m-SAM", "backward", "two steps"):
        model = make_model(torch.float64)
        other = twin(model)
        optimizer, expected = make("SAM", groups_of(model, maximize), base), make("SAM", groups_of(other, None), base)
        for opt, net, sign in ((optimizer, model, (1.0, 1.0)), (expected, other, signs)):
            closures = [signed(opt, net, sign, make_batch(torch.float64, seed)) for seed in range(2)]
            for _ in range(2):
                if how == "m-SAM":
                    opt.step(closures)
                elif how == "backward":
                    opt.backward(closures[0])
                    opt.backward(closures[1])
                    opt.step()
                    opt.zero_grad()
                else:
                    closures[0]()
                    opt.first_step(zero_grad=True)
                    closures[1]()
                    opt.second_step(zero_grad=True)
        close(weights(model), weights(other), rtol=1e-11, atol=1e-12)


def test_sgd_makes_the_same_bits() -> None:
    """Without momentum every operation is odd in the gradient."""
    model = make_model()
    other = twin(model)
    optimizer, expected = (SAM(net.parameters(), torch.optim.SGD, lr=0.1, maximize=up) for net, up in ((model, True), (other, False)))
    for _ in range(3):
        optimizer.step(signed(optimizer, model, (1.0, 1.0), make_batch()))
        expected.step(signed(expected, other, (-1.0, -1.0), make_batch()))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(other), strict=True))


def test_the_ascent_of_a_maximiser_goes_to_worse_points() -> None:
    """Worse for who maximises is where the loss is lower."""
    model, losses = make_model(), []
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.01, maximize=True)
    optimizer.step(lambda: losses.append(signed(optimizer, model, (1.0, 1.0), make_batch())()))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("way", ["exact", "finite_difference"])
def test_rwsam_weights_the_same_samples(way: str) -> None:
    model = make_model(torch.float64)
    other = twin(model)
    batch = make_batch(torch.float64)
    optimizer, expected = (
        RWSAM(net, torch.optim.SGD, beta=2.0, norms=way, lr=0.1, momentum=0.9, maximize=up) for net, up in ((model, True), (other, False))
    )
    for _ in range(3):
        optimizer.step(lambda: (model(batch[0]) - batch[1]).square().mean(1))
        expected.step(lambda: -(other(batch[0]) - batch[1]).square().mean(1))
        close([optimizer.last_weights], [expected.last_weights], rtol=1e-9)
    close(everything_of(optimizer, model)[:4], everything_of(expected, other)[:4], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["SAM", "VaSSO", "RSAM", "GSAM", "WSAM-decoupled", "LookSAM"])
def test_a_base_may_keep_the_option_as_an_attribute(name: str) -> None:
    """As those of pytorch_optimizer do."""

    class Keeps(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float, maximize: bool = False) -> None:
            self.maximize = maximize
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        param.add_(param.grad, alpha=group["lr"] if self.maximize else -group["lr"])

    model = make_model(torch.float64)
    other = twin(model)
    optimizer, expected = (FAMILY[name].make(net.parameters(), Keeps, lr=0.1, maximize=up) for net, up in ((model, True), (other, False)))
    for step in range(4):
        batch = make_batch(torch.float64, step)
        optimizer.step(signed(optimizer, model, (1.0, 1.0), batch))
        expected.step(signed(expected, other, (-1.0, -1.0), batch))
    close(weights(model), weights(other), rtol=1e-11, atol=1e-12)


def test_a_real_one_of_pytorch_optimizer() -> None:
    lion = pytest.importorskip("pytorch_optimizer").Lion
    model = make_model(torch.float64)
    other = twin(model)
    optimizer, expected = (SAM(net.parameters(), lion, lr=0.01, maximize=up) for net, up in ((model, True), (other, False)))
    for _ in range(3):
        optimizer.step(signed(optimizer, model, (1.0, 1.0), make_batch(torch.float64)))
        expected.step(signed(expected, other, (-1.0, -1.0), make_batch(torch.float64)))
    close(weights(model), weights(other), rtol=1e-11, atol=1e-12)
