"""Gradients less the means of their slices along the first dimension: what the papers say, and where slices lie in memory."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sam_kernels import functional
from sam_kernels._tensor_list import TensorList, slice_sizes, slices_are_runs
from sam_kernels.backends import foreach
from sam_kernels.backends.native import CUDA_ON_HOST
from sam_kernels.operations import Centralize, Operands
from sam_kernels.validation.backends import backend_of
from sam_kernels.validation.check import check
from tests.helpers import interpreter
from tests.helpers.backends import widest
from tests.helpers.compare import assert_same_bits

SHAPES = [(1, 300), (300, 1), (17, 1, 3, 3), (5, 1025), (2, 3, 2, 2, 5), (1, 1), (1000, 2)]


def steps(shape: tuple[int, ...]) -> Tensor:
    """Each slice holds integers about a number of its own: sums, means and squares are exact in float32."""
    size = math.prod(shape[1:])
    about = 64.0 * torch.arange(shape[0]).reshape(-1, 1)
    return (about + torch.arange(size) - (size - 1) / 2).reshape(shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_slice_loses_its_own_mean(backend: str, shape: tuple[int, ...]) -> None:
    grad = steps(shape)
    norm = functional.centralize_([grad])
    size = math.prod(shape[1:])
    expected = (torch.arange(size) - (size - 1) / 2).expand(shape[0], size).reshape(shape)
    torch.testing.assert_close(grad, expected, rtol=0.0, atol=0.0)
    assert norm.item() == pytest.approx(math.sqrt(shape[0] * size * (size * size - 1) / 12), rel=1e-6)


def test_a_slice_of_one_element_becomes_zero(backend: str) -> None:
    grad = torch.randn(300, 1)
    assert functional.centralize_([grad]).item() == 0.0
    assert not grad.any()


def test_squares_are_of_differences(backend: str) -> None:
    """About 4,096 the mean of squares less the square of the mean has no correct digit left."""
    grad = 4096.0 + torch.tensor([-1.0, 1.0]).repeat(4, 150) / 1024
    assert functional.centralize_([grad]).item() == pytest.approx(math.sqrt(grad.numel()) / 1024, rel=1e-6)


def test_vectors_and_numbers_are_left_as_they_are_and_counted(backend: str) -> None:
    grads = [torch.randn(70_000), torch.tensor(-0.0), torch.tensor(3.0), torch.zeros(0), torch.zeros(0, 3), torch.zeros(3, 0)]
    before = [grad.clone() for grad in grads]
    norm = functional.centralize_(grads)
    assert_same_bits("grads", grads, before)
    torch.testing.assert_close(norm, torch.linalg.vector_norm(torch.cat([grad.reshape(-1) for grad in before]).double()).float())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda t: t.to(memory_format=torch.channels_last),
    "last dimension outermost": lambda t: t.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "first dimension second": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "with holes": lambda t: torch.stack([t, t], dim=-1)[..., 0],
}


@pytest.mark.parametrize("vouched", [False, True], ids=["list", "vouched"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_slices_are_not_mixed_whatever_the_layout(backend: str, layout: str, vouched: bool) -> None:
    """Also in lists that their owner vouches for: an optimizer's parameters may be transposed."""
    grad = LAYOUTS[layout](steps((3, 4, 5, 2)))
    params = [torch.ones(3, 4, 5, 2).copy_(steps((3, 4, 5, 2)))]
    expected = steps((3, 4, 5, 2)) - 64.0 * torch.arange(3).reshape(3, 1, 1, 1)
    given = backend_of(backend).trust([grad]) if vouched else [grad]
    if given is None:
        pytest.skip(f"backend {backend} does not vouch for {layout}")
    pointer = grad.data_ptr()
    norm = functional.centralize_(given)
    assert grad.data_ptr() == pointer
    torch.testing.assert_close(grad, expected, rtol=0.0, atol=0.0)
    adaptive = functional.centralize_([LAYOUTS[layout](steps((3, 4, 5, 2)))], params, adaptive=True, eta=0.5)
    torch.testing.assert_close(adaptive, torch.linalg.vector_norm((params[0].abs() + 0.5) * expected))
    torch.testing.assert_close(norm, torch.linalg.vector_norm(expected))


def test_what_slices_are() -> None:
    tensors = [torch.ones(2, 3, 4), torch.ones(7), torch.tensor(1.0), torch.ones(0, 3), torch.ones(3, 0), torch.ones(5, 1)]
    assert slice_sizes(tensors) == [12, 0, 0, 0, 0, 1]
    assert all(map(slices_are_runs, tensors))
    image = torch.ones(2, 3, 4, 5)
    assert slices_are_runs(image.to(memory_format=torch.channels_last))
    assert slices_are_runs(torch.ones(2, 1).t())
    assert not slices_are_runs(torch.ones(2, 3).t())
    assert not slices_are_runs(image.permute(1, 0, 2, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(4, 9), (3, 2000)], ids=str)
def test_what_is_not_finite_stays_in_its_slice(backend: str, shape: tuple[int, int], value: float) -> None:
    grad, found_inf = steps(shape), torch.tensor(0.0)
    clean = grad.clone()
    functional.centralize_([clean], found_inf=found_inf)
    assert found_inf.item() == 0.0
    grad[1, 5] = value
    assert not functional.centralize_([grad], found_inf=found_inf).isfinite()
    assert found_inf.item() == 1.0
    assert not grad[1].isfinite().any()
    assert_same_bits("other slices", [grad[0], grad[2:]], [clean[0], clean[2:]])
    functional.centralize_([clean], found_inf=found_inf)
    assert found_inf.item() == 1.0


def test_large_and_small_gradients_have_norms(backend: str) -> None:
    """Whose squares no float32 holds."""
    for scale in (2.0**100, 2.0**-120):
        grad = steps((4, 300)) * scale
        assert functional.centralize_([grad]).item() == pytest.approx(math.sqrt(4 * 300 * (300**2 - 1) / 12) * scale, rel=1e-6)


def test_a_thousand_tiny_tensors(backend: str) -> None:
    count = interpreter.MANY if backend == "triton" else 1000  # a program each
    grads = [steps((3, 2)) for _ in range(count)]
    assert functional.centralize_(grads).item() == pytest.approx(math.sqrt(count * 6 / 4), rel=1e-6)
    assert_same_bits("grads", grads, [torch.tensor([[-0.5, 0.5]] * 3)] * count)


def test_nothing_to_do_and_the_type_of_the_norm(backend: str) -> None:
    assert functional.centralize_([]).item() == 0.0
    assert functional.centralize_(TensorList()).item() == 0.0
    assert functional.centralize_([torch.randn(2, 3), torch.randn(3).to(torch.bfloat16)]).dtype is torch.float32
    wide = widest(backend)
    assert functional.centralize_([torch.randn(2, 3, dtype=wide), torch.randn(3)]).dtype is wide


def test_the_norm_is_that_before_rounding(backend: str) -> None:
    """bfloat16 has no 256.5, and its mean is subtracted in float32."""
    grad = torch.tensor([[1.0, 514.0, 258.0, 256.0]] * 2).to(torch.bfloat16)
    exact = grad.double() - grad.double().mean(dim=1, keepdim=True)
    norm = functional.centralize_([grad])
    assert_same_bits("grad", [grad], [exact.to(torch.bfloat16)])
    assert norm.item() == pytest.approx(exact.norm().item(), rel=1e-6)
    assert norm.item() != pytest.approx(grad.double().norm().item(), rel=1e-6)


def cut_by_the_kernels(grad: Tensor, sizes: list[int]) -> None:
    """Past the public function, which knows the sizes."""
    if CUDA_ON_HOST:
        native = importlib.import_module("sam_kernels.backends.native.cuda")
        native._cuda.count_sums(native._lists.describe([grad]), sizes)
    else:
        native = importlib.import_module("sam_kernels.backends.native.cpu")
        native._cpu.centralize(Centralize(), native._lists.describe_all({"grads": [grad]}), sizes, 1)


@pytest.mark.native
@pytest.mark.parametrize("sizes", [[5], [-4], [4, 4], []], ids=str)
def test_slices_that_do_not_fit_are_refused_by_the_kernels(sizes: list[int]) -> None:
    grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"slices that do not divide their tensor|one size of slices a tensor"):
        cut_by_the_kernels(grad, sizes)
    assert torch.equal(grad, torch.ones(3, 4))


PLANTED: dict[str, Callable[[Tensor], Tensor]] = {
    "tensors are left as they are": lambda grad: grad.view(-1),
    "a mean over everything": lambda grad: grad.view(1, *grad.shape) if grad.dim() > 1 else grad,
    "a mean over the other dimension": lambda grad: grad.transpose(0, 1) if grad.dim() > 1 else grad,
}


@pytest.mark.parametrize("error", PLANTED)
def test_wrong_slices_are_caught(monkeypatch: pytest.MonkeyPatch, error: str) -> None:
    right = foreach.BACKEND.operations[Centralize]

    def planted(op: Centralize, lists: Operands) -> Tensor:
        norm: Tensor = right(op, Operands({"grads": [PLANTED[error](grad) for grad in lists["grads"]]}, lists.indices))
        return norm

    assert check("centralize_", ["foreach"], "float32", "slices", "plain")["foreach"].passed
    monkeypatch.setitem(foreach.BACKEND.operations, Centralize, planted)
    assert not check("centralize_", ["foreach"], "float32", "slices", "plain")["foreach"].passed


@pytest.mark.parametrize("relative", [1e-6, -1e-6])
def test_a_mean_that_is_a_little_off_is_caught(monkeypatch: pytest.MonkeyPatch, relative: float) -> None:
    right = Tensor.mean

    def off(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        mean: Tensor = right(tensor, *args, **kwargs)
        return mean * (1 + relative) if kwargs.get("dtype") is torch.float64 else mean

    assert check("centralize_", ["foreach"], "float32", "slices", "plain")["foreach"].passed
    monkeypatch.setattr(Tensor, "mean", off)
    assert not check("centralize_", ["foreach"], "float32", "slices", "plain")["foreach"].passed
