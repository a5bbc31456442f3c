"""Workloads, bytes and buffers: what the numbers are divided by."""

import getpass
import json
import socket

import pytest
import torch

from bench.byte_model import OPS, op_bytes, step_bytes
from bench.environment import device_slug, environment
from bench.ops import buffer_sets
from bench.workloads import WORKLOADS, make_grads, make_params


@pytest.mark.parametrize(
    ("name", "n_tensors", "numel"), [("resnet18", 62, 11_689_512), ("gpt2_124m", 148, 124_439_808), ("many_tiny", 1000, 3000)]
)
def test_workloads_have_the_size_of_the_models(name: str, n_tensors: int, numel: int) -> None:
    assert WORKLOADS[name].n_tensors == n_tensors
    assert WORKLOADS[name].numel == numel


def test_resnet18_shapes_are_torchvisions() -> None:
    models = pytest.importorskip("torchvision.models")
    assert [tuple(p.shape) for p in models.resnet18().parameters()] == list(WORKLOADS["resnet18"].shapes)


@pytest.mark.parametrize(("op", "passes"), [("grad_norm", 1), ("perturb_", 4), ("restore_", 2), ("sgd_step_", 5), ("adamw_step_", 7)])
def test_bytes_of_an_operation(op: str, passes: int) -> None:
    assert OPS[op].passes == passes
    assert op_bytes(op, 10, 4) == passes * 40


def test_bytes_of_a_step() -> None:
    """The check of the second gradients included: 11 N s for SGD with momentum."""
    assert step_bytes("sgd", 1, 4) == 44
    assert step_bytes("adamw", 1, 2) == 26


def test_parameters_share_gradients_but_not_memory() -> None:
    grads = make_grads(((2, 3), (4,)), torch.float32)
    first, second = make_params(grads), make_params(grads)
    assert all(p.grad is g is q.grad for p, q, g in zip(first, second, grads, strict=True))
    assert not {p.data_ptr() for p in first} & {p.data_ptr() for p in second}


def test_buffers_outgrow_the_cache_or_say_that_they_do_not() -> None:
    assert buffer_sets(100, cache=1000, budget=10**6) == (30, "memory")
    assert buffer_sets(10**5, cache=1000, budget=10**6) == (1, "memory")
    assert buffer_sets(1, cache=1000, budget=10**6)[1] == "cached"
    assert buffer_sets(100, cache=1000, budget=200)[1] == "cached"


def test_environment_names_no_machine() -> None:
    text = json.dumps(environment())
    assert socket.gethostname() not in text or len(socket.gethostname()) < 4
    assert f"/{getpass.getuser()}" not in text
    assert "/" not in device_slug()
