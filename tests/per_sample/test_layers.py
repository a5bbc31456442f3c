"""Every layer against autograd: odd shapes, options, micro-batches, both reductions; float64 to 1e-10, float32 to 5e-6."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.per_sample.brute import assert_close, assert_right, group_norms, run_engine

B = 6
Make = Callable[[], nn.Module]


def losses_of(output: Tensor) -> Tensor:
    """(B,), with another factor for every element of a sample."""
    flat = output.flatten(1)
    return (flat.sin() * torch.linspace(0.5, 2.0, flat.shape[1], dtype=flat.dtype)).sum(1)


LINEAR: dict[str, tuple[Make, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (5,)),
    "linear_no_bias": (lambda: nn.Linear(5, 3, bias=False), (5,)),
    "linear_1_to_1": (lambda: nn.Linear(1, 1), (1,)),
    "linear_3d": (lambda: nn.Linear(5, 3), (7, 5)),
    "linear_3d_long": (lambda: nn.Linear(2, 3), (33, 2)),
    "linear_3d_no_bias": (lambda: nn.Linear(17, 31, bias=False), (3, 17)),
    "linear_4d": (lambda: nn.Linear(4, 9), (2, 3, 4)),
}
CONVOLUTIONS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(3, 5, 3), (3, 9)),
    "conv1d_same": (lambda: nn.Conv1d(3, 5, 4, padding="same", dilation=2), (3, 9)),
    "conv1d_groups": (lambda: nn.Conv1d(4, 6, 2, stride=3, groups=2, bias=False), (4, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1)), (3, 7, 5)),
    "conv2d_1x1": (lambda: nn.Conv2d(3, 4, 1, stride=2), (3, 6, 5)),
    "conv2d_valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid", dilation=(1, 2)), (3, 6, 7)),
    "conv2d_same": (lambda: nn.Conv2d(2, 4, (2, 3), padding="same"), (2, 5, 4)),
    "conv2d_reflect": (lambda: nn.Conv2d(2, 4, 3, padding=(1, 2), padding_mode="reflect"), (2, 5, 4)),
    "conv2d_circular": (lambda: nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"), (2, 5, 4)),
    "conv2d_replicate": (lambda: nn.Conv2d(2, 4, 3, padding=2, padding_mode="replicate", stride=2), (2, 5, 4)),
    "conv2d_depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 5, 5)),
    "conv2d_dilated": (lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, stride=2), (4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1), padding=1), (2, 3, 4, 5)),
    "conv3d_groups": (lambda: nn.Conv3d(2, 4, 2, groups=2, padding="same", padding_mode="circular"), (2, 3, 4, 5)),
    "transposed1d": (lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1, bias=False), (3, 5)),
    "transposed1d_wide_output_padding": (lambda: nn.ConvTranspose1d(3, 4, 3, dilation=3, output_padding=2, padding=1), (3, 5)),
    "transposed1d_cut_output_padding": (lambda: nn.ConvTranspose1d(3, 4, 2, dilation=3, output_padding=2), (3, 5)),
    "transposed2d": (lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=(2, 3), padding=1, groups=2, output_padding=(1, 2)), (4, 3, 4)),
    "transposed2d_dilated": (lambda: nn.ConvTranspose2d(3, 2, 2, dilation=(2, 3)), (3, 3, 4)),
    "transposed3d": (lambda: nn.ConvTranspose3d(2, 4, 2, stride=(1, 2, 2), output_padding=(0, 1, 0), groups=2), (2, 2, 3, 2)),
}
NORMALISATIONS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "layer_norm": (lambda: nn.LayerNorm(7), (7,)),
    "layer_norm_3d": (lambda: nn.LayerNorm(5), (3, 5)),
    "layer_norm_shape": (lambda: nn.LayerNorm((3, 5)), (2, 3, 5)),
    "layer_norm_no_bias": (lambda: nn.LayerNorm((4, 3, 5), bias=False), (4, 3, 5)),
    "rms_norm": (lambda: nn.RMSNorm(5), (3, 5)),
    "rms_norm_shape": (lambda: nn.RMSNorm((3, 5), eps=0.1), (3, 5)),
    "group_norm": (lambda: nn.GroupNorm(2, 6), (6, 3, 5)),
    "group_norm_2d": (lambda: nn.GroupNorm(2, 6, eps=0.1), (6,)),
    "instance_norm1d": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 7)),
    "instance_norm2d": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (4, 3, 5)),
    "instance_norm2d_eval": (lambda: moved(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), (4, 3, 5)),
    "instance_norm3d": (lambda: nn.InstanceNorm3d(3, affine=True), (3, 2, 3, 2)),
    "batch_norm1d_eval": (lambda: moved(nn.BatchNorm1d(5)), (5,)),
    "batch_norm1d_3d_eval": (lambda: moved(nn.BatchNorm1d(5)), (5, 3)),
    "batch_norm2d_eval": (lambda: moved(nn.BatchNorm2d(4)), (4, 3, 5)),
    "batch_norm3d_eval": (lambda: moved(nn.BatchNorm3d(3, eps=0.1)), (3, 2, 3, 2)),
    "prelu": (lambda: nn.PReLU(), (4, 3)),
    "prelu_channels": (lambda: nn.PReLU(4), (4, 3, 5)),
    "prelu_2d": (lambda: nn.PReLU(4), (4,)),
}
LAYERS = {**LINEAR, **CONVOLUTIONS, **NORMALISATIONS}


def moved(module: Any) -> nn.Module:
    """In eval mode with running statistics that are not 0 and 1."""
    nn.init.normal_(module.running_mean)
    nn.init.uniform_(module.running_var, 0.5, 2.0)
    return module.eval()


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    layer = make().to(dtype)
    for param in layer.parameters():
        nn.init.normal_(param)  # a norm's weights are not 1 and 0
    return layer, torch.randn(B, *shape, dtype=dtype)


@pytest.mark.parametrize("micro_batch", [1, 2, B])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, micro_batch: int) -> None:
    layer, x = build(name)
    for reduction in ("sum", "mean"):
        assert_right(layer, lambda: losses_of(layer(x)), micro_batch=micro_batch, reduction=reduction)


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_in_float32(name: str, micro_batch: int) -> None:
    """Against autograd of the same numbers in float64."""
    layer, x = build(name, torch.float32)
    engine, _, norms = run_engine(layer, lambda: losses_of(layer(x)), micro_batch=micro_batch)
    assert norms.dtype is torch.float32
    engine.weighted_grads_(torch.ones_like(norms))
    found = [param.grad for param in layer.parameters()]
    layer.double()
    losses = losses_of(layer(x.double()))
    assert_close(norms, group_norms(layer, losses, micro_batch), 5e-6)
    for actual, expected in zip(found, torch.autograd.grad(losses.sum(), list(layer.parameters())), strict=True):
        assert actual is not None
        assert_close(actual, expected, 5e-6, "gradient")


@pytest.mark.parametrize("name", LAYERS)
def test_modified_in_place_behind(name: str) -> None:
    """As by ReLU(inplace=True): the output's own node may leave the graph, as where it is a view."""
    layer, x = build(name)
    model = nn.Sequential(layer, nn.ReLU(inplace=True))
    assert_right(model, lambda: losses_of(model(x)), micro_batch=2)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("name", ["linear_3d", "conv2d", "transposed2d", "layer_norm_shape", "group_norm", "batch_norm2d_eval"])
def test_one_parameter_frozen(name: str, frozen: str) -> None:
    layer, x = build(name)
    layer.get_parameter(frozen).requires_grad_(False)
    assert_right(layer, lambda: losses_of(layer(x)))
    assert layer.get_parameter(frozen).grad is None


# not GroupNorm: torch 2.13 itself crashes in its backward pass where the input wants no gradient
@pytest.mark.parametrize("name", ["conv2d", "conv2d_depthwise", "transposed2d", "instance_norm2d", "batch_norm2d_eval"])
def test_channels_last(name: str) -> None:
    layer, x = build(name)
    layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    model = nn.Sequential(layer, nn.ReLU(inplace=True))
    assert_right(model, lambda: losses_of(model(x)), micro_batch=2)
    engine, _, norms = run_engine(model, lambda: losses_of(model(x)))
    engine.weighted_grads_(norms)
    for param in layer.parameters():
        assert param.grad is not None
        assert param.grad.stride() == param.stride()


@pytest.mark.parametrize("padding_idx", [None, 0, -2])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
@pytest.mark.parametrize("micro_batch", [1, 2, B])
def test_embedding(shape: tuple[int, ...], padding_idx: int | None, micro_batch: int) -> None:
    """Few rows: ids are repeated within a sample and among samples."""
    layer = nn.Embedding(4, 3, padding_idx=padding_idx, max_norm=0.7).double()
    for dtype in (torch.int64, torch.int32):
        ids = torch.randint(0, 4, (B, *shape)).to(dtype)
        assert_right(layer, lambda ids=ids: losses_of(layer(ids)), micro_batch=micro_batch)


def test_embedding_in_float32() -> None:
    layer = nn.Embedding(3, 5)
    ids = torch.randint(0, 3, (B, 7))
    _, _, norms = run_engine(layer, lambda: losses_of(layer(ids)))
    layer.double()
    assert_close(norms, group_norms(layer, losses_of(layer(ids))), 5e-6)


def test_keyword_arguments() -> None:
    layer = nn.ConvTranspose1d(3, 4, 3, stride=2).double()
    x = torch.randn(B, 3, 5, dtype=torch.float64)
    assert_right(layer, lambda: losses_of(layer(output_size=[12], input=x)))
    norm = nn.RMSNorm(5).double()
    assert_right(norm, lambda: losses_of(norm(x=x)))


def test_lazy_layers_become_what_they_are_in_the_first_pass() -> None:
    model = nn.Sequential(nn.LazyConv1d(4, 2), nn.Flatten(), nn.LazyLinear(3)).double()
    x = torch.randn(B, 3, 5, dtype=torch.float64)
    assert_right(model, lambda: losses_of(model(x)))


def test_one_sample_and_one_group() -> None:
    layer, x = build("linear_3d")
    assert_right(layer, lambda: losses_of(layer(x[:1])))


def test_scale_grad_by_freq_is_refused() -> None:
    layer = nn.Embedding(4, 3, scale_grad_by_freq=True)
    with pytest.raises(NotImplementedError, match=r"Embedding.*scale_grad_by_freq"):
        run_engine(layer, lambda: losses_of(layer(torch.zeros(B, 2, dtype=torch.int64))))
