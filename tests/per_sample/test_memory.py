"""What is held, and for how long: checkpoints, offloading, ``keep``."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from sam_kernels.per_sample import GradNorms
from tests.per_sample.brute import assert_right

B = 6
f64 = torch.float64


def losses_of(output: Tensor) -> Tensor:
    flat = output.flatten(1)
    return (flat.sin() * torch.linspace(0.5, 2.0, flat.shape[1], dtype=flat.dtype)).sum(1)


class Blocks(nn.Module):
    """``depth``: how many checkpoints are around the block, one inside the other."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.first, self.depth = nn.Linear(3, 8), depth
        self.block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(inplace=True))
        self.head = nn.Linear(8, 2)
        self.calls = 0
        self.inside: list[Any] = []

    def run_block(self, h: Tensor, depth: int) -> Tensor:
        if depth:
            return checkpoint(self.run_block, h, depth - 1, use_reentrant=False)
        self.calls += 1
        for layer in self.block:
            self.inside.append(weakref.ref(h))
            h = layer(h)
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run_block(self.first(x), self.depth))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("micro_batch", [1, 3])
def test_checkpoint(depth: int, micro_batch: int, frozen: bool) -> None:
    """Frozen: what is asked for lies inside the checkpoint, and its tensors are asked for after the backward pass."""
    model = Blocks(depth).double()
    model.first.requires_grad_(not frozen)
    x = torch.randn(B, 3, dtype=f64)
    assert_right(model, lambda: losses_of(model(x)), micro_batch=micro_batch, again=True)


def test_a_checkpointed_block_holds_nothing() -> None:
    model, x = Blocks().double(), torch.randn(B, 3, dtype=f64)
    engine = GradNorms(model)
    with engine:
        losses = losses_of(model(x))
    assert [reference() is None for reference in model.inside] == [False, True, True, True, True, False]  # what goes in, and what comes out
    assert model.calls == 1
    engine(losses)
    assert model.calls == 2  # run again once


def test_save_on_cpu() -> None:
    model, x = Blocks(0).double(), torch.randn(B, 3, dtype=f64)

    def forward() -> Tensor:
        with save_on_cpu():
            return losses_of(model(x))

    assert_right(model, forward, micro_batch=2)


def test_offloaded_tensors_go_by_the_same_hooks() -> None:
    packed: list[int] = []
    model, x = nn.Linear(3, 2), torch.randn(B, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(t.data_ptr()), t.clone())[1], lambda t: t):
        engine = GradNorms(model)
        with engine:
            losses = model(x).square().sum(1)
    assert packed.count(x.data_ptr()) == 2  # autograd's own and the engine's
    assert engine(losses).isfinite().all()


@pytest.mark.parametrize("keep", [True, False])
def test_what_is_not_kept_is_freed(keep: bool) -> None:
    hidden = (B, 13)  # of no other tensor
    model = nn.Sequential(nn.Linear(3, 13), nn.Tanh(), nn.Linear(13, 2))
    engine = GradNorms(model)
    with engine:
        losses = model(torch.randn(B, 3)).sin().sum(1)
    norms = engine(losses, keep=keep)
    del losses
    assert bool(_alive(hidden)) is keep
    if keep:
        engine.weighted_grads_(norms)
        assert not _alive(hidden)
    else:
        with pytest.raises(RuntimeError, match="keep=True"):
            engine.weighted_grads_(norms)


def _alive(shape: tuple[int, int]) -> list[Tensor]:
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) is Tensor and not each.is_nested]
    return [each for each in tensors if tuple(each.shape[:1] + each.shape[-1:]) == shape]
