"""The operations per sample under ``torch.compile``: operators of ``torch.ops.sam_kernels``, with schemas that say what is written."""

import pytest
import torch

from sam_kernels.functional import per_sample
from sam_kernels.validation.check import build
from sam_kernels.validation.options import PER_SAMPLE_OPTIONS
from sam_kernels.validation.per_sample import written
from sam_kernels.validation.problem import run
from tests.helpers.compiling import compiled, operator

SCHEMAS = {
    "linear_square_norms_": "Tensor(a!) square_norms, Tensor inputs, Tensor grad_outputs, Tensor(b!)? products, bool bias, str method, "
    "str precision, str? backend) -> ()",
    "conv_square_norms_": "Tensor(a!) square_norms, Tensor inputs, Tensor grad_outputs, Tensor(b!)? products, int[] kernel_size, "
    "int[] stride, int[] padding, int[] dilation, int groups, str method, str precision, str? backend) -> ()",
    "affine_grads_": "Tensor(a!)? weight_grads, Tensor(b!)? bias_grads, Tensor? normalized, Tensor grad_outputs, str? backend) -> ()",
    "embedding_square_norms_": "Tensor(a!) square_norms, Tensor indices, Tensor grad_outputs, int? padding_idx, str? backend) -> ()",
}
pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_says_what_is_written(name: str) -> None:
    assert str(operator(name)._schema) == f"sam_kernels::{name}({SCHEMAS[name]}"


def test_every_operation_has_an_operator() -> None:
    assert set(SCHEMAS) == set(PER_SAMPLE_OPTIONS) == set(per_sample.__all__) - {"linear_method"}


@pytest.mark.parametrize(("name", "option"), [(name, option) for name, options in PER_SAMPLE_OPTIONS.items() for option in options])
def test_every_keyword_set(name: str, option: str) -> None:
    eager = build(name, "odd", "float32", option)
    traced = eager.clone()
    run(eager)
    compiled(run, "eager")(traced)
    for key in written(eager):
        assert torch.equal(traced.tensor(key), eager.tensor(key)), key


def test_a_wrong_call_has_the_same_words() -> None:
    # dynamo leaves grad mode as it was inside the graph when that raises
    with torch.enable_grad(), pytest.raises(Exception, match="groups and tokens differ"):
        compiled(lambda *tensors: per_sample.linear_square_norms_(*tensors), "eager")(
            torch.zeros(2, dtype=torch.float64), torch.ones(2, 3, 4), torch.ones(2, 4, 4)
        )
