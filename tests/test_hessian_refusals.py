"""Second derivatives that are not there are an error that says what to use: several of them autograd leaves out without a word."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from sam_kernels import monitors
from sam_kernels.monitors import _twice

every_function = pytest.mark.parametrize("function", [monitors.hessian_top_eigenvalue, monitors.hessian_trace])


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x


class Right(_Square):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class Once(_Square):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


class ByHand(_Square):
    """As a kernel behind autograd's back computes it."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (2 * ctx.saved_tensors[0] * grad).detach()


@every_function
def test_functions_of_ones_own(function: Any) -> None:
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    assert function(lambda: Right.apply(w).sum(), [w]).item() == pytest.approx(2.0 if function is monitors.hessian_top_eigenvalue else 4.0)
    for custom in (Once, ByHand):
        for closure in (lambda: custom.apply(w).sum(), lambda: custom.apply(w.sin()).exp().sum()):  # noqa: B023
            with pytest.raises(
                RuntimeError, match=f"{function.__name__}: the backward pass of .*{custom.__name__}Backward.* cannot be diff"
            ):
                function(closure, [w])
        assert w.grad is None


class StraightThrough(torch.autograd.Function):
    """Its second input gets no gradient, written as zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return x + y.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(grad)


@every_function
def test_gradients_that_are_zero_need_no_graph(function: Any) -> None:
    w = torch.tensor([1.0], requires_grad=True)
    assert function(lambda: StraightThrough.apply(w.square(), w.exp()).sum(), [w]).item() == pytest.approx(2.0)


@every_function
def test_hooks_do_not_stay(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(_twice, "_note_constant", lambda constants, name, *_: notes.append(name))
    w = torch.ones(2, requires_grad=True)
    losses = []

    def closure() -> Tensor:
        losses.append(w.square().sum())
        return losses[-1]

    function(closure, [w])
    noted = len(notes)
    assert noted >= 2
    losses[0].backward()
    assert len(notes) == noted


@every_function
def test_fused_attention(function: Any) -> None:
    q = torch.randn(1, 2, 64, 16, requires_grad=True)

    def closure() -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q).square().sum()

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match=re.escape("sdpa_kernel(SDPBackend.MATH)")):
        function(closure, [q])
    with sdpa_kernel(SDPBackend.MATH):
        assert function(closure, [q]).isfinite()


@every_function
@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_compiled_models(function: Any, backend: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), torch.randn(8, 4)
    compiled = torch.compile(model, backend=backend)
    if backend == "aot_eager":
        with pytest.raises(RuntimeError, match=r"compiled function \(torch.compile\).*call the original model"):
            function(lambda: compiled(x).square().mean(), model.parameters())
    else:  # it has the graph of the original
        expected = function(lambda: model(x).square().mean(), model.parameters())
        assert function(lambda: compiled(x).square().mean(), model.parameters()).item() == pytest.approx(expected.item(), rel=1e-5)


@every_function
def test_checkpointing_that_hides_parameters(function: Any) -> None:
    first, last = nn.Linear(4, 3), nn.Linear(3, 1)
    x = torch.randn(8, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="use use_reentrant=False"):
        function(lambda: last(checkpoint(first, x, use_reentrant=True)).square().mean(), [*first.parameters(), *last.parameters()])


@every_function
def test_bad_losses(function: Any) -> None:
    name = function.__name__
    w = torch.ones(2, requires_grad=True)

    def with_backward() -> Tensor:
        loss = w.square().sum()
        loss.backward()
        return loss

    def without_grad() -> Tensor:
        with torch.no_grad():
            return w.square().sum()

    for closure, error, message in [
        (3, TypeError, "closure must be a callable"),
        (lambda: 1.0, TypeError, "closure must return the loss, a floating-point tensor of one element, got 1.0"),
        (lambda: w.square(), TypeError, "closure must return the loss"),
        (lambda: torch.ones((), dtype=torch.int64), TypeError, "closure must return the loss"),
        (lambda: w.sum() * 1j, TypeError, "closure must return the loss"),
        (lambda: w.square().sum().detach(), RuntimeError, "closure returned a loss without a graph"),
        (without_grad, RuntimeError, "closure returned a loss without a graph"),
        (with_backward, RuntimeError, "the graph of the loss is gone; the closure must return the loss without calling backward"),
        (lambda: torch.ones(2, requires_grad=True).sum(), ValueError, "the loss does not depend on any of params"),
    ]:
        with pytest.raises(error, match=f"{name}: {message}"):
            function(closure, [w])
    with torch.inference_mode(), pytest.raises(RuntimeError, match=f"{name}: closure returned a loss without a graph.*inference_mode"):
        function(lambda: w.square().sum(), [w])

    def broken() -> Tensor:
        raise KeyError("of the closure's own")

    with pytest.raises(KeyError, match="of the closure's own"):
        function(broken, [w])


@every_function
def test_bad_parameters(function: Any) -> None:
    name = function.__name__
    w = torch.ones(2, requires_grad=True)
    flat = nn.Parameter(torch.ones(2))
    flat._fsdp_flattened = True  # torch's own mark
    for params, error, message in [
        (w, TypeError, "params must be tensors in a list"),
        (3, TypeError, "params must be tensors in a list"),
        (nn.Linear(2, 2), TypeError, r"params must be tensors in a list, got a module \(Linear\); pass model.parameters\(\)"),
        ([w, 3], TypeError, r"params\[1\] must be a torch\.Tensor"),
        ([w, torch.ones(2, dtype=torch.complex64, requires_grad=True)], TypeError, r"params\[1\] has dtype torch.complex64"),
        ([torch.ones(2, device="meta", requires_grad=True)], TypeError, r"params\[0\]"),
        ([w, flat], TypeError, r"params\[1\] is sharded"),
        ([], ValueError, "none of params requires a gradient"),
        ([torch.ones(2)], ValueError, "none of params requires a gradient"),
        ([torch.ones(0, requires_grad=True)], ValueError, "none of params requires a gradient"),
    ]:
        with pytest.raises(error, match=f"{name}: {message}"):
            function(lambda: w.square().sum(), params)
    embedding = nn.Embedding(5, 2, sparse=True)
    with pytest.raises(TypeError, match=f"{name}: .*sparse=False"):
        function(lambda: embedding(torch.tensor([1, 2])).square().sum(), embedding.parameters())


def test_bad_numbers() -> None:
    w = torch.ones(2, requires_grad=True)
    for function, count in ((monitors.hessian_top_eigenvalue, "iterations"), (monitors.hessian_trace, "num_samples")):
        for arguments, error in (
            ({count: 0}, ValueError),
            ({count: 1.5}, TypeError),
            ({"seed": -1}, ValueError),
            ({"seed": 2**64}, ValueError),
        ):
            with pytest.raises(error, match=f"{function.__name__}: {next(iter(arguments))} must be"):
                function(lambda: w.square().sum(), [w], **arguments)


def test_shards(tmp_path: Any) -> None:
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        model = nn.Linear(3, 2)
        ddp = nn.parallel.DistributedDataParallel(model)
        x = torch.randn(4, 3)
        alone = monitors.hessian_trace(lambda: model(x).square().sum(), model.parameters())
        assert monitors.hessian_trace(lambda: ddp.module(x).square().sum(), ddp.parameters()).item() == alone.item()
        ddp(x).square().sum().backward()  # the next step is as ever
        sharded = fully_shard(nn.Linear(3, 2), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=r"hessian_trace: params\[0\] is sharded, .*full_state_dict=True"):
            monitors.hessian_trace(lambda: sharded(x).square().sum(), sharded.parameters())
    finally:
        dist.destroy_process_group()
