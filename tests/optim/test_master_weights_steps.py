"""Steps on float32 masters: the family, every way to take a step, parameters of several dtypes, loss scales, memory."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.memory import reachable_tensors
from sam_kernels import RSAM, RWSAM, SAM, WSAM, schedules
from tests.helpers.compare import assert_same_bits
from tests.helpers.pairwise import covering_pairs, in_turns
from tests.optim import family
from tests.optim.family_runs import make
from tests.optim.master_problem import WAYS, assert_masters, assert_rounded, closure_of, grads_of, masters_of, params_of, run, take_step

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

SGD, ADAMW, RMSPROP = "sgd-momentum", "adamw", "rmsprop"
F32, F16, B16 = torch.float32, torch.float16, torch.bfloat16

# Members whose rules leave the second pass's gradients as they are, and the ways that they refuse.
REFUSED: dict[str, tuple[str, ...]] = {
    "SAM": (),
    "VaSSO": ("micro-batches",),
    "FriendlySAM": ("micro-batches",),
    "Extragradient": (),
    "RSAM": (),
    "WSAM-decoupled": ("micro-batches", "backward"),
    "LookSAM": ("micro-batches", "two steps", "backward"),
    "MomentumSAM": ("micro-batches", "n-SAM", "backward"),
    "S2SAM": ("micro-batches", "n-SAM", "backward"),
}
ROUNDED_DIRECTION = ("VaSSO", "FriendlySAM", "RSAM")  # d is made in the gradients' dtype
ROWS = [
    {"name": name, "base": base, "way": way, "dtype": dtype}
    for name, base, way, dtype in itertools.product(REFUSED, ("sgd", SGD, ADAMW, "adamw-amsgrad", RMSPROP), WAYS, (B16, F16))
    if base in family.MEMBERS[name].bases and way not in REFUSED[name]
]
RUNS = [pytest.param(*ROWS[i].values(), id="-".join(map(str, ROWS[i].values()))) for i in covering_pairs(ROWS)]


@pytest.mark.parametrize(("name", "base", "way", "dtype"), RUNS)
def test_every_members_steps_are_those_of_float32_parameters(name: str, base: str, way: str, dtype: torch.dtype) -> None:
    found = []
    for each in (F32, dtype):
        params, seen = params_of(each), list[list[Tensor]]()
        optimizer = make(name, params, base, master_weights=each is not F32, **({"k": 1} if name == "LookSAM" else {}))
        for i in range(3):
            take_step(way, optimizer, params, i, seen=seen)
        found.append((optimizer, params, seen))
    (_, expected, seen), (optimizer, params, seen_narrow) = found
    assert_masters(optimizer, params, expected)
    if name not in ROUNDED_DIRECTION:
        for i, (got, right) in enumerate(zip(seen_narrow, seen, strict=True)):
            assert_same_bits(f"weights of call {i}", got, [each.to(dtype) for each in right])


@pytest.mark.parametrize("base", [SGD, ADAMW, RMSPROP])
@pytest.mark.parametrize("name", ["GCSAM", "GSAM", "WSAM-coupled", "LookSAM", "SAMSPS"])
def test_a_rule_that_rewrites_gradients_steps_along_what_it_leaves(name: str, base: str) -> None:
    """Its gradients are of 16 bits; the step along them is that of float32 parameters."""
    params, expected = params_of(B16), params_of(F32)
    optimizer = make(name, params, base, master_weights=True)
    kind, kwargs = family.BASES[base] if name != "SAMSPS" else (torch.optim.SGD, {"lr": 1.0, "momentum": 0.6})
    plain = SAM(expected, kind, **kwargs)

    def left_gradients() -> None:
        for param, narrow in zip(expected, params, strict=True):
            assert narrow.grad is not None
            param.grad = narrow.grad.float()

    for i in range(4):
        optimizer.step(closure_of(params, 10 * i, loss=1000.0))
        plain.step(left_gradients)
        assert_masters(optimizer, params, expected)


# --- groups ---

GRADIENTS = ("all", "none in the first pass", "none in the second pass", "frozen", "a group at rest")
MIXED = in_turns([SGD, ADAMW, RMSPROP], GRADIENTS, [{}, {"adaptive": True, "eta": 0.1, "scale": 2.0}])


@pytest.mark.parametrize(("base", "gradients", "options"), MIXED)
def test_a_group_may_mix_dtypes(base: str, gradients: str, options: dict[str, Any]) -> None:
    """With lambd = 0 no norm, whose last bits depend on the lists that it is taken of, is in the perturbed weights."""
    without = {"none in the first pass": 1, "none in the second pass": 2}.get(gradients)
    found = []
    for dtypes in ((F32, F32, F32) * 2, (B16, F16, F32, F32, B16, F16)):
        params, seen = [*params_of(dtypes[:3]), *params_of(dtypes[3:])], list[list[Tensor]]()
        if gradients == "frozen":
            params[1].requires_grad_(False)
            params[3].requires_grad_(False)
        groups = [{"params": params[:3], **({"rho": 0.0} if gradients == "a group at rest" else {})}, {"params": params[3:]}]
        optimizer = make("SAM", groups, base, rho=0.01, lambd=0.0, master_weights=B16 in dtypes, **options)

        def lack(call: int, params: list[nn.Parameter] = params) -> None:
            if call == without:
                params[0].grad = params[2].grad = params[5].grad = None

        for i in range(3):
            closures = [closure_of(params[:3], 10 * i, seen=seen), closure_of(params[3:], 10 * i + 5, seen=seen, spoil=lack)]
            optimizer.step(lambda closures=closures: [closure() for closure in closures])
        found.append((optimizer, params, seen))
    (_, expected, seen), (optimizer, params, seen_narrow) = found
    assert_masters(optimizer, params, [right if param.requires_grad else param for param, right in zip(params, expected, strict=True)])
    for got, right in zip(itertools.chain(*seen_narrow), itertools.chain(*seen), strict=True):
        assert_same_bits("weights of a call", [got], [right.to(got.dtype)])


def test_lists_of_one_group_get_random_numbers_of_their_own() -> None:
    """16-bit parameters with masters and others are two lists, and random numbers are functions of the place in one."""
    params = [nn.Parameter(torch.zeros(64, dtype=dtype)) for dtype in (B16, F32)]
    optimizer = RSAM(params, torch.optim.SGD, lr=0.1, sigma=1.0, master_weights=True)
    optimizer.random_step()
    narrow, wide = (param.detach().double() for param in params)
    assert not torch.allclose(narrow, wide, atol=2**-7)
    assert abs(float(torch.corrcoef(torch.stack([narrow, wide]))[0, 1])) < 0.5  # 4 standard deviations of independent numbers


@pytest.mark.parametrize("norms", ["exact", "finite_difference", "jvp"])
def test_reweighted_steps_start_from_the_masters(norms: str) -> None:
    """The step is that of float32 parameters along the gradients of the second pass, whatever the passes of the first half leave."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2)).to(B16)
    expected = [nn.Parameter(param.detach().float()) for param in model.parameters()]
    optimizer = RWSAM(model, torch.optim.SGD, beta=1.0, norms=norms, lr=0.1, momentum=0.9, rho=0.1, master_weights=True)
    plain = SAM(expected, torch.optim.SGD, lr=0.1, momentum=0.9)
    inputs, targets = torch.randn(8, 6), torch.randn(8, 2)

    def losses() -> Tensor:
        optimizer.zero_grad()
        return (model(inputs.to(B16)) - targets).square().mean(1)

    def left_gradients() -> None:
        for param, narrow in zip(expected, model.parameters(), strict=True):
            param.grad = narrow.grad.float()  # type: ignore[union-attr]

    for i in range(3):
        is_warned = norms == "finite_difference" and i == 0
        with pytest.warns(UserWarning, match="forward pass in 16 bits") if is_warned else contextlib.nullcontext():
            optimizer.step(losses)
        plain.step(left_gradients)
        assert_masters(optimizer, list(model.parameters()), expected)


def test_a_radius_that_rests_and_accumulated_gradients() -> None:
    found = []
    for dtype in (F32, B16):
        params = params_of(dtype)
        rho = schedules.Interval(0.5, every=3)
        optimizer = SAM(params, torch.optim.RMSprop, lr=0.01, rho=rho, max_grad_norm=1.0, master_weights=dtype is B16)
        run(optimizer, params)
        for i in range(40, 80, 10):
            optimizer.backward(closure_of(params, i))
            optimizer.backward(closure_of(params, i + 5))
            torch.nn.utils.clip_grad_value_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        found.append((optimizer, params))
    assert_masters(*found[1], found[0][1])


# --- loss scales and autocast ---


def not_fused(params: Any, **kwargs: Any) -> torch.optim.Optimizer:
    base = torch.optim.SGD(params, **kwargs)
    base.register_step_post_hook(lambda *_: None)
    return base


SCALED: dict[str, Callable[..., Any]] = {
    "sgd": lambda params, **kwargs: SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, max_grad_norm=1.0, **kwargs),
    "adamw": lambda params, **kwargs: SAM(params, torch.optim.AdamW, lr=0.01, **kwargs),
    "rmsprop": lambda params, **kwargs: SAM(params, torch.optim.RMSprop, lr=0.01, max_grad_norm=1.0, **kwargs),
    "wsam": lambda params, **kwargs: WSAM(params, torch.optim.SGD, lr=0.5, **kwargs),
    "wsam-not-fused": lambda params, **kwargs: WSAM(params, not_fused(params, lr=0.5), **kwargs),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("by_scaler", [False, True], ids=["closure", "scaler.step"])
def test_float16_with_a_loss_scale(name: str, by_scaler: bool) -> None:
    """Gradients that only the loss scale keeps above float16's smallest numbers; steps with infinite gradients are skipped."""
    found = []
    for dtype in (F32, F16):
        params, seen = params_of(dtype), list[Any]()
        optimizer = SCALED[name](params, rho=0.5, lambd=0.7, master_weights=dtype is F16)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=2)
        scaler.scale(torch.zeros(()))
        for i in range(5):

            def scale(call: int, step: int = i, params: list[nn.Parameter] = params, scaler: Any = scaler) -> None:
                for param in params:
                    param.grad *= scaler.get_scale() * 2.0**-18  # type: ignore[operator]
                if (step, call) in ((1, 2), (2, 1)):
                    params[1].grad[3, 4] = float("inf")  # type: ignore[index]

            closure = closure_of(params, 10 * i, spoil=scale)
            if by_scaler:
                closure()
                optimizer.first_step(grad_scaler=scaler)
                closure()
                scaler.step(optimizer)
            else:
                optimizer.step(closure, grad_scaler=scaler)
            scaler.update()
            seen.append((scaler.get_scale(), optimizer.skipped_steps))
        found.append((optimizer, params, seen))
    (_, expected, seen), (optimizer, params, seen_narrow) = found
    assert seen_narrow == seen
    assert seen[-1][1] == 2
    assert seen[1][0] == 2.0**13
    assert_masters(optimizer, params, expected)
    for param, right in zip(params, expected, strict=True):  # scaled, or unscaled and rounded
        assert_same_bits("grad", [param.grad], [right.grad.to(F16)])  # type: ignore[union-attr]


def test_autocast_around_the_step_casts_the_perturbed_weights_again() -> None:
    losses = []
    for cache in (True, False):
        torch.manual_seed(3)
        model = nn.Linear(6, 2).to(F16)
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=2.0, master_weights=True)
        inputs, found = torch.randn(4, 6, dtype=F16), list[float]()

        def closure(optimizer: SAM = optimizer, model: nn.Module = model, found: list[float] = found, inputs: Tensor = inputs) -> Tensor:
            optimizer.zero_grad()
            loss = model(inputs).float().square().mean()
            loss.backward()
            found.append(loss.item())
            return loss

        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
                optimizer.step(closure)
        losses.append(found)
    assert losses[0] == losses[1]
    assert losses[0][1] > losses[0][0]


# --- memory ---


class Allocated(TorchDispatchMode):
    """Counts the bytes of all new storages."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {each.untyped_storage().data_ptr() for each in self._tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        new = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in self._tensors(result)}
        self.nbytes += sum(nbytes for pointer, nbytes in new.items() if pointer not in known)
        return result

    @staticmethod
    def _tensors(tree: Any) -> Iterator[Tensor]:
        return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


@pytest.mark.parametrize(("base", "state"), [(torch.optim.AdamW, 8), (torch.optim.SGD, 0)])
@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"max_grad_norm": 1.0}], ids=str)
def test_no_memory_beyond_mixed_precision_training(base: Any, state: int, options: dict[str, Any]) -> None:
    """Parameter and gradient 2 bytes, master 4, and the base's float32 state; steps at which masters are compared need a little more."""
    params = params_of(B16)
    optimizer = SAM(params, base, lr=0.1, master_weights=True, **options)
    for step in range(1, 7):
        with Allocated() as allocated:
            for half, take in enumerate((optimizer.first_step, optimizer.second_step)):
                with torch.utils._python_dispatch._disable_current_modes():
                    for param, grad in zip(params, grads_of(10 * step + half), strict=True):
                        param.grad = grad.to(B16)
                take()
        assert step in (1, 2, 4) or allocated.nbytes == 0
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in reachable_tensors(optimizer)}
    assert sum(storages.values()) - sum(param.numel() for param in params) * (2 + 2 + 4 + state) <= 400
    masters = masters_of(optimizer)
    optimizer.release_buffers()
    assert all(left is right for left, right in zip(masters_of(optimizer), masters, strict=True))
    assert_rounded(params, masters)


def ulp_of(exact: Tensor) -> Tensor:
    """The distance of bfloat16 numbers, of 8 bits, around each value."""
    return torch.exp2(torch.frexp(exact).exponent.float() - 8)


def test_perturbed_weights_are_one_of_two_neighbours_and_masters_are_exact() -> None:
    found = []
    for dtypes in ((F32, F32, F32), (B16, F32, B16)):
        params, seen = params_of(dtypes), list[list[Tensor]]()
        options: dict[str, Any] = {"master_weights": True, "stochastic_rounding": True} if B16 in dtypes else {}
        optimizer = SAM(params, torch.optim.AdamW, lr=0.01, rho=0.05, lambd=0.0, **options)
        for i in range(3):
            optimizer.step(closure_of(params, 10 * i, seen=seen))
        found.append((optimizer, params, seen))
    (_, expected, seen), (optimizer, params, seen_narrow) = found
    assert_masters(optimizer, params, expected)
    for got, right in zip(seen_narrow[1::2], seen[1::2], strict=True):  # of the second passes
        assert_same_bits("without a master", [got[1]], [right[1]])
        for i in (0, 2):
            assert bool(((got[i].float() - right[i]).abs() < ulp_of(right[i])).all())
        assert bool((got[2] != right[2].to(B16)).any())
