"""Weights by sharpness and draws by them under ``torch.compile``: operators of ``torch.ops.sam_kernels``, two tensors among the results."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from sam_kernels import functional
from sam_kernels.validation.check import build
from sam_kernels.validation.options import SHARPNESS_OPTIONS
from sam_kernels.validation.problem import run
from tests.helpers.compiling import assert_same, compiled, operator

SCHEMAS = {
    "sharpness_weights": "Tensor norms, Tensor beta, str? backend) -> Tensor",
    "sharpness_sample": "Tensor norms, int num_samples, Tensor beta, bool replacement, SymInt[] seed, str? backend) -> (Tensor, Tensor)",
}
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def arguments(name: str, backend: str | None, device: str = "cpu") -> tuple[Any, ...]:
    norms, beta = torch.arange(5.0, device=device), torch.tensor(0.5, dtype=torch.float64, device=device)
    return (norms, beta, backend) if name == "sharpness_weights" else (norms, 3, beta, False, [1, 2], backend)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_says_what_is_written(name: str) -> None:
    assert str(operator(name)._schema) == f"sam_kernels::{name}({SCHEMAS[name]}"


def test_every_operation_has_an_operator() -> None:
    assert set(SCHEMAS) == set(SHARPNESS_OPTIONS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(backend: str, name: str) -> None:
    opcheck(operator(name), arguments(name, backend))


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_fake_result_is_like_the_real_one(name: str) -> None:
    def described() -> list[object]:
        result = operator(name)(*arguments(name, None))
        return [(tensor.shape, tensor.dtype, tensor.device) for tensor in ([result] if isinstance(result, Tensor) else result)]

    with FakeTensorMode():
        fakes = described()
    assert fakes == described()


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_keyword_set(backend: str, name: str) -> None:
    for option in SHARPNESS_OPTIONS[name]:
        call = build(name, "odd", "float32", option)
        torch._dynamo.reset()
        assert_same(option, compiled(run, "eager")(call), run(call))


def test_new_seeds_and_betas_make_no_new_graphs(backend: str) -> None:
    graphs = 0

    def count(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    def draw(norms: Tensor, beta: float, seed: int) -> tuple[Tensor, Tensor]:
        return functional.sharpness_sample(norms, 2, beta=beta, replacement=False, seed=seed)

    traced, norms = torch.compile(draw, backend=count, fullgraph=True), torch.rand(6)
    for i in range(6):
        assert_same(f"{i}", traced(norms, 0.5 + i, 2**40 + i), draw(norms, 0.5 + i, 2**40 + i))
    assert graphs <= 3


def test_a_wrong_call_has_the_same_words() -> None:
    # dynamo leaves grad mode as it was inside the graph when that raises
    with torch.enable_grad(), pytest.raises(Exception, match="num_samples must be at most 4"):
        compiled(lambda norms: functional.sharpness_sample(norms, 5, beta=1.0, replacement=False, seed=0), "eager")(torch.ones(4))
