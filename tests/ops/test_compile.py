"""Under ``torch.compile`` an operation is an operator of ``torch.ops.sam_kernels``: same kernels, bits and words. An eager call is none."""

import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sam_kernels import SAM, _dispatch, functional, use_backend
from sam_kernels.cli._options import FOR_LAYOUT_CASES
from tests.helpers.backends import module_of
from tests.helpers.cases import MIXED_NARROW, OPTIONS, build, run
from tests.helpers.compare import assert_same_bits

SCHEMAS = {
    "grad_norm": "Tensor[] grads, Tensor[]? params, bool adaptive, float eta, Tensor(a!)? found_inf, str? backend) -> Tensor",
    "grad_norms": "Tensor[] grad_groups, Tensor[]? params, bool adaptive, float eta, int[] group_sizes, str? backend) -> Tensor",
    "grad_norm_": "Tensor(a!) norm, Tensor[] grads, Tensor[]? params, bool adaptive, float eta, Tensor(b!)? found_inf, "
    "Tensor(c!)? skipped, str? backend) -> ()",
    "check_finite_": "Tensor[] grads, Tensor(a!) found_inf, str? backend) -> ()",
    "direction_norm_": "Tensor[] grads, Tensor(a!)[] ema, Tensor[]? params, str kind, float theta, float sigma, float lmbda, "
    "bool adaptive, float eta, Tensor? grad_scale, Tensor(b!)? found_inf, int[] first_steps, str? backend) -> Tensor",
    "perturb_": "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] old_params, Tensor norm, Tensor rho, Tensor lambd, bool adaptive, "
    "float eta, float eps, Tensor? grad_scale, Tensor? found_inf, bool from_old, Tensor?[]? ema, str? kind, float sigma, float lmbda, "
    "SymInt[]? rounding_seed, str? backend) -> ()",
    "random_perturb_": "Tensor(a!)[] params, Tensor(b!)[] old_params, SymInt[] seed, Tensor scale, str distribution, bool from_old, "
    "str? backend) -> ()",
    "restore_": "Tensor(a!)[] params, Tensor[] old_params, str? backend) -> ()",
    "sgd_step_": "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor[]? old_params, Tensor lr, float momentum, "
    "float dampening, float weight_decay, bool nesterov, bool maximize, Tensor? grad_scale, Tensor? found_inf, Tensor? norm, "
    "float? max_norm, int[] first_steps, str? backend) -> ()",
    "adamw_step_": "Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] state_steps, "
    "Tensor[]? old_params, Tensor lr, float[] betas, float eps, float weight_decay, bool decoupled, bool maximize, Tensor? grad_scale, "
    "Tensor? found_inf, Tensor? norm, float? max_norm, str? backend) -> ()",
}
NEUTRAL = {"bool": False, "float": 0.1, "Optional[float]": 0.5, "List[float]": [0.9, 0.99]}  # opcheck's arguments by schema type
# and by name
NAMED = {"kind": "friendly", "distribution": "normal", "seed": [1, 2], "rounding_seed": [2**31, 2**32 - 1], "group_sizes": [1, 1]}
NAMED |= {"first_steps": [1]}
VARIANTS = {"grad_norm_", "check_finite_"}  # of grad_norm: no keyword sets of their own


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
    """In memory laid out alike, on which random numbers depend."""
    return copy.deepcopy(tree)


def assert_same(name: str, actual: Any, expected: Any) -> None:
    assert_same_bits(name, *([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (actual, expected)))


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_schema_says_what_is_written(name: str) -> None:
    assert str(operator(name)._schema) == f"sam_kernels::{name}({SCHEMAS[name]}"


def test_every_operation_has_an_operator() -> None:
    assert set(SCHEMAS) == set(OPTIONS) | VARIANTS == set(functional.__all__) - {"combine_norms"}


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
            operator("direction_norm_")(grads, emas, None, *direction, list(range(len(grads)))[1:], None),
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
def test_every_keyword_set(backend: str, name: str) -> None:
    for option in OPTIONS[name]:
        assert_compiles_to_eager_bits(name, "transposed", "bfloat16", option, "eager")


@pytest.mark.parametrize("name", FOR_LAYOUT_CASES)
def test_mixed_dtypes_and_layouts(backend: str, name: str) -> None:
    """Functionalized, with rows whose tensors differ in layout, strided and expanded ones among them."""
    dtypes = "mixed" if module_of(backend).DTYPES is None else MIXED_NARROW
    assert_compiles_to_eager_bits(name, "mixed_layouts", dtypes, FOR_LAYOUT_CASES[name][0], "aot_eager")


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


def direction_arguments() -> dict[str, Any]:
    given = {name: tensors for name, tensors in step_arguments().items() if name in ("params", "old_params", "grad_scale", "found_inf")}
    given |= {"first": step_arguments()["first_grads"], "second": step_arguments()["first_grads"]}
    return given | {"ema": [None, torch.randn(6, 5).t()[::2], None], "norm": torch.tensor(-1.0), "skipped": torch.tensor(2.0)}


def step_along_directions(
    params: list[Tensor],
    old_params: list[Tensor],
    *,
    first: list[Tensor],
    second: list[Tensor],
    ema: list[Tensor | None],
    norm: Tensor,
    skipped: Tensor,
    grad_scale: Tensor,
    found_inf: Tensor,
    seed: int,
    kind: str,
) -> list[Tensor]:
    """Two steps of a moving average, whose list is passed on as it was and as it has become; norms into one tensor, and random numbers."""
    options: dict[str, Any] = {"kind": kind, "sigma": 0.8, "lmbda": 0.7}
    amp = {"grad_scale": grad_scale, "found_inf": found_inf}
    functional.grad_norm_(norm, first, found_inf=found_inf, skipped=skipped)
    seen = [norm * 2, found_inf + skipped]
    before = list(ema)
    along = functional.direction_norm_(first, ema, theta=0.3, **options, **amp)
    was_first = [None if entry is None else average for entry, average in zip(before, ema, strict=True)]
    functional.perturb_(params, first, old_params, along, rho=0.1, ema=was_first, rounding_seed=seed, **options, **amp)
    seen += [along, *[param * 2 for param in params]]
    # The list holds tensors now, in eager calls and here.
    functional.perturb_(params, first, old_params, along, rho=0.2, from_old=True, ema=ema, rounding_seed=seed + 1, **options, **amp)
    seen += [param * 2 for param in params]
    functional.restore_(params, old_params)
    along = functional.direction_norm_(second, ema, params, adaptive=True, eta=0.1, theta=0.3, **options, **amp)
    functional.perturb_(params, second, old_params, along, rho=0.1, adaptive=True, eta=0.1, ema=ema, **options, **amp)
    seen += [along, *[param * 2 for param in params]]
    functional.random_perturb_(params, old_params, seed=seed, scale=0.1, distribution="normal", from_old=True)
    seen += [param * 2 for param in params]
    functional.check_finite_([*second, seen[-1] * torch.inf], found_inf)
    functional.grad_norm_(norm, second, params, adaptive=True, found_inf=found_inf, skipped=skipped)
    return seen


def assert_step_along_directions(compiler: str, kind: str, seeds: list[int]) -> int:
    """Returns how many graphs were made."""
    counter = CompileCounterWithBackend(compiler)
    step = torch.compile(step_along_directions, backend=counter, fullgraph=True)
    for seed in seeds:
        eager = direction_arguments()
        if compiler == "inductor":  # computes with a 0-dim CPU tensor only when the result is needed, of what was written to it since
            eager |= {name: eager[name].reshape(1) for name in ("norm", "found_inf", "skipped")}
        traced = clone(eager)
        expected, actual = step_along_directions(**eager, kind=kind, seed=seed), step(**traced, kind=kind, seed=seed)
        assert_same(f"seed {seed}: results", actual, expected)
        for key in eager:
            assert_same(f"seed {seed}: {key}", traced[key], eager[key])
        assert all(average is not None for average in traced["ema"])
    return int(counter.frame_count)


@pytest.mark.parametrize("kind", ["vasso", "friendly"])
def test_a_step_along_directions(backend: str, kind: str) -> None:
    assert_step_along_directions("aot_eager", kind, seeds=[5])


# What needs 64 bits is exact, as a graph's first value and as an input of it.
@pytest.mark.parametrize("seeds", [[5, 2**32 + 5, 2**63 - 2, 2**63, 2**64 - 2, 0], [2**64 - 2, 1, 2**32, 2**63 + 1]], ids=str)
def test_schedules_of_seeds_make_two_graphs(seeds: list[int]) -> None:
    assert assert_step_along_directions("aot_eager", "vasso", seeds) == 2


@pytest.mark.parametrize("options", [{}, {"kind": "vasso"}], ids=str)
def test_an_average_that_is_the_gradient_itself(options: dict[str, Any]) -> None:
    """Only read: nothing forbids that the lists share tensors."""

    def function(param: Tensor, grad: Tensor, old: Tensor) -> Tensor:
        functional.perturb_([param], [grad], [old], grad.norm(), rho=0.5, ema=[grad] if options else None, **options)
        return param + grad

    eager = [torch.randn(5), torch.randn(5), torch.randn(5)]
    traced = clone(eager)
    assert_same("result", compiled(function)(*traced), function(*eager))
    assert_same("arguments", traced, eager)


def test_a_skipped_first_step_leaves_the_same_average(backend: str) -> None:
    """Unlike a momentum buffer: eager calls put it into the list too."""

    def function(grad: Tensor, ema: list[Tensor | None], found_inf: Tensor) -> Tensor:
        return functional.direction_norm_([grad], ema, kind="friendly", found_inf=found_inf)

    eager: tuple[Any, ...] = (torch.tensor([1.0, torch.nan, 2.0]), [None], torch.tensor(0.0))
    traced = clone(eager)
    assert_same("result", compiled(function)(*traced), function(*eager))
    assert_same("arguments", traced, eager)
    assert traced[1][0].tolist() == [1.0, 0.0, 2.0]


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
    assert_step_along_directions("inductor", "friendly", seeds=[2**64 - 2, 5])


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


def random(one: Tensor, **changes: Any) -> None:
    given = {"params": [one], "old_params": [one + 2], "seed": 5, "scale": 0.1, "distribution": "normal"}
    functional.random_perturb_(**{**given, **changes})


def direction(one: Tensor, **changes: Any) -> Tensor:
    return functional.direction_norm_(**{"grads": [one], "ema": [one + 1], "kind": "vasso", **changes})


def into(one: Tensor, **changes: Any) -> None:
    functional.grad_norm_(**{"norm": one, "grads": [one + 1], **changes})


def check(one: Tensor, **changes: Any) -> None:
    functional.check_finite_(**{"grads": [one], "found_inf": one, **changes})


# What a schema can carry is refused when the graph runs, by the operation itself.
@pytest.mark.parametrize(
    ("call", "changes", "error", "words"),
    [
        (perturb, {"rho": -1.0}, ValueError, r"perturb_: rho must be a finite number in \[0.0, inf\), got -1.0"),
        (perturb, {"grads": [torch.ones(4)]}, ValueError, r"perturb_: grads\[0\] has shape \(4,\)"),
        (perturb, {"grads": []}, ValueError, r"perturb_: grads has 0 tensors, params has 1"),
        (perturb, {"grads": [torch.ones(3).int()]}, TypeError, r"perturb_: grads\[0\] has dtype torch.int32"),
        (perturb, {"ema": [None]}, ValueError, r"perturb_: ema and kind belong together, got only ema"),
        (perturb, {"kind": "vasso"}, ValueError, r"perturb_: ema and kind belong together, got only kind"),
        (perturb, {"ema": [None, None], "kind": "vasso"}, ValueError, r"perturb_: ema has 2 tensors, params has 1"),
        (perturb, {"ema": [None], "kind": "sam"}, ValueError, r"perturb_: kind must be one of 'vasso', 'friendly', got 'sam'"),
        (random, {"distribution": "uniform"}, ValueError, r"random_perturb_: distribution must be one of"),
        (random, {"scale": torch.inf}, ValueError, r"random_perturb_: scale must be a finite number"),
        (direction, {"theta": 0.0}, ValueError, r"direction_norm_: theta must be a finite number in \(0.0, 1.0\], got 0.0"),
        (direction, {"adaptive": True}, ValueError, r"direction_norm_: adaptive=True needs params"),
        (into, {}, ValueError, r"grad_norm_: norm must hold one floating-point number"),
        (check, {}, ValueError, r"check_finite_: found_inf must hold one floating-point number"),
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
        (perturb, {"norm": 1.0}, r"perturb_: norm must be a 0-dim tensor, got 1.0"),
        (perturb, {"ema": (None,), "kind": "vasso"}, r"perturb_: ema must be a list of tensors or None, got tuple"),
        (perturb, {"rounding_seed": True}, r"perturb_: rounding_seed must be an integer, got True"),
        (random, {"seed": 5.0}, r"random_perturb_: seed must be an integer, got 5.0"),
        (random, {"seed": [0, 5]}, r"random_perturb_: seed must be an integer, got list"),
        (direction, {"ema": (None,)}, r"direction_norm_: ema must be a list of tensors or None, got tuple"),
        (direction, {"ema": None}, r"direction_norm_: ema must be a list of tensors or None, got None"),
        (direction, {"kind": 1}, r"direction_norm_: kind must be one of"),
        (into, {"norm": 1.0}, r"grad_norm_: norm must be a 0-dim tensor, got 1.0"),
        (check, {"found_inf": None}, r"check_finite_: found_inf must be a 0-dim tensor, got None"),
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


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")  # the graph breaks
@pytest.mark.parametrize("seed", [-1, 2**64, 2**100])
def test_a_refused_seed(seed: int) -> None:
    words = rf"random_perturb_: seed must be an integer in \[0, 2\^64\), got {seed}"
    step = torch.compile(lambda one, seed: random(one, seed=seed), backend="aot_eager")
    for given in (5, 6):  # a constant of the graph, then an input of it
        step(torch.ones(3), given)
        with pytest.raises(ValueError, match=words):
            step(torch.ones(3), seed)


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
