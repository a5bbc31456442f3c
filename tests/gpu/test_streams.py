"""Where operations run: in the order of the current stream, on the device of their tensors, and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.byte_model import OPS
from bench.op_calls import Lists, describe_once, make_lists, ours
from sam_kernels import functional, use_backend
from tests.helpers.compare import assert_same_bits

pytestmark = pytest.mark.cuda
SHAPES = ((1000,), (33, 17), (3,))
CYCLES = 50_000_000  # some 30 ms: far longer than launching takes


def lists_of(op: str, device: str) -> Lists:
    torch.manual_seed(5)
    return make_lists(op, SHAPES, torch.float32, device)


def written(result: object, lists: Lists) -> list[Tensor]:
    return [tensor.cpu() for tensors in lists.values() for tensor in tensors] + ([result.cpu()] if isinstance(result, Tensor) else [])


def call_of(op: str, backend: str) -> Callable[[Lists], object]:
    if op == "grad_norm":
        return lambda lists: functional.grad_norm(lists["grads"])
    return ours(op, backend)


@pytest.mark.only_cuda
@pytest.mark.parametrize("is_known", [True, False], ids=["second_call", "first_call"])
@pytest.mark.parametrize("op", OPS)
def test_an_operation_waits_for_its_stream(op: str, is_known: bool, kernels: str, device: str) -> None:
    """The inputs arrive on a side stream, late. An operation on another stream would see what was there before."""
    call = call_of(op, kernels)
    expected_lists = lists_of(op, device)
    values = {name: [tensor.clone() for tensor in tensors] for name, tensors in expected_lists.items()}
    expected = written(call(expected_lists), expected_lists)
    lists = describe_once({name: [torch.full_like(tensor, 7.0) for tensor in tensors] for name, tensors in values.items()})
    if is_known:  # tables and kernels are there
        call(lists)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        for name, tensors in lists.items():
            torch._foreach_copy_(list(tensors), values[name])
        result = call(lists)
    side.synchronize()
    assert_same_bits(op, written(result, lists), expected)


@pytest.mark.only_cuda
@pytest.mark.parametrize("op", OPS)
def test_tensors_on_the_second_device(op: str, kernels: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    first = lists_of(op, "cuda:0")
    second = {name: [tensor.to("cuda:1") for tensor in tensors] for name, tensors in first.items()}
    assert torch.cuda.current_device() == 0
    results = [written(call_of(op, kernels)(lists), lists) for lists in (first, second)]
    assert_same_bits(op, results[1], results[0])
    assert torch.cuda.current_device() == 0


WRONG: dict[str, tuple[Callable[[str], dict[str, Tensor]], type[Exception], str]] = {
    "float64": (lambda device: {"dtype": torch.zeros(5, dtype=torch.float64, device=device)}, TypeError, "no kernels for float64"),
    "on the CPU": (lambda device: {"device": torch.zeros(5)}, ValueError, r"grads\[1\] is on .*params\[1\] is on"),
    "of another size": (lambda device: {"shape": torch.zeros(6, device=device)}, ValueError, r"grads\[1\] has shape \(6,\)"),
    "of integers": (lambda device: {"kind": torch.zeros(5, dtype=torch.int32, device=device)}, TypeError, r"grads\[1\] has dtype"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_gradient_is_refused_before_anything_is_written(what: str, kernels: str, device: str) -> None:
    if what == "float64" and kernels == "native":
        pytest.skip("it has kernels for float64")
    if what == "on the CPU" and device == "cpu":
        pytest.skip("it is where it should be in a dry run")
    make, error, words = WRONG[what]
    params, old_params = ([torch.full((5,), value, device=device) for _ in range(2)] for value in (1.0, 2.0))
    grads = [torch.ones(5, device=device), *make(device).values()]
    norm = torch.ones((), device=device)
    calls = [
        functools.partial(functional.perturb_, params, grads, old_params, norm, rho=0.1),
        functools.partial(functional.sgd_step_, params, grads, old_params, lr=0.1, momentum=0.9),
    ]
    for call in calls:
        with pytest.raises(error, match=words):
            call()
    assert all(torch.equal(tensor.cpu(), torch.ones(5)) for tensor in params)
    assert all(torch.equal(tensor.cpu(), torch.full((5,), 2.0)) for tensor in old_params)


@pytest.mark.only_cuda
def test_tensors_of_the_cpu_are_refused_with_the_reason() -> None:
    params, old_params = [torch.ones(5)], [torch.full((5,), 2.0)]
    with use_backend("triton"), pytest.raises(RuntimeError, match=r"'triton' .*cpu"):
        functional.restore_(params, old_params)
    assert torch.equal(params[0], torch.ones(5))


@pytest.mark.only_cuda
def test_rows_on_both_kinds_of_device_go_where_they_belong(device: str) -> None:
    """Nothing forced."""
    params, old_params = [torch.ones(5), torch.ones(7, device=device)], [torch.full((5,), 2.0), torch.full((7,), 3.0, device=device)]
    functional.restore_(params, old_params)
    assert [tensor.flatten()[0].item() for tensor in params] == [2.0, 3.0]
