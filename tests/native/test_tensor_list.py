"""How the native core reads tensors: through torch's DLPack exchange functions, or through their Python methods on an older torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from sam_kernels import functional

_cpu = pytest.importorskip("sam_kernels._cpu", reason="the native core is not built")
cpu = pytest.importorskip("sam_kernels.backends.native.cpu")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(params=["dlpack", "methods"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    # torch._C.TensorBase: what every tensor is an instance of, without the exchange functions.
    _cpu.register_types(torch.Tensor if request.param == "dlpack" else torch._C.TensorBase, torch.nn.Parameter, DTYPES)
    yield request.param
    _cpu.register_types(torch.Tensor, torch.nn.Parameter, DTYPES)


def test_the_path_is_the_one_asked_for(path: str) -> None:
    expected = path == "dlpack" and hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    assert _cpu.reads_through_dlpack() is expected


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_every_dtype_and_layout(path: str, dtype: torch.dtype) -> None:
    base = torch.linspace(-2, 2, 4 * 6 * 5 * 3).to(dtype)
    tensors = [
        base.reshape(4, 6, 5, 3),
        base.reshape(4, 6, 5, 3).to(memory_format=torch.channels_last),
        base[1:8],
        base[::2],
        base.reshape(12, 30).t(),
        base.reshape(1, 360).t(),
        base[0],
        base[:0],
        torch.nn.Parameter(base),
    ]
    got = functional.grad_norm(tensors)
    expected = torch.sqrt(sum((tensor.double() ** 2).sum() for tensor in tensors))
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


def test_contiguity_is_torchs(path: str) -> None:
    base = torch.zeros(4, 6, 5, 3)
    tensors = [
        base,
        base.permute(0, 2, 3, 1),
        base[:, :1],
        base[:1],
        base[:0, ::2],
        base.transpose(0, 1),
        base[..., 0],
        base.expand(2, 4, 6, 5, 3),
    ]
    expected = [i for i, tensor in enumerate(tensors) if not tensor.is_contiguous()]
    assert _cpu.TensorList(tensors).non_contiguous == expected


def test_moves_are_noticed(path: str) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    described = _cpu.TensorList(params)
    assert described.is_current(params)
    assert described.current_grads(params) is None  # no gradients yet
    for param in params:
        param.grad = torch.ones(3)
    grads, _ = described.current_grads(params)
    assert [id(grad) for grad in grads] == [id(param.grad) for param in params]
    params[1].data = torch.ones(3)
    assert not described.is_current(params)
    assert described.current_grads(params) is None


def test_step_counters_fit_parameters_of_any_memory_order() -> None:
    params = cpu.BACKEND.trust([torch.ones(4, 3, 5, 5).to(memory_format=torch.channels_last), torch.ones(7)])
    assert params is not None
    assert cpu.BACKEND.trust([torch.zeros(()), torch.zeros(())], params) is not None
    assert cpu.BACKEND.trust([torch.ones(4, 3, 5, 5), torch.ones(7)], params) is None


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.ones(2, dtype=torch.complex64), TypeError, "dtype torch.complex64 has no kernel"),
        (torch.ones(2, dtype=torch.int32), TypeError, "dtype torch.int32 has no kernel"),
        (torch.eye(2).to_sparse(), RuntimeError, "storage"),
        (3, TypeError, "expected a torch.Tensor, got int"),
        (None, TypeError, "expected a torch.Tensor, got NoneType"),
    ],
)
def test_what_cannot_be_read_is_an_error(path: str, value: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _cpu.TensorList([torch.ones(2), value])
