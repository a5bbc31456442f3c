"""BatchNorm in training: a sample's norm is that of its contribution, its terms of the sum that is the batch's gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_kernels.per_sample import GradNorms
from tests.per_sample.brute import assert_close, run_engine

B = 6
CASES = {
    "1d": (nn.BatchNorm1d, ()),
    "1d_positions": (nn.BatchNorm1d, (5,)),
    "2d": (nn.BatchNorm2d, (3, 4)),
    "3d": (nn.BatchNorm3d, (2, 3, 2)),
}


def losses_of(output: Tensor) -> Tensor:
    flat = output.flatten(1)
    return (flat.sin() * torch.linspace(0.5, 2.0, flat.shape[1], dtype=flat.dtype)).sum(1)


def contributions(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    """(B, *shape) for every parameter: each sample has parameters of its own, with equal values, and the batch its statistics."""
    norm = model[1]
    own = [param.detach().expand(B, *param.shape).clone().requires_grad_() for param in model.parameters()]
    w, b, scale, shift, v, c = own
    h = torch.einsum("nc...,ndc->nd...", x, w) + _spread(b, x.dim())
    h = F.batch_norm(h, None, None, training=True, eps=norm.eps) * _spread(scale, x.dim()) + _spread(shift, x.dim())
    h = torch.einsum("nc,ndc->nd", h.relu().flatten(1), v) + c
    return list(torch.autograd.grad(losses_of(h).sum(), own))


def _spread(values: Tensor, dims: int) -> Tensor:
    return values.reshape(*values.shape, *(1,) * (dims - 2))


def model_of(kind: type[nn.Module], positions: tuple[int, ...]) -> nn.Sequential:
    conv = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(positions)]
    first = conv(3, 4) if not positions else conv(3, 4, 1)
    numel = 4 * int(torch.tensor(positions).prod()) if positions else 4
    model = nn.Sequential(first, kind(4), nn.Linear(numel, 3)).double()
    for param in model.parameters():
        nn.init.normal_(param)
    return model


@pytest.mark.parametrize("micro_batch", [1, 2, B])
@pytest.mark.parametrize("case", CASES)
def test_contributions(case: str, micro_batch: int) -> None:
    kind, positions = CASES[case]
    model = model_of(kind, positions)
    x = torch.randn(B, 3, *positions, dtype=torch.float64)

    def forward() -> Tensor:
        return losses_of(model[2](F.relu(model[1](model[0](x)), inplace=True).flatten(1)))

    engine, losses, norms = run_engine(model, forward, micro_batch=micro_batch)
    own = [grad.flatten(1) for grad in contributions_of(model, x)]
    groups = torch.cat(own, 1).view(B // micro_batch, micro_batch, -1).sum(1)
    assert_close(norms, groups.norm(dim=1), 1e-10)
    engine.weighted_grads_(torch.ones_like(norms))
    expected = torch.autograd.grad(losses.sum(), list(model.parameters()))
    for param, grad in zip(model.parameters(), expected, strict=True):
        assert param.grad is not None
        assert_close(param.grad, grad, 1e-10, "the batch's gradient", torch.stack([each.norm() for each in expected]).max())


def contributions_of(model: nn.Sequential, x: Tensor) -> list[Tensor]:
    flat_first = model[0].weight.reshape(4, 3)  # a 1x1 convolution is a Linear at every position
    linear = nn.Linear(3, 4).double()
    linear.weight, linear.bias = nn.Parameter(flat_first.detach()), model[0].bias
    return contributions(nn.Sequential(linear, model[1], model[2]), x)


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, lambda n: nn.InstanceNorm1d(n, affine=True, track_running_stats=True)])
def test_the_mode_is_that_of_the_forward_pass(kind: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 2), kind(4)).double()
    x = torch.randn(B, 3, 5, dtype=torch.float64)
    norms = []
    for switch in (False, True):
        engine = GradNorms(model.train())
        with engine:
            losses = losses_of(model(x))
        if switch:
            model.eval()
        norms.append(engine(losses))
        assert all(module.training is not switch for module in model.modules())
    assert torch.equal(*norms)


def test_running_statistics_are_updated_once() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    engine, _, norms = run_engine(model, lambda: losses_of(model(torch.randn(B, 3))))
    engine.weighted_grads_(norms)
    assert model[1].num_batches_tracked == 1
    before = model[1].running_mean.clone()
    model.eval()
    run_engine(model, lambda: losses_of(model(torch.randn(B, 3))))
    assert torch.equal(model[1].running_mean, before)
