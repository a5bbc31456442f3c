"""autocast and 16-bit parameters, against autograd of the very same numbers.

What is rounded on the way to a weight's gradient, beside the gradients of the outputs that both have alike: autograd rounds the layer's
input to bfloat16 (2^-8 of it, at most) and its sums, which make the gradient, once more (2^-8); the engine need not. A relation between
norms of tensors is then within 2 * 2^-8, and what is added in 16 bits (a bias over positions) within one more for each.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels.per_sample import GradNorms
from tests.per_sample.brute import assert_close, group_norms, weighted

B = 6
BOUND = 3 * 2.0**-8


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


CASES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 5), (7, 8)),
    "mlp": (lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 3)), (8,)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 2)), (2, 6, 5)),
    "conv_twice": (lambda: nn.Sequential(conv := nn.Conv1d(2, 2, 2), nn.Tanh(), conv), (2, 7)),
    "encoder": (lambda: nn.TransformerEncoderLayer(8, 2, 6, batch_first=True), (5, 8)),
    "own": (lambda: nn.Sequential(nn.Linear(8, 8), Own(), nn.RMSNorm(8)), (5, 8)),
    "linear_called_with_and_without_positions": (lambda: Twice(), (5, 8)),
}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x).mean(1).tanh())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_autocast(case: str, micro_batch: int, inside: bool) -> None:
    """``inside``: the engine is called under autocast too, which must not round what it computes."""
    make, shape = CASES[case]
    model, x = make(), torch.randn(B, *shape)
    engine = GradNorms(model, micro_batch=micro_batch, unsupported="vmap")
    with engine, torch.autocast("cpu", torch.bfloat16):
        losses = model(x).float().square().flatten(1).sum(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        norms = engine(losses, retain_graph=True)
        engine.weighted_grads_(torch.ones_like(norms))
    assert norms.dtype is torch.float32
    assert_close(norms, group_norms(model, losses, micro_batch), BOUND)
    expected = weighted(model, losses, torch.ones_like(norms), micro_batch)
    size = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        assert_close(model.get_parameter(name).grad, grad, BOUND, name, size)  # type: ignore[arg-type]  # it has one


def test_autocast_around_the_engine_changes_no_bit() -> None:
    model, x = nn.Linear(8, 5), torch.randn(B, 7, 8)
    found = []
    for enabled in (False, True):
        engine = GradNorms(model)
        with engine:
            losses = model(x).sin().sum((1, 2))
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            norms = engine(losses)
            engine.weighted_grads_(norms)
        found.append([norms, *(param.grad.clone() for param in model.parameters() if param.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_parameters(case: str) -> None:
    make, shape = CASES[case]
    model, x = make().bfloat16(), torch.randn(B, *shape).bfloat16()
    engine = GradNorms(model, unsupported="vmap")
    with engine:
        losses = model(x).float().square().flatten(1).sum(1)
    norms = engine(losses, retain_graph=True)
    assert_close(norms, group_norms(model, losses), BOUND)
    weights = torch.rand_like(norms)
    expected = weighted(model, losses, weights)
    model.zero_grad()
    engine.weighted_grads_(weights)
    exact = copy.deepcopy(model).double()
    truth = weighted(exact, exact(x.double()).square().flatten(1).sum(1), weights.double())
    for name, param in model.named_parameters():
        assert param.grad is not None
        assert param.grad.dtype is torch.bfloat16
        # Both round what flows backwards to 16 bits, in orders of their own: two independent errors of one size, whose norms' quotient is
        # random where few numbers make them. (Of 420 draws of these cases two were beyond 2.)
        allowed = 3.0 * (expected[name] - truth[name]).norm() + BOUND * truth[name].norm()
        assert (param.grad - truth[name]).norm() <= allowed, name


def test_small_weights_keep_their_digits_in_16_bits() -> None:
    """The scale of scaled losses, taken back by the weights: in float16 weights of 1e-7 would have one digit."""
    model, scale = nn.Linear(6, 5).half(), 2.0**12
    x = torch.randn(B, 3, 6).half()
    engine = GradNorms(model)
    with engine:
        losses = model(x).float().square().sum((1, 2)) * scale / 64
    engine(losses, retain_graph=True)
    weights = (0.5 + torch.rand(B)) * 1e-3 / scale
    expected = weighted(model, losses.double(), weights.double())
    model.zero_grad()
    engine.weighted_grads_(weights)
    for name, param in model.named_parameters():
        assert param.grad is not None
        assert ((param.grad - expected[name]).abs() <= 0.01 * expected[name].abs().max()).all(), name
