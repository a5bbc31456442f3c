"""Under ``torch.compile`` an operation is an operator of ``torch.ops.sam_kernels``: same kernels, bits and words. An eager call is none."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sam_kernels import SAM, _dispatch, functional, use_backend
from sam_kernels.cli._options import FOR_LAYOUT_CASES
from tests.helpers.cases import OPTIONS, build, run
from tests.helpers.compare import assert_same_bits

SCHEMAS = {
    "grad_norm": "Tensor[] grads, Tensor[]? params, bool adaptive, float eta, Tensor(a!)? found_inf, str? backend) -> Tensor",
    "grad_norms": "Tensor[] grad_groups, Tensor[]? params, bool adaptive, float eta, int[] group_sizes, str? backend) -> Tensor",
    "perturb_": "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] old_params, Tensor norm, Tensor rho, Tensor lambd, bool adaptive, "
    "float eta, float eps, Tensor? grad_scale, Tensor? found_inf, bool from_old, str? backend) -> ()",
    "restore_": "Tensor(a!)[] params, Tensor[] old_params, str? backend) -> ()",
    "sgd_step_": "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[]? old_params, Tensor lr, float momentum, "
    "float dampening, float weight_decay, bool nesterov, bool maximize, Tensor? grad_scale, Tensor? found_inf, Tensor? norm, "
    "float? max_norm, int[] first_steps, str? backend) -> ()",
    "adamw_step_": "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] state_steps, "
    "Tensor[]? old_params, Tensor lr, float[] betas, float eps, float weight_decay, bool decoupled, bool maximize, Tensor? grad_scale, "
    "Tensor? found_inf, Tensor? norm, float? max_norm, str? backend) -> ()",
}
NEUTRAL = {"bool": False, "float": 0.1, "Optional[float]": 0.5, "List[float]": [0.9, 0.99]}  # opcheck's arguments by schema type


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> Callable[..., Any]:
    return torch.compile(function, backend=backend, fullgraph=True)


def operator(name: str) -> Any:
    return getattr(torch.ops.sam_kernels, name).default


def clone(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def assert_same(name: str, actual: Any, expected: Any) -> None:
    assert_same_bits(name, *([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (actual, expected)))


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_says_what_is_written(name: str) -> None:
    assert str(operator(name)._schema) == f"sam_kernels::{name}({SCHEMAS[name]}"


def test_every_operation_has_an_operator() -> None:
    assert set(SCHEMAS) == set(OPTIONS) == set(functional.__all__) - {"combine_norms"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SCHEMAS)
def test_opcheck(backend: str, name: str, dtype: torch.dtype) -> None:
    def argument(kind: str, key: str) -> Any:
        if key == "backend":
            return backend
        if key == "state_steps":
            return [torch.tensor(2.0), torch.tensor(0.0)]
        if key == "first_steps":
            return [1]
        if key == "group_sizes":
            return [1, 1]
        if "List[Tensor]" in kind:
            return [torch.rand(3, 4, dtype=dtype), torch.rand(4, 2, dtype=dtype).t()[1:]]
        if "Tensor" in kind:
            return torch.tensor(0.0 if key == "found_inf" else 0.5)
        return NEUTRAL[kind]

    arguments = [argument(str(a.type), a.name) for a in operator(name)._schema.arguments]
    opcheck(operator(name), tuple(arguments))


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
def test_every_keyword_set(name: str) -> None:
    for option in OPTIONS[name]:
        assert_compiles_to_eager_bits(name, "transposed", "bfloat16", option, "eager")


@pytest.mark.parametrize("name", FOR_LAYOUT_CASES)
def test_mixed_dtypes_and_layouts(backend: str, name: str) -> None:
    """Functionalized, with rows whose tensors differ in layout, strided and expanded ones among them."""
    assert_compiles_to_eager_bits(name, "mixed_layouts", "mixed", FOR_LAYOUT_CASES[name][0], "aot_eager")


def step_arguments() -> dict[str, Any]:
    def tensors() -> list[Tensor]:
        return [torch.randn(3, 4), torch.randn(6, 5).t()[::2], torch.randn(7).to(torch.bfloat16)]

    names = ("params", "first_grads", "second_grads", "old_params", "exp_avgs", "exp_avg_sqs")
    given: dict[str, Any] = {name: tensors() for name in names}
    given["exp_avg_sqs"] = [tensor.square() for tensor in given["exp_avg_sqs"]]
    given["momentum_buffers"] = [None, torch.randn(3, 6), None]
    given["state_steps"] = [torch.tensor(float(i)) for i in range(3)]
    return given | {"found_inf": torch.tensor(0.0), "grad_scale": torch.tensor(4.0)}


def whole_step(
    params: list[Tensor],
    first_grads: list[Tensor],
    second_grads: list[Tensor],
    old_params: list[Tensor],
    *,
    lr: float,
    rho: float,
    **state: Any,
) -> list[Tensor]:
    """Ascent and both descents; between them the parameters are read, as a forward pass in the same graph would."""
    amp = {"grad_scale": state["grad_scale"], "found_inf": state["found_inf"]}
    norm = functional.grad_norm(first_grads, params, adaptive=True, eta=0.1, found_inf=state["found_inf"])
    functional.perturb_(params, first_grads, old_params, norm, rho=rho, adaptive=True, eta=0.1, **amp)
    seen = [param * 2 for param in params]
    second = functional.grad_norm(second_grads, found_inf=state["found_inf"])
    clip = {"norm": second, "max_norm": 0.5}
    functional.sgd_step_(
        params, second_grads, state["momentum_buffers"], old_params=old_params, lr=lr, momentum=0.9, weight_decay=0.1, **amp, **clip
    )
    seen += [param + 1 for param in params]
    moments = (state["exp_avgs"], state["exp_avg_sqs"], state["state_steps"])
    functional.adamw_step_(params, second_grads, *moments, old_params=old_params, lr=lr, **amp, **clip)
    groups = functional.grad_norms([first_grads, second_grads[:1], []])
    functional.restore_(old_params, params)
    return [*seen, norm, second, groups, functional.combine_norms([norm, second])]


def assert_whole_step(compiler: str, *, calls: int) -> int:
    """Runs whole steps with another lr and rho a call; returns how many graphs were made."""
    counter = CompileCounterWithBackend(compiler)
    step = torch.compile(whole_step, backend=counter, fullgraph=True)
    for i in range(calls):
        eager = step_arguments()
        traced = clone(eager)
        schedule = {"lr": 0.1 / (i + 1), "rho": 0.05 * (i + 1)}
        expected, actual = whole_step(**eager, **schedule), step(**traced, **schedule)
        assert_same(f"call {i}: results", actual, expected)
        for key in eager:
            assert_same(f"call {i}: {key}", traced[key], eager[key])
        assert all(buffer is not None for buffer in traced["momentum_buffers"])
    return int(counter.frame_count)


def test_a_whole_step(backend: str) -> None:
    assert_whole_step("aot_eager", calls=1)


def test_schedules_of_lr_and_rho_make_two_graphs() -> None:
    assert assert_whole_step("aot_eager", calls=4) == 2  # with the numbers as constants, then with them as inputs


def test_numbers_given_as_tensors_make_no_graph_after_the_first_call() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(whole_step, backend=counter, fullgraph=True)
    made = []
    for lr in (0.1, 0.2, 0.3):
        eager = step_arguments()
        traced = clone(eager)
        schedule = {"lr": torch.tensor(lr), "rho": torch.tensor(lr, dtype=torch.float64)}
        assert_same("results", step(**traced, **schedule), whole_step(**eager, **schedule))
        assert_same("arguments", traced, eager)
        made.append(counter.frame_count)
    assert made == made[:1] * 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_whole_step_in_inductor() -> None:
    assert_whole_step("inductor", calls=2)


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
        module = _dispatch._backend(name)
        original = module.restore_
        monkeypatch.setattr(module, "restore_", lambda *lists, name=name, original=original: (ran.append(name), original(*lists)))

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


def perturb(one: Tensor, **changes: Any) -> None:
    given = {"params": [one], "grads": [one + 1], "old_params": [one + 2], "norm": torch.tensor(1.0), "rho": 0.1}
    functional.perturb_(**{**given, **changes})


def sgd(one: Tensor, **changes: Any) -> None:
    functional.sgd_step_(**{"params": [one], "grads": [one + 1], "momentum_buffers": [None], "lr": 0.1, "momentum": 0.9, **changes})


# What a schema can carry is refused when the graph runs, by the operation itself.
@pytest.mark.parametrize(
    ("call", "changes", "error", "words"),
    [
        (perturb, {"rho": -1.0}, ValueError, r"perturb_: rho must be a finite number in \[0.0, inf\), got -1.0"),
        (perturb, {"grads": [torch.ones(4)]}, ValueError, r"perturb_: grads\[0\] has shape \(4,\)"),
        (perturb, {"grads": []}, ValueError, r"perturb_: grads has 0 tensors, params has 1"),
        (perturb, {"grads": [torch.ones(3).int()]}, TypeError, r"perturb_: grads\[0\] has dtype torch.int32"),
        (sgd, {"max_norm": 1.0}, ValueError, r"sgd_step_: max_norm needs norm"),
        (sgd, {"nesterov": True, "dampening": 0.1}, ValueError, r"sgd_step_: nesterov=True needs"),
    ],
)
def test_a_refused_value(call: Callable[..., None], changes: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        compiled(lambda one: call(one, **changes))(torch.ones(3))


# What it cannot is refused while tracing; without fullgraph the graph breaks there, and the call raises what it always raises.
@pytest.mark.parametrize(
    ("call", "changes", "words"),
    [
        (perturb, {"rho": "x"}, r"perturb_: rho must be a number, got 'x'"),
        (perturb, {"rho": True}, r"perturb_: rho must be a number, got True"),
        (perturb, {"adaptive": 1}, r"perturb_: adaptive must be True or False"),
        (perturb, {"params": torch.ones(3)}, r"perturb_: params must be a list or tuple"),
        (perturb, {"grads": [3.0]}, r"perturb_: grads\[0\] must be a torch.Tensor"),
        (perturb, {"radius": 1.0}, r"unexpected keyword argument 'radius'"),
        (sgd, {"momentum_buffers": None}, r"sgd_step_: momentum_buffers must be a list"),
        (lambda one: functional.restore_([one]), {}, r"missing 1 required positional argument: 'old_params'"),
        (lambda one: functional.grad_norms([one]), {}, r"grad_norms: grad_groups\[0\] must be a list"),
    ],
)
def test_a_refused_type(call: Callable[..., None], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(TypeError, match=words):
        torch.compile(lambda one: call(one, **changes), backend="aot_eager")(torch.ones(3))
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(lambda one: call(one, **changes))(torch.ones(3))


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
