"""Workloads, bytes and buffers: what the numbers are divided by."""

import getpass
import json
import socket

import pytest
import torch

from bench.byte_model import CALLS, OPS, call_bytes, op_bytes, step_bytes
from bench.environment import device_slug, environment
from bench.op_calls import make_lists, ours, torch_call
from bench.ops import available_backends, buffer_sets
from bench.workloads import WORKLOADS, make_grads, make_params
from sam_kernels.operations import OPERATIONS, GradNorms

SHAPES = ((6, 4), (3, 2, 2))
BACKENDS_HERE = [name for name in available_backends(lambda line: None) if name != "triton"]


@pytest.mark.parametrize(
    ("name", "n_tensors", "numel"), [("resnet18", 62, 11_689_512), ("gpt2_124m", 148, 124_439_808), ("many_tiny", 1000, 3000)]
)
def test_workloads_have_the_size_of_the_models(name: str, n_tensors: int, numel: int) -> None:
    assert WORKLOADS[name].n_tensors == n_tensors
    assert WORKLOADS[name].numel == numel


def test_resnet18_shapes_are_torchvisions() -> None:
    models = pytest.importorskip("torchvision.models")
    assert [tuple(p.shape) for p in models.resnet18().parameters()] == list(WORKLOADS["resnet18"].shapes)


def test_no_operation_is_left_out() -> None:
    """Names begin with those of the functions; grad_norm is grad_norms of one group."""
    names = {"grad_norm" if op is GradNorms else op.name for op in OPERATIONS}
    assert {name.partition(" ")[0] for name in CALLS} == names
    assert {"check_finite_", *OPS} == names, "the usual call of each"


@pytest.mark.parametrize("name", CALLS)
def test_every_backend_and_torch_make_a_call_of_it(name: str) -> None:
    """The same kind of result or, in place, about the same lists. Random numbers and moving averages differ by design."""
    lists = make_lists(name, SHAPES, torch.float32)
    copies = {backend: {key: [t.clone() for t in tensors] for key, tensors in lists.items()} for backend in (*BACKENDS_HERE, "torch")}
    for backend, copy in copies.items():
        (torch_call(name) if backend == "torch" else ours(name, backend))(copy)
    written = {*CALLS[name].updates, *CALLS[name].writes}
    for backend, copy in copies.items():
        for key in copy:
            changed = any(not torch.equal(new, old) for new, old in zip(copy[key], lists[key], strict=True))
            assert changed <= (key in written or key == "state_steps"), f"{backend} writes {key}"
            if name != "random_perturb_":
                for new, of_native in zip(copy[key], copies["native"][key], strict=True):
                    torch.testing.assert_close(new, of_native, rtol=1e-4, atol=1e-5, msg=f"{backend}: {key}")


@pytest.mark.parametrize(("name", "passes"), [("grad_norm adaptive", 2), ("perturb_ from backups", 3), ("combine_ three lists", 4)])
def test_bytes_of_a_variant(name: str, passes: int) -> None:
    assert call_bytes(name, 10, 4) == passes * 40


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
