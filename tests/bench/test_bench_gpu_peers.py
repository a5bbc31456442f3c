"""Peers on a device, without one: they do what is said of them, and the sweeps that the bars count are theirs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.byte_model import STEP_OPS, step_bytes
from bench.gpu import limits, peers, steps
from bench.gpu.peers import BASE_ALONE, COPY, FOREACH_COPY, LOOPS, ON_DTENSORS
from bench.providers import BASES
from bench.workloads import Workload, make_grads, make_params

SHAPES = ((8, 6), (5,), (2, 3, 4))
WORKLOAD = Workload("some", "some", SHAPES)


def no_mesh() -> Any:
    raise RuntimeError("no interface")


def made(base: str, *, is_about_launching: bool = True) -> dict[str, peers.Maker]:
    grads = make_grads(SHAPES, torch.float32)
    sweeps = step_bytes(base, 1, 1)
    return peers.makers(WORKLOAD, BASES[base], grads, sweeps, no_mesh, is_about_launching=is_about_launching, say=lambda line: None)


def test_a_mesh_of_one_process_ends_with_its_group() -> None:
    with peers.one_rank_mesh("cpu") as mesh:
        assert mesh.size() == dist.get_world_size() == 1
        with peers.one_rank_mesh("cpu") as inner:  # a group that is there already stays
            assert inner.size() == 1
        assert dist.is_initialized()
    assert not dist.is_initialized()


def test_without_a_backend_dtensors_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def refuse(backend: str, **kwargs: Any) -> None:
        tried.append(backend)
        raise RuntimeError("no interface")

    monkeypatch.setattr(dist, "init_process_group", refuse)
    with pytest.raises(RuntimeError, match="no interface"), peers.one_rank_mesh("cuda"):
        pass
    assert tried == ["nccl", "gloo"]
    said: list[str] = []
    names = list(ON_DTENSORS.values())
    found = steps._calls({name: made("adamw")[name] for name in (BASE_ALONE, *names)}, WORKLOAD, "cpu", said.append)
    assert list(found) == [BASE_ALONE]
    assert said == [f"left out: {name} some: RuntimeError: no interface" for name in names]


def test_the_base_does_the_same_on_dtensors() -> None:
    grads = make_grads(SHAPES, torch.float32)
    plain = make_params(grads)
    torch.optim.AdamW(plain, **BASES["adamw"].kwargs, fused=True).step()
    with peers.one_rank_mesh("cpu") as mesh:
        sharded = peers._on_dtensors(grads, mesh)
        torch.optim.AdamW(sharded, **BASES["adamw"].kwargs, fused=True).step()
        for param, expected in zip(sharded, plain, strict=True):
            assert isinstance(param, DTensor)
            torch.testing.assert_close(param.to_local(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", [COPY, FOREACH_COPY])
def test_copies_move_the_bytes_of_a_step(base: str, name: str) -> None:
    moved: list[int] = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "copy_" in func.__name__:
                targets = args[0] if isinstance(args[0], list) else [args[0]]
                moved.extend(2 * target.numel() for target in targets)
            return func(*args, **(kwargs or {}))

    call = made(base)[name]()
    with Counting():
        call()
    numel = sum(math.prod(shape) for shape in SHAPES)
    # Of an odd sweep half a list is copied; half of a tensor is rounded down.
    assert 0 <= step_bytes(base, numel, 1) - sum(moved) <= 2 * len(SHAPES)


def test_of_one_tensor_only_what_tells_about_the_memory_is_a_peer() -> None:
    assert set(made("sgd", is_about_launching=False)) == {BASE_ALONE, COPY, FOREACH_COPY}


class Sweeps(TorchDispatchMode):
    """Adds up the elements that operations read and write: tensors of at least ``numel`` elements, by what each schema says."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.elements = numel, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "detach" in func.__name__ or "alias" in func.__name__:
            return result
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
        for argument in func._schema.arguments:
            # A fused step writes gradients only where a scale is given.
            is_written = argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
            self.elements += (2 if is_written else 1) * self._of(given.get(argument.name))
        if not any(returned.alias_info for returned in func._schema.returns):
            self.elements += self._of(result)
        return result

    def _of(self, value: Any) -> int:
        tensors = value if isinstance(value, list | tuple) else [value]
        return sum(each.numel() for each in tensors if isinstance(each, torch.Tensor) and each.numel() >= self.numel)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_published_loop_makes_the_sweeps_that_its_bar_counts(loop: str) -> None:
    numel = 64
    call = peers.call_of(loop, make_params(make_grads(((numel,),), torch.float32)), BASES["sgd"])
    call()  # makes the momentum
    with Sweeps(numel) as counted:
        call()
    assert counted.elements / numel == limits.LOOP_SWEEPS[loop]
    assert limits.loop_ratio("sgd", loop) == pytest.approx(0.99 * limits.LOOP_SWEEPS[loop] / 11)


def test_what_launches_and_instructions_leave_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def least(numel: int, *, launches: int = 1, issue: float | None = None, copy_gbps: float = 3000.0) -> float:
        return limits.percent_of_copy(limits.FULL, 12 * numel, copy_gbps, launches, issue)

    assert least(10**8) == limits.FULL
    assert least(10**6) == pytest.approx(100 * 4 / (4 + 3))  # 4 µs of bytes, 3 µs for the launch
    assert least(10**6, launches=2) == pytest.approx(100 * 4 / (4 + 6))
    # 400 µs of bytes: 200 µs of issuing are hidden, of 300 a quarter of the bytes' time is left. On a faster memory issuing is the longer.
    assert least(10**8, issue=0.2) == limits.FULL
    assert least(10**8, issue=0.3) == pytest.approx(100 * 0.4 / (0.4 + 0.1 + 0.003))
    assert least(10**8, issue=0.3, copy_gbps=6000.0) == pytest.approx(100 * 0.2 / (0.3 + 0.05 + 0.003))
    assert limits.percent_of_copy(97, 12 * 10**8, 3000.0, 1, 0.3, 0.25) == pytest.approx(100 * 0.4 / (0.4 + 0.2 + 0.003))
    assert (limits.step_launches("sgd"), limits.step_launches("adamw")) == (4, 5)  # tests/on_host/test_finish.py, docs/internals/gpu.md

    # Beside a loop of 4 ms our 1.1 GB cannot be 20 times as fast, were they moved at 85 % of a copy's bandwidth; 5 times they can.
    row = {"numel": 25 * 10**6, "bytes": 11 * 10**8, "copy_gbps": 3000.0, "base": "sgd"}
    assert limits.beside_loop(20.0, 4.0, row) == pytest.approx(4.0 / (1.1 / 3 / 0.85))
    assert limits.beside_loop(5.0, 4.0, row) == 5.0

    monkeypatch.setattr(limits, "multiprocessors_and_gigahertz", lambda: (132, 2.0))
    counted = limits.INSTRUCTIONS["native"]["random_perturb_"]["bf16"]
    assert limits.issue_ms("random_perturb_", "native", "bf16", 10**8) == pytest.approx(1e8 * counted / (132 * 128 * 2e6))
    assert limits.issue_ms("perturb_", "torch", "bf16", 10**8) is None
    monkeypatch.setattr(limits, "multiprocessors_and_gigahertz", lambda: (0, 0.0))
    assert limits.issue_ms("random_perturb_", "native", "bf16", 10**8) is None
    assert set(STEP_OPS) == {"sgd", "adamw"}
