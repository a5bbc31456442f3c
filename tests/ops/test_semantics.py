"""What the operations promise beyond the formulas: skipping, restoring, first steps, ranges, autograd."""

import math

import pytest
import torch
from torch import Tensor

from sam_kernels import functional
from sam_kernels._tensor_list import TensorList
from sam_kernels.validation.backends import backend_of
from sam_kernels.validation.cases import MIXED_NARROW
from sam_kernels.validation.check import build
from sam_kernels.validation.problem import run
from sam_kernels.validation.roundings import roundings_of
from sam_kernels.validation.tolerance import norm_bound
from tests.helpers.backends import require_dtype
from tests.helpers.calls import CALLS
from tests.helpers.compare import assert_same_bits, bits

MOMENTUM = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "maximize": True}
ADAM = {"lr": 0.1, "weight_decay": 0.1, "maximize": True}
SKIPS = [{"found_inf": torch.tensor(1.0)}, {"norm": torch.tensor(math.inf)}, {"norm": torch.tensor(math.nan)}]


def lists(count: int, *sizes: int) -> list[list[Tensor]]:
    return [[torch.randn(size) for size in sizes] for _ in range(count)]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


@pytest.mark.usefixtures("wide_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_save_and_restore_keep_every_bit(backend: str, dtype: torch.dtype) -> None:
    """Payloads of NaNs, signs of zeros, subnormals."""
    require_dtype(backend, dtype)
    size = torch.empty(0, dtype=dtype).element_size()
    original = torch.randint(-128, 128, (70_001 * size,), dtype=torch.int8).view(dtype)
    param, grad, old = original.clone(), torch.ones_like(original), torch.zeros_like(original)
    functional.perturb_([param], [grad], [old], torch.tensor(1.0), rho=1.0)
    assert_same_bits("old_params", [old], [original])
    assert not bits(param).equal(bits(original))
    functional.restore_([param], [old])
    assert_same_bits("params", [param], [original])


@pytest.mark.parametrize("skip", SKIPS, ids=["found_inf", "norm_inf", "norm_nan"])
def test_a_skipped_step_restores_and_does_nothing_else(backend: str, skip: dict[str, Tensor]) -> None:
    olds, grads, buffers, squares = lists(4, 5, 300)
    grads[0][2] = math.nan
    for old in (olds, None):
        params = [torch.full_like(p, math.nan) for p in olds] if old else copies(olds)
        mixed: list[Tensor | None] = [None, buffers[1].clone()]
        functional.sgd_step_(params, grads, mixed, old_params=old, **MOMENTUM, **skip)
        assert_same_bits("params", params, olds)
        untouched = None if backend_of(backend).knows_skips else torch.zeros(5)  # who may not wait for a device cannot know
        assert_same_bits("momentum_buffers", mixed, [untouched, buffers[1]])
        states, state_squares, steps = copies(buffers), copies(squares), [torch.tensor(3.0), torch.tensor(0.0)]
        params = [torch.full_like(p, math.nan) for p in olds] if old else copies(olds)
        functional.adamw_step_(params, grads, states, state_squares, steps, old_params=old, **ADAM, **skip)
        assert_same_bits("params", params, olds)
        assert_same_bits("state", [*states, *state_squares, *steps], [*buffers, *squares, torch.tensor(3.0), torch.tensor(0.0)])


@pytest.mark.parametrize("flag", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 1.0])
def test_grad_norm_sets_found_inf_and_never_clears_it(backend: str, value: float, flag: float) -> None:
    found_inf = torch.tensor(flag)
    norm = functional.grad_norm([torch.ones(5), torch.tensor([1.0, value]), torch.ones(300)], found_inf=found_inf)
    assert bool(norm.isfinite()) == math.isfinite(value)
    assert found_inf.item() == max(flag, float(not math.isfinite(value)))


@pytest.mark.parametrize("magnitude", [1e25, 1e-30, 1e-40])
def test_norm_over_the_whole_range_of_float32(backend: str, magnitude: float) -> None:
    """The squares are far outside of float32."""
    grad = torch.full((10_000,), magnitude)
    within = norm_bound(torch.ones(()), 10_000, roundings_of(backend_of(backend), "grad_norm", [10_000]).terms).item() + 2**-23
    assert functional.grad_norm([grad]).item() == pytest.approx(100 * grad[0].item(), rel=within)
    param = torch.full((10_000,), 2.0)
    assert functional.grad_norm([grad], [param], adaptive=True, eta=0.5).item() == pytest.approx(250 * grad[0].item(), rel=within)


@pytest.mark.parametrize("magnitude", [1e25, 1e-30])
def test_perturbation_of_extreme_gradients_has_length_rho(backend: str, magnitude: float) -> None:
    grad = torch.randn(10_000) * magnitude
    param, old = torch.zeros(10_000), torch.full((10_000,), math.nan)
    norm = functional.grad_norm([grad])
    functional.perturb_([param], [grad], [old], norm, rho=0.05, eps=0.0)
    assert param.double().norm().item() == pytest.approx(0.05, rel=1e-6)


def test_zero_gradients_move_nothing(backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        param, old = torch.randn(300).to(dtype), torch.full((300,), math.nan, dtype=dtype)
        before = param.clone()
        grad = torch.zeros(300, dtype=dtype)
        functional.perturb_([param], [grad], [old], functional.grad_norm([grad]), rho=0.05)
        assert_same_bits("params, old_params", [param, old], [before, before])


def test_nothing_to_do(backend: str) -> None:
    assert functional.grad_norm([]).item() == 0.0
    assert functional.grad_norms([]).shape == (0,)
    assert functional.grad_norms([[], []]).tolist() == [0.0, 0.0]
    assert functional.grad_dots([], []).tolist() == [0.0, 0.0, 0.0]
    assert functional.combine_([], [], [], left_weight=1.0, right_weight=1.0).item() == 0.0
    functional.perturb_([], [], [], torch.tensor(0.0), rho=0.05)
    functional.restore_([], [])
    functional.sgd_step_([], [], [], lr=0.1, momentum=0.9)
    functional.adamw_step_([], [], [], [], [], lr=0.1)


def test_a_float64_row_is_computed_in_float64_whatever_the_scalars_are(backend: str) -> None:
    require_dtype(backend, torch.float64)
    """norm, grad_scale and max_norm given in float32."""
    param, old, grad = torch.zeros(100, dtype=torch.float64), torch.zeros(100, dtype=torch.float64), torch.randn(100)
    norm, grad_scale = torch.tensor(3.0), torch.tensor(1000.0)
    functional.perturb_([param], [grad], [old], norm, rho=0.05, lambd=0.3, grad_scale=grad_scale)
    expected = 0.05 * (0.7 + 0.3 / (3.0 / 1000 + 1e-12)) * (grad.double() / 1000)
    torch.testing.assert_close(param, expected, rtol=1e-15, atol=0)
    stepped = torch.zeros(100, dtype=torch.float64)
    functional.sgd_step_([stepped], [grad], None, lr=0.1, grad_scale=grad_scale, norm=norm, max_norm=0.001)
    expected = -0.1 * (0.001 / (3.0 / 1000 + 1e-6)) * (grad.double() / 1000)
    torch.testing.assert_close(stepped, expected, rtol=1e-15, atol=0)


def test_parameters_that_require_gradients(backend: str) -> None:
    """No autograd graph, no error about leaves, whatever grad mode the caller is in; also where rows are computed in dense copies."""
    shape = (2, 3, 4, 5)
    params = [torch.randn(shape, requires_grad=True), torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()]
    grads, old = [torch.randn(shape) for _ in params], [torch.zeros(shape) for _ in params]
    norm = functional.grad_norm(params)
    assert not norm.requires_grad
    functional.perturb_(params, grads, old, norm, rho=0.05)
    functional.restore_(params, old)
    buffers: list[Tensor | None] = [None, None]
    functional.sgd_step_(params, grads, buffers, old_params=old, **MOMENTUM)
    state = [[torch.zeros(shape) for _ in params] for _ in range(2)]
    functional.adamw_step_(params, grads, *state, [torch.tensor(0.0) for _ in params], **ADAM)
    assert all(param.is_leaf and param.requires_grad for param in params)
    assert not any(tensor.requires_grad for tensor in [*old, *buffers, *state[0]] if tensor is not None)


@pytest.mark.parametrize("op", ["perturb_", "sgd_step_", "adamw_step_", "restore_", "grad_dots", "combine_"])
def test_vouched_lists_give_the_same_bits(backend: str, op: str) -> None:
    option = {"perturb_": "adaptive_eta", "sgd_step_": "nesterov_old", "adamw_step_": "adamw_old", "restore_": "restore"} | {
        "grad_dots": "origins",
        "combine_": "into_lefts",
    }
    plain = build(op, "odd_sizes", "mixed" if backend_of(backend).dtypes is None else MIXED_NARROW, option[op])
    vouched = plain.clone()
    vouched.lists = {name: TensorList([t for t in tensors if t is not None]) for name, tensors in vouched.lists.items()}
    for _ in range(2):  # the second call uses the description made by the first
        results = [run(problem) for problem in (plain, vouched)]
        assert_same_bits("result", results[:1], results[1:])
    for name, tensors in plain.lists.items():
        assert_same_bits(name, list(vouched.lists[name]), tensors)


WRITES = {  # call -> the list that a backward pass may need
    "perturb_": "params",
    "perturb_ ema": "params",
    "centralize_": "grads",
    "combine_": "outs",
    "random_perturb_": "params",
    "restore_": "params",
    "sgd_step_": "params",
    "adamw_step_": "params",
}


@pytest.mark.parametrize("call", WRITES)
def test_autograd_hears_of_every_write(backend: str, call: str) -> None:
    """A backward pass through a graph from before the write is then an error and not a wrong gradient."""
    arguments = CALLS[call]()
    tensors = [tensor for tensor in arguments[WRITES[call]] if call != "centralize_" or tensor.dim() > 1]  # others keep their bits
    before = [tensor._version for tensor in tensors]
    getattr(functional, call.partition(" ")[0])(**arguments)
    assert all(tensor._version > version for tensor, version in zip(tensors, before, strict=True))
