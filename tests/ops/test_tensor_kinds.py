"""Tensors without memory of their own: each operation refuses them by name, or runs its fake implementation. None reaches a kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sam_kernels import functional
from sam_kernels._memory_of import is_fake, why_no_memory
from sam_kernels._tensor_list import TensorList
from sam_kernels.backends.native import CUDA_ON_HOST
from sam_kernels.functional import per_sample as per_sample_operations
from tests.helpers.calls import CALLS as OVER_LISTS
from tests.helpers.calls import Arguments
from tests.helpers.compare import assert_same_bits
from tests.helpers.ranks import on_one_rank

SCALARS = {"norm": torch.tensor(1.0), "grad_scale": torch.tensor(2.0), "found_inf": torch.tensor(0.0)}
TAKEN = {  # the scalar tensors that an operation takes besides those of its call
    "perturb_": ("grad_scale", "found_inf"),
    "sgd_step_": ("norm", "grad_scale", "found_inf"),
    "adamw_step_": ("norm", "grad_scale", "found_inf"),
    "grad_norm": ("found_inf",),
    "centralize_": ("found_inf",),
    "direction_norm_": ("grad_scale", "found_inf"),
    "grad_dots": ("found_inf",),
    "combine_": ("found_inf",),
}
NUMBERS = ("rho", "lambd", "lr", "scale", "left_weight", "right_weight", "origin_weight", "beta")


def per_sample(**more: Any) -> Arguments:
    return {"square_norms": torch.zeros(2, dtype=torch.float64), "grad_outputs": torch.ones(2, 3, 4), **more}


MORE: dict[str, Callable[[], Arguments]] = {
    "check_finite_": lambda: {"grads": [torch.ones(4, 3), torch.ones(5)], "found_inf": torch.zeros(())},
    "grad_norm_": lambda: {
        "norm": torch.zeros(()), "grads": [torch.ones(4, 3), torch.ones(5)], "found_inf": torch.zeros(()), "skipped": torch.zeros(())
    },
    "sharpness_weights": lambda: {"norms": torch.ones(3), "beta": torch.tensor(0.5)},
    "sharpness_sample": lambda: {"norms": torch.ones(3), "num_samples": 2, "beta": 0.5, "replacement": True, "seed": 1},
    "per_sample.linear_square_norms_": lambda: per_sample(inputs=torch.ones(2, 3, 5), products=torch.zeros(2, 4, 5)),
    "per_sample.embedding_square_norms_": lambda: per_sample(indices=torch.ones(2, 3, dtype=torch.int64)),
    "per_sample.affine_grads_": lambda: {
        "weight_grads": torch.zeros(2, 4), "bias_grads": torch.zeros(2, 4), "normalized": torch.ones(2, 3, 4, 1),
        "grad_outputs": torch.ones(2, 3, 4, 1),
    },
    "per_sample.conv_square_norms_": lambda: {
        "square_norms": torch.zeros(2, dtype=torch.float64), "inputs": torch.ones(2, 3, 5), "grad_outputs": torch.ones(2, 4, 4),
        "kernel_size": (2,), "stride": (1,), "padding": (0,), "dilation": (1,),
    },
}  # fmt: skip


def with_scalars(op: str, call: Callable[[], Arguments]) -> Arguments:
    """The call with every scalar tensor it can take, and its numbers as tensors."""
    arguments = call()
    arguments |= {name: SCALARS[name].clone() for name in TAKEN.get(op, ()) if name not in arguments}
    numbers = {name: torch.tensor(float(arguments[name])) for name in NUMBERS if name in arguments}
    return {**arguments, **numbers}


CALLS = {op: (lambda op=op, call=call: with_scalars(op, call)) for op, call in {**OVER_LISTS, **MORE}.items()}


def operation(op: str) -> Callable[..., Any]:
    module, _, name = op.split()[0].rpartition(".")
    function: Callable[..., Any] = getattr(per_sample_operations if module else functional, name)
    return function


class Wrapper(Tensor):
    """Has no memory: holds another tensor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


class Traceable(Wrapper):
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Traceable:
        return Traceable(inner["inner"])


class WithMemory(Tensor):
    """As plain a subclass as there is."""


def freed(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(0)
    return tensor


def quantized(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8)


def nested(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([tensor, tensor])


KINDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "wrapper": (Wrapper, "is a Wrapper without memory of its own"),
    "traceable": (Traceable, r"is a Traceable, which wraps other tensors .*tensor\.inner"),
    "meta": (lambda tensor: tensor.to("meta"), "is on the meta device"),
    "sparse": (lambda tensor: tensor.to_sparse(), r"is a torch\.sparse_coo tensor|must be a number or a dense"),
    "freed": (freed, "has no memory: its storage was freed"),
    "nested": (nested, "is a nested tensor"),
    "jagged": (lambda tensor: torch.nested.nested_tensor([tensor.reshape(-1)], layout=torch.jagged), r"is a nested tensor \(torch\.jagged"),
    "uninitialized": (lambda tensor: torch.nn.UninitializedParameter(requires_grad=False), "is uninitialized"),
}
OF_DTYPE = {"complex": lambda tensor: tensor.to(torch.complex64), "quantized": quantized, "integer": lambda tensor: tensor.to(torch.int32)}


def offered(backend: str, calls: dict[str, Callable[[], Arguments]]) -> Iterator[tuple[str, Callable[[], Arguments]]]:
    """The calls that the backend has kernels for: CUDA's ahead of time have none of norms per sample."""
    for op, call in calls.items():
        if not (op.startswith("per_sample") and backend == "native" and CUDA_ON_HOST):
            yield op, call


def places(arguments: Arguments) -> Iterator[tuple[str, Callable[[Any], None], Tensor]]:
    """Every tensor argument, and one tensor of every list: the name in a message, how to replace it, the tensor."""
    for name, value in list(arguments.items()):
        if isinstance(value, Tensor):
            yield name, lambda other, name=name: arguments.__setitem__(name, other), value
        elif name == "grad_groups":
            yield f"{name}[1][1]", lambda other, value=value: value[1].__setitem__(1, other), value[1][1]
        elif isinstance(value, list):
            yield f"{name}[1]", lambda other, value=value: value.__setitem__(1, other), value[1]


def plain_tensors(arguments: Any) -> list[Tensor]:
    values = arguments.values() if isinstance(arguments, dict) else arguments
    found = [[value] if isinstance(value, Tensor) else plain_tensors(value) if isinstance(value, list) else [] for value in values]
    ordinary = [tensor for tensors in found for tensor in tensors if type(tensor) is Tensor and not tensor.is_quantized]
    return [tensor for tensor in ordinary if why_no_memory(tensor) is None]


def assert_refused(make: Callable[[Tensor], Tensor], words: str, *, only_lists: bool = False) -> None:
    for op, call in CALLS.items():
        for i, (name, _, _) in enumerate(places(call())):
            if only_lists and (not name.endswith("]") or name.startswith("state_steps")):
                continue
            arguments = call()
            _, put, tensor = list(places(arguments))[i]
            put(make(tensor))
            kept = plain_tensors(arguments)
            before = [other.clone() for other in kept]
            with pytest.raises(TypeError) as caught:  # noqa: PT012 - else nothing would name the call that raised nothing
                operation(op)(**arguments)
                pytest.fail(f"{op} accepted {name}")
            message = rf"{op.split()[0].split('.')[-1]}: {name} "
            assert str(caught.value).startswith(message), f"{op}, {name}: {caught.value}"
            caught.match(words)
            assert_same_bits(f"{op}, {name}", kept, before)


def test_the_unchanged_calls_are_right(backend: str) -> None:
    for calls in (CALLS, OVER_LISTS):
        for op, call in offered(backend, calls):
            operation(op)(**call())


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_without_memory_are_refused_by_name(backend: str, kind: str) -> None:
    make, words = KINDS[kind]
    assert_refused(make, words)


@pytest.mark.parametrize("kind", OF_DTYPE)
def test_dtypes_without_kernels_are_refused_by_name(backend: str, kind: str) -> None:
    assert_refused(OF_DTYPE[kind], "dtype|must be a torch|supported", only_lists=True)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    with on_one_rank(tmp_path_factory.mktemp("gloo")):
        yield init_device_mesh("cpu", (1,))


def test_distributed_tensors_are_refused_by_name(backend: str, mesh: DeviceMesh) -> None:
    def distribute(tensor: Tensor) -> Tensor:
        return distribute_tensor(tensor, mesh, [Shard(0) if tensor.dim() else Replicate()])

    assert_refused(distribute, r"is a DTensor, which has no memory of its own; pass its local part, tensor\.to_local\(\)")
    grads = [distribute(torch.ones(4, 3)), distribute(torch.ones(5))]
    with pytest.raises(TypeError, match=r"grad_norm: grads\[0\] is a DTensor"):
        functional.grad_norm(grads)
    assert functional.grad_norm([grad.to_local() for grad in grads]).item() == pytest.approx(17**0.5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad, torch.func.functionalize], ids=["vmap", "grad", "functionalize"])
def test_transforms_of_torch_func_are_refused(backend: str, transform: Callable[..., Any]) -> None:
    outside, leaked = torch.ones(2, 3), []

    def own(x: Tensor) -> Tensor:
        leaked.append(x)
        return functional.grad_norm([outside, x])

    def others(x: Tensor) -> Tensor:
        return functional.grad_norm([outside]) + x.sum()

    for function, words in ((own, r"grad_norm: given grads\[1\] inside a transform"), (others, "grad_norm: called inside a transform")):
        with pytest.raises(TypeError, match=words):
            transform(function)(torch.ones(2, 3))
    if transform is not torch.func.functionalize:  # there what leaks is an ordinary tensor again
        with pytest.raises(TypeError, match=r"check_finite_: grads\[0\] (belongs to a transform|has no memory)"):
            functional.check_finite_(leaked, torch.zeros(()))


@pytest.mark.parametrize(
    "make", [torch.nn.Parameter, torch.nn.Buffer, lambda t: t.as_subclass(WithMemory)], ids=["parameter", "buffer", "own"]
)
def test_subclasses_with_memory_give_the_same_bits(backend: str, make: Callable[[Tensor], Tensor]) -> None:
    for op, call in offered(backend, CALLS):
        expected, arguments = call(), call()
        result = operation(op)(**expected)
        for i in range(len(list(places(arguments)))):
            _, put, tensor = list(places(arguments))[i]
            put(make(tensor) if tensor.is_floating_point() else tensor)
        got = operation(op)(**arguments)
        assert (got is None) == (result is None), op
        if isinstance(got, Tensor):
            assert_same_bits(op, [got.as_subclass(Tensor)], [result])
        for (name, _, one), (_, _, other) in zip(places(arguments), places(expected), strict=True):
            assert_same_bits(f"{op}, {name}", [one.as_subclass(Tensor)], [other])


def described(result: Any) -> Any:
    if isinstance(result, Tensor):
        return result.dtype, tuple(result.shape), result.device
    return tuple(map(described, result)) if isinstance(result, tuple) else result


def all_tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from all_tensors(item)


@pytest.mark.parametrize("as_trusted", [False, True], ids=["lists", "TensorList"])
def test_fake_tensors_give_fake_results(backend: str, as_trusted: bool) -> None:
    """While their mode is active, and after it: the shapes, dtypes and devices of the real call."""
    for op, call in offered(backend, {**OVER_LISTS, **MORE}):
        expected = described(operation(op)(**call()))
        with FakeTensorMode():
            arguments = call()
            if as_trusted:
                arguments = {name: TensorList(value) if _is_tensors(value) else value for name, value in arguments.items()}
            inside = operation(op)(**arguments)
        after = inside if as_trusted else operation(op)(**arguments)
        for result in (inside, after):
            assert described(result) == expected, op
            assert all(map(is_fake, all_tensors(result))), op
        assert all(map(is_fake, all_tensors(arguments))), op


def _is_tensors(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(tensor, Tensor) for tensor in value)


def test_what_a_first_step_fills_is_fake(backend: str) -> None:
    with FakeTensorMode():
        params, grads, ema = [torch.ones(3)], [torch.ones(3)], [None]
        buffers: list[Tensor | None] = [None]
        functional.sgd_step_(params, grads, buffers, lr=0.1, momentum=0.9)
        functional.direction_norm_(grads, ema, kind="vasso")
    assert isinstance(buffers[0], FakeTensor)
    assert isinstance(ema[0], FakeTensor)


def test_fake_lists_are_checked(backend: str) -> None:
    with FakeTensorMode():
        three, four = torch.ones(3), torch.ones(4)
        with pytest.raises(ValueError, match=r"restore_: old_params\[0\] has shape \(4,\), params\[0\] has \(3,\)"):
            functional.restore_([three], [four])
        with pytest.raises(ValueError, match=r"perturb_: grads has 2 tensors, params has 1"):
            functional.perturb_([three], [three, three], [three], torch.ones(()), rho=0.1)
        with pytest.raises(TypeError, match=r"grad_norm: grads\[1\] has dtype torch.complex64"):
            functional.grad_norm([three, torch.ones(3, dtype=torch.complex64)])
        assert functional.grad_norm([three], [four]).shape == ()  # params are not read unless adaptive


def test_real_and_fake_tensors_do_not_mix(backend: str) -> None:
    """Torch's own error, or that of the operation: never a kernel that reads nothing."""
    real = [torch.ones(3), torch.ones(3)]
    with FakeTensorMode():
        fake = torch.ones(3)
        for grads in (real, TensorList(real)):
            with pytest.raises(Exception, match="FakeTensor"):
                functional.grad_norm(grads)
        with pytest.raises(Exception, match="FakeTensor"):
            functional.check_finite_(real, torch.zeros(()))
    with pytest.raises(Exception, match="FakeTensor"):
        functional.restore_([fake], [real[0]])
    with pytest.raises(Exception, match="FakeTensor"):
        functional.check_finite_(real, fake.sum())


def test_the_words_for_a_tensor() -> None:
    assert why_no_memory(torch.ones(3)) is None
    assert why_no_memory(torch.ones(0)) is None
    assert why_no_memory(torch.nn.Parameter(torch.ones(3))) is None
    assert why_no_memory(torch.ones(3).as_subclass(WithMemory)) is None
    assert why_no_memory(torch.ones(3, dtype=torch.complex64)) is None
    with FakeTensorMode():
        fake = torch.ones(3)
    assert (is_fake(fake), is_fake(torch.ones(3)), is_fake(torch.ones(3, device="meta"))) == (True, False, False)
    assert "FakeTensor" in str(why_no_memory(fake))
