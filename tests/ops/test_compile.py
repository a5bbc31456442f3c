"""Under ``torch.compile`` an operation is an operator of ``torch.ops.sam_kernels``: same kernels, bits and words. An eager call is none."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from sam_kernels import SAM, _dispatch, functional, use_backend
from sam_kernels.backends.native import CUDA_ON_HOST
from sam_kernels.operations import Restore
from sam_kernels.validation.backends import backend_of
from sam_kernels.validation.cases import MIXED_NARROW
from sam_kernels.validation.check import build
from sam_kernels.validation.options import ABOUT_OTHERS, FOR_LAYOUT_CASES, OPTIONS, SHARPNESS_OPTIONS
from sam_kernels.validation.problem import run
from tests.helpers.compare import assert_same_bits
from tests.helpers.compiling import assert_same, compiled, operator
from tests.helpers.interpreter import is_interpreted

SCHEMAS = {
    "grad_norm": "Tensor[] grads, Tensor[]? params, bool adaptive, float eta, Tensor(a!)? found_inf, str? backend) -> Tensor",
    "grad_norms": "Tensor[] grad_groups, Tensor[]? params, bool adaptive, float eta, int[] group_sizes, str? backend) -> Tensor",
    "grad_norm_": "Tensor(a!) norm, Tensor[] grads, Tensor[]? params, bool adaptive, float eta, Tensor(b!)? found_inf, "
    "Tensor(c!)? skipped, str? backend) -> ()",
    "centralize_": "Tensor(a!)[] grads, Tensor[]? params, bool adaptive, float eta, Tensor(b!)? found_inf, str? backend) -> Tensor",
    "check_finite_": "Tensor[] grads, Tensor(a!) found_inf, str? backend) -> ()",
    "direction_norm_": "Tensor[] grads, Tensor(a!)[] ema, Tensor[]? params, str kind, float theta, float sigma, float lmbda, "
    "bool adaptive, float eta, Tensor? grad_scale, Tensor(b!)? found_inf, int[] first_steps, str? backend) -> Tensor",
    "grad_dots": "Tensor[] lefts, Tensor[] rights, Tensor[]? origins, Tensor(a!)? found_inf, str? backend) -> Tensor",
    "combine_": "Tensor(a!)[] outs, Tensor[] lefts, Tensor[] rights, Tensor[]? origins, Tensor left_weight, Tensor right_weight, "
    "Tensor origin_weight, Tensor(b!)? found_inf, str? backend) -> Tensor",
    "perturb_": "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] old_params, Tensor norm, Tensor rho, Tensor lambd, bool adaptive, "
    "float eta, float eps, Tensor? grad_scale, Tensor? found_inf, bool from_old, Tensor?[]? ema, str? kind, float sigma, float lmbda, "
    "SymInt[]? rounding_seed, str? backend) -> ()",
    "random_perturb_": "Tensor(a!)[] params, Tensor(b!)[] old_params, SymInt[] seed, Tensor scale, str distribution, bool from_old, "
    "str? backend) -> ()",
    "restore_": "Tensor(a!)[] params, Tensor[] old_params, str? backend) -> ()",
    "sgd_step_": "Tensor(a!)[] params, Tensor[] grads, Tensor(c!)[] momentum_buffers, Tensor(b!)[] old_params, Tensor lr, float momentum, "
    "float dampening, float weight_decay, bool nesterov, bool maximize, Tensor? grad_scale, Tensor? found_inf, Tensor? norm, "
    "float? max_norm, bool to_old, SymInt[]? rounding_seed, int[] first_steps, str? backend) -> ()",
    "adamw_step_": "Tensor(a!)[] params, Tensor[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] state_steps, "
    "Tensor(b!)[] old_params, Tensor lr, float[] betas, float eps, float weight_decay, bool decoupled, bool maximize, Tensor? grad_scale, "
    "Tensor? found_inf, Tensor? norm, float? max_norm, bool to_old, SymInt[]? rounding_seed, str? backend) -> ()",
}
# opcheck's arguments by schema type and by name
NEUTRAL = {"bool": False, "float": 0.1, "Optional[float]": 0.5, "List[float]": [0.9, 0.99]}
NAMED = {"kind": "friendly", "distribution": "normal", "seed": [1, 2], "rounding_seed": [2**31, 2**32 - 1], "group_sizes": [1, 1]}
NAMED |= {"first_steps": [1]}
VARIANTS = {"grad_norm_", "check_finite_"}  # of grad_norm: no keyword sets of their own


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_says_what_is_written(name: str) -> None:
    assert str(operator(name)._schema) == f"sam_kernels::{name}({SCHEMAS[name]}"


def test_every_operation_has_an_operator() -> None:
    elsewhere = {"combine_norms", *SHARPNESS_OPTIONS}  # no operation; tests/ops/test_sharpness_compile.py
    assert set(SCHEMAS) == set(OPTIONS) | VARIANTS == set(functional.__all__) - elsewhere


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(backend: str, name: str, dtype: torch.dtype) -> None:
    def argument(kind: str, key: str) -> Any:
        if key == "backend":
            return backend
        if key == "state_steps":
            return [torch.tensor(2.0), torch.tensor(0.0)]
        if key in NAMED:
            return NAMED[key]
        if key == "ema" and "Optional" in kind:
            return [torch.rand(3, 4, dtype=dtype), None]
        if "List[Tensor]" in kind:
            return [torch.rand(3, 4, dtype=dtype), torch.rand(4, 2, dtype=dtype).t()[1:]]
        if "Tensor" in kind:
            return torch.tensor(0.0 if key == "found_inf" else 0.5)
        return NEUTRAL[kind]

    arguments = [argument(str(a.type), a.name) for a in operator(name)._schema.arguments]
    opcheck(operator(name), tuple(arguments))


LISTS = {"none": [], "one": [torch.float32], "narrow": [torch.bfloat16, torch.float16], "wide": [torch.float16, torch.float64]}


@pytest.mark.parametrize("dtypes", LISTS.values(), ids=LISTS)
def test_a_fake_result_is_like_the_real_one(dtypes: list[torch.dtype]) -> None:
    def results(device: str) -> list[Tensor]:
        grads, emas = ([torch.ones(i + 2, dtype=dtype, device=device) for i, dtype in enumerate(dtypes)] for _ in range(2))
        direction = ("vasso", 0.9, 1.0, 0.6, False, 0.0, None, None)
        return [
            operator("grad_norm")(grads, None, False, 0.0, None, None),
            operator("grad_norms")(grads, None, False, 0.0, [len(grads), 0, 0], None),
            operator("centralize_")(grads, None, False, 0.0, None, None),
            operator("direction_norm_")(grads, emas, None, *direction, list(range(len(grads)))[1:], None),
            operator("grad_dots")(grads, emas, None, None, None),
            operator("combine_")(grads, emas, emas, None, *torch.ones(2, device="cpu"), torch.zeros((), device="cpu"), None, None),
        ]

    def described(tensors: list[Tensor]) -> list[object]:
        return [(tensor.shape, tensor.dtype, tensor.device, tensor.stride()) for tensor in tensors]

    with FakeTensorMode():
        fakes = described(results("cpu"))
    assert fakes == described(results("cpu"))


def assert_compiles_to_eager_bits(name: str, case: str, dtype: str, option: str, compiler: str) -> None:
    torch._dynamo.reset()
    eager = build(name, case, dtype, option)
    traced = eager.clone()
    expected, actual = run(eager), compiled(run, compiler)(traced)
    assert_same(f"{option}: result", actual, expected)
    for key, tensors in eager.lists.items():
        if option == "found_inf_first":  # eager leaves None where a skipped step was the first
            tensors = [torch.zeros_like(t) if e is None else e for t, e in zip(traced.lists[key], tensors, strict=True)]
        assert_same_bits(f"{option}: {key}", traced.lists[key], tensors)
    assert_same(f"{option}: keywords", traced.kwargs, eager.kwargs)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_keyword_set(backend: str, is_full: bool, name: str) -> None:
    """Every one on one backend, and without --full two or three on the others: a graph calls a backend as an eager call does."""
    is_first = backend == _dispatch.available()[0] and not CUDA_ON_HOST and not is_interpreted()
    for option in OPTIONS[name] if is_full or is_first else FOR_LAYOUT_CASES[name]:
        assert_compiles_to_eager_bits(name, "transposed", "bfloat16", option, "eager")


@pytest.mark.parametrize("name", FOR_LAYOUT_CASES)
def test_mixed_dtypes_and_layouts(backend: str, name: str) -> None:
    """Functionalized, with rows whose tensors differ in layout, strided and expanded ones among them."""
    dtypes = "mixed" if backend_of(backend).dtypes is None else MIXED_NARROW
    for case in ("mixed_layouts", "expanded_grads"):
        if case not in ABOUT_OTHERS.get(name, ()):
            assert_compiles_to_eager_bits(name, case, dtypes, FOR_LAYOUT_CASES[name][0], "aot_eager")


def test_views_of_one_buffer() -> None:
    def function(flat: Tensor, old: Tensor) -> Tensor:
        functional.restore_([flat[:3], flat[3:]], [old, old * 2])
        return flat + 1

    flat, old = torch.zeros(6), torch.ones(3)
    assert compiled(function)(flat, old).tolist() == [2.0, 2.0, 2.0, 3.0, 3.0, 3.0]
    assert flat.tolist() == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0]


def test_parameters_stay_leaves_that_require_grad() -> None:
    param, old = nn.Parameter(torch.zeros(3)), torch.ones(3)
    before = param._version
    compiled(lambda params, olds: functional.restore_(params, olds))([param], [old])
    assert param.tolist() == [1.0, 1.0, 1.0]
    assert param.is_leaf
    assert param.requires_grad
    assert param._version > before


@pytest.mark.usefixtures("_two_backends")
def test_a_forced_backend_is_the_one_of_where_the_call_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    for name in _dispatch.available():
        functions = backend_of(name).operations
        original = functions[Restore]
        monkeypatch.setitem(functions, Restore, lambda op, lists, name=name, original=original: (ran.append(name), original(op, lists)))

    def function(param: Tensor, old: Tensor) -> None:
        functional.restore_([param], [old])
        with use_backend("foreach"):
            functional.restore_([param], [old])
        functional.restore_([param], [old])

    traced = compiled(function)
    traced(torch.zeros(3), torch.ones(3))
    assert ran == ["native", "foreach", "native"]
    with use_backend("foreach"):
        traced(torch.zeros(3), torch.ones(3))
    assert ran[3:] == ["foreach"] * 3


@pytest.fixture
def _two_backends() -> None:
    if _dispatch.available() != ["native", "foreach"]:
        pytest.skip(f"backends {_dispatch.available()}")


class Seen(TorchDispatchMode):
    """The namespaces of the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.namespaces.add(function.namespace)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIONS)
def test_eager_calls_go_past_the_operators(backend: str, name: str) -> None:
    with Seen() as seen:
        run(build(name, "single", "float32", next(iter(OPTIONS[name]))))
    assert "sam_kernels" not in seen.namespaces


def test_eager_variants_of_the_norm_go_past_the_operators(backend: str) -> None:
    with Seen() as seen:
        functional.grad_norm_(torch.tensor(0.0), [torch.ones(3)], found_inf=torch.tensor(0.0), skipped=torch.tensor(0.0))
        functional.check_finite_([torch.ones(3)], torch.tensor(0.0))
    assert "sam_kernels" not in seen.namespaces


def test_the_operators_can_be_seen() -> None:
    with Seen() as seen:
        operator("restore_")([torch.zeros(3)], [torch.ones(3)], None)
    assert "sam_kernels" in seen.namespaces


@pytest.mark.parametrize("what", ["model", "closure"])
def test_training_a_compiled_model(what: str) -> None:
    def train(compile_it: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05)
        images, labels = torch.randn(6, 8), torch.randint(0, 4, (6,))
        forward = torch.compile(model, backend="aot_eager") if compile_it and what == "model" else model

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(forward(images), labels)
            loss.backward()
            return loss

        call = torch.compile(closure, backend="aot_eager") if compile_it and what == "closure" else closure
        losses = [optimizer.step(call) for _ in range(3)]
        return [*losses, *model.parameters()]

    assert_same(what, train(True), train(False))
