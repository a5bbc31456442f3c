"""Bases that cannot be wrapped, numbers of other libraries, empty groups, words about skipped steps, scalers in the wrong order, types."""

from __future__ import annotations

import io
import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sam_kernels
from sam_kernels import RWSAM, SAM
from sam_kernels.schedules import Interval, LRProportional, Radius, Tail
from tests.optim.family_runs import make, run, two_steps
from tests.optim.problem import assert_same_bits, closure_of, loss_of, make_batch, make_model, twin, weights

# --- bases ---


class NeedsTheLoss(torch.optim.SGD):
    def step(self, loss: Any, *, damping: float) -> None:  # type: ignore[override]
        raise AssertionError


@pytest.mark.parametrize(("base", "needed"), [(torch.optim.LBFGS, "closure"), (NeedsTheLoss, "loss, damping")])
@pytest.mark.parametrize("how", ["class", "partial", "instance"])
def test_a_base_whose_step_needs_more_is_refused_when_it_is_made(base: Any, needed: str, how: str) -> None:
    params = list(make_model().parameters())
    given = {"class": base, "partial": partial(base, lr=0.1), "instance": base(params, lr=0.1)}[how]
    with pytest.raises(TypeError, match=rf"SAM: {base.__name__}\.step needs {needed}: it evaluates the loss by itself"):
        SAM(params, given, **({"lr": 0.1} if how == "class" else {}))


@pytest.mark.parametrize("how", ["class", "partial", "instance"])
def test_sam_around_sam_is_refused(how: str) -> None:
    params = list(make_model().parameters())
    inner = partial(sam_kernels.USAM, base_optimizer=torch.optim.SGD, lr=0.1)
    given = {"class": sam_kernels.USAM, "partial": inner, "instance": inner(params)}[how]
    with pytest.raises(TypeError, match="SAM: the base optimizer is USAM, which perturbs weights itself"):
        SAM(params, given)


class SecondOrder(torch.optim.SGD):
    is_second_order = True  # as timm's Adahessian


@pytest.mark.parametrize("how", ["class", "partial", "instance"])
def test_a_base_of_second_order_is_refused(how: str) -> None:
    params = list(make_model().parameters())
    given = {"class": SecondOrder, "partial": partial(SecondOrder, lr=0.1), "instance": SecondOrder(params, lr=0.1)}[how]
    with pytest.raises(TypeError, match=r"SAM: SecondOrder differentiates the gradient in \.grad.*use a base optimizer of first order"):
        SAM(params, given, **({"lr": 0.1} if how == "class" else {}))


# --- numbers of NumPy ---


def plain_numbers(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return all(map(plain_numbers, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, np.generic)


NUMBERS = [np.float64, np.float32, np.float16]


@pytest.mark.parametrize("number", NUMBERS)
def test_numpy_numbers_are_stored_as_pythons(number: Any) -> None:
    model = make_model()
    options = {name: number(0.25) for name in ("rho", "lambd", "eta", "norm_eps", "max_grad_norm", "lr", "momentum")}
    optimizer = SAM(model.parameters(), torch.optim.SGD, adaptive=True, **options)
    assert (optimizer.norm_eps, optimizer.max_grad_norm) == (0.25, 0.25)
    assert type(optimizer.norm_eps) is type(optimizer.max_grad_norm) is float
    group = optimizer.param_groups[0]
    assert all(type(group[name]) is float for name in ("rho", "lambd", "eta"))
    run(optimizer, model, 1)
    group |= {"rho": number(0.5), "lambd": number(0.5), "eta": number(0.5), "lr": number(0.5)}
    run(optimizer, model, 1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rho": number(0.25), "lr": number(0.1)})
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert plain_numbers(loaded["param_groups"])
    assert loaded["param_groups"][0]["rho"] == 0.5


@pytest.mark.parametrize("number", NUMBERS)
def test_schedules_may_answer_in_numpy_numbers(number: Any) -> None:
    class Own(Radius):
        def radius(self, info: Any) -> Any:
            return number(0.25)

    reference = None
    for rho in (0.25, number(0.25), lambda t: number(0.25), Own(), Interval(number(0.25), every=1), Tail(lambda t: number(0.25), start=0)):
        model = make_model()
        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=rho, lambd=lambda t: number(0.5), lr=0.1)
        run(optimizer, model, 2)
        reference = weights(model) if reference is None else reference
        assert_same_bits(weights(model), reference)


def test_members_take_numpy_numbers() -> None:
    for name, options in {
        "VaSSO": {"theta": np.float32(0.5)},
        "FriendlySAM": {"sigma": np.float32(0.5), "lmbda": np.float64(0.5)},
        "RSAM": {"sigma": np.float32(0.5), "c": np.float32(0.5), "seed": np.int64(3)},
        "GSAM": {"alpha": np.float32(0.5)},
        "LookSAM": {"k": np.int64(2), "alpha": np.float32(0.5)},
        "SAMSPS": {"f_star": np.float32(0.0), "gamma_b": np.float32(0.5)},
    }.items():
        model = make_model()
        optimizer = make(name, model.parameters(), **options)
        run(optimizer, model, 2)
        assert plain_numbers(optimizer.state_dict()["param_groups"]), name
    schedule = LRProportional(rho_max=np.float32(0.5), rho_min=np.float64(0.1), lr_max=np.float32(1.0), lr_min=np.float32(0.0))
    model = make_model()
    run(SAM(model.parameters(), torch.optim.SGD, rho=schedule, lr=np.float32(0.5)), model, 1)


def test_rwsams_beta_may_be_a_numpy_number() -> None:
    model = nn.Linear(6, 2)
    optimizer = RWSAM(model, torch.optim.SGD, beta=np.float32(2.0), sampling="draw", draws=np.int64(2), seed=np.int64(3), lr=0.1)
    assert type(optimizer.param_groups[0]["beta"]) is float
    optimizer.param_groups[0]["beta"] = np.float64(1.0)
    optimizer.step(lambda: model(make_batch()[0]).square().mean(1))
    assert plain_numbers(optimizer.state_dict()["param_groups"])


@pytest.mark.parametrize("value", [np.bool_(True), np.array([0.1, 0.2]), np.complex64(1.0), "a", None])
def test_what_is_no_number_stays_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="rho"):
        SAM(make_model().parameters(), torch.optim.SGD, lr=0.1, rho=value)


# --- groups without parameters ---


@pytest.mark.parametrize("how", ["clear", "new list", "del"])
@pytest.mark.parametrize("name", ["SAM", "VaSSO", "RSAM", "GSAM", "GCSAM", "MomentumSAM", "S2SAM", "LookSAM", "SAMSPS"])
def test_with_all_groups_emptied_a_step_is_the_closure(name: str, how: str) -> None:
    model = make_model()
    optimizer = make(name, model.parameters())
    run(optimizer, model, 1)
    if how == "clear":
        optimizer.param_groups[0]["params"].clear()
    elif how == "new list":
        optimizer.param_groups[0]["params"] = []
    else:
        del optimizer.param_groups[0]
    before = weights(model)
    closure = partial(loss_of, model, make_batch())
    assert torch.equal(optimizer.step(closure), loss_of(model, make_batch()))
    if name not in ("LookSAM", "SAMSPS"):
        assert torch.equal(optimizer.backward(closure), loss_of(model, make_batch()))
        optimizer.step()
    if name not in ("LookSAM", "SAMSPS", "RSAM"):
        optimizer.first_step()
        optimizer.second_step()
    optimizer.zero_grad()
    assert_same_bits(weights(model), before)


@pytest.mark.parametrize("name", ["SAM", "VaSSO", "RSAM", "GSAM"])
def test_with_all_parameters_frozen_too(name: str) -> None:
    model = make_model().requires_grad_(False)
    optimizer = make(name, model.parameters())
    before = weights(model)
    for _ in range(2):
        optimizer.step(lambda: loss_of(model, make_batch()))
    assert_same_bits(weights(model), before)


# --- limits and warnings ---


@pytest.mark.parametrize("infinity", [math.inf, np.float32("inf"), np.float64("inf")])
def test_a_norm_without_a_limit_clips_nothing_and_looks(infinity: Any) -> None:
    model = make_model()
    other = twin(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, max_grad_norm=infinity, check_finite=False)
    expected = SAM(other.parameters(), torch.optim.SGD, lr=0.1)
    run(optimizer, model, 2)
    run(expected, other, 2)
    assert_same_bits(weights(model), weights(other))
    calls: list[int] = []

    def closure() -> None:
        closure_of(optimizer, model, make_batch())()
        calls.append(1)
        if len(calls) == 2:
            model[0].weight.grad[0, 0] = math.inf  # type: ignore[index, union-attr]

    optimizer.step(closure)
    assert_same_bits(weights(model), weights(other))
    assert optimizer.skipped_steps == 1


@pytest.mark.parametrize("value", [-1.0, math.nan, "1", True])
def test_a_wrong_limit_has_words(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="max_grad_norm"):
        SAM(make_model().parameters(), torch.optim.SGD, lr=0.1, max_grad_norm=value)


@pytest.mark.parametrize(("bad_pass", "words"), [(1, "first pass, at the weights"), (2, "second pass, at the perturbed weights")])
def test_twenty_five_skipped_steps_in_a_row_are_said_once_by_pass(bad_pass: int, words: str) -> None:
    model = make_model()
    optimizer, calls = make("SAM", model.parameters()), list[int]()

    def closure(bad: bool = True) -> None:
        closure_of(optimizer, model, make_batch())()
        calls.append(1)
        if bad and len(calls) % 2 == bad_pass % 2:
            model[0].weight.grad[0, 0] = math.nan  # type: ignore[index, union-attr]

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(24):
            optimizer.step(closure)
        optimizer.step(partial(closure, bad=False))
        for _ in range(24):
            optimizer.step(closure)
        assert not said
        for _ in range(40):
            optimizer.step(closure)
    (warning,) = said
    assert words in str(warning.message)
    assert warning.filename == __file__
    assert optimizer.skipped_steps == 88


# --- spectral normalisation ---


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["parametrization", "hook"])
@pytest.mark.parametrize("api", ["closure", "two steps"])
def test_vectors_of_spectral_norm_move_once_a_step(api: str, wrap: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(6, 9)), nn.Linear(9, 2))
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=model)
    for _ in range(2):
        once = nn.Sequential(wrap(nn.Linear(6, 9)), nn.Linear(9, 2))
        once.load_state_dict(model.state_dict())
        once(make_batch()[0])
        if api == "closure":
            optimizer.step(closure_of(optimizer, model, make_batch()))
        else:
            two_steps(optimizer, model, make_batch())
        assert_same_bits(list(model.buffers()), list(once.buffers()))


# --- scalers in the wrong order ---


def scaled(scaler: Any, model: nn.Module) -> None:
    scaler.scale(loss_of(model, make_batch())).backward()


def test_unscaling_in_the_first_pass_and_stepping_by_the_scaler_is_refused() -> None:
    model = make_model()
    optimizer, scaler = make("SAM", model.parameters()), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = weights(model)
    scaled(scaler, model)
    scaler.unscale_(optimizer)
    optimizer.first_step(zero_grad=True)
    scaled(scaler, model)
    with pytest.raises(RuntimeError, match=r"whether for the first or the second pass is not known"):
        scaler.step(optimizer)
    optimizer.step(closure_of(optimizer, model, make_batch()))  # from where it was
    other = make_model()
    assert_same_bits(before, weights(other))
    expected = make("SAM", other.parameters())
    expected.step(closure_of(expected, other, make_batch()))
    assert_same_bits(weights(model), weights(other))


def test_a_scaler_for_gradients_that_are_unscaled_is_refused() -> None:
    model = make_model()
    optimizer, scaler = make("SAM", model.parameters()), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = weights(model)
    scaled(scaler, model)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="so the gradients are not scaled; call first_step"):
        optimizer.first_step(grad_scaler=scaler)
    assert_same_bits(weights(model), before)
    assert optimizer.param_groups[0]["sam_step"] == 0


@pytest.mark.parametrize("second", ["scaler.step", "unscale_ and scaler.step", "unscale_ and second_step"])
def test_the_orders_that_are_right_still_are(second: str) -> None:
    model = make_model(torch.float64)
    other = twin(model)
    batch = make_batch(torch.float64)
    optimizer, expected = (SAM(net.parameters(), torch.optim.SGD, lambd=0.5, lr=0.1) for net in (model, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batch)).backward()
        if second == "unscale_ and second_step":
            scaler.unscale_(optimizer)
            optimizer.first_step(zero_grad=True)
        else:
            optimizer.first_step(zero_grad=True, grad_scaler=scaler)
        scaler.scale(loss_of(model, batch)).backward()
        if second == "unscale_ and second_step":
            scaler.unscale_(optimizer.base_optimizer)
            optimizer.second_step()
        else:
            if second.startswith("unscale_"):
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
        scaler.update()
        expected.step(closure_of(expected, other, batch))
    for got, right in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-12)


# --- types ---


SNIPPET = """
from collections.abc import Callable
import torch
from typing_extensions import assert_type
from sam_kernels import SAM, VaSSO

def run(optimizer: SAM, member: VaSSO, closure: Callable[[], float], tensors: Callable[[], torch.Tensor]) -> None:
    assert_type(optimizer.step(closure), float)
    assert_type(optimizer.step(tensors), torch.Tensor)
    assert_type(member.step([closure, closure]), float)
    assert_type(optimizer.step(closure, ascent_closure=closure), float)
    assert_type(optimizer.backward(tensors), torch.Tensor)
    optimizer.step()
    optimizer.step(1.0)  # E: a number is no closure
"""


@pytest.mark.slow
def test_step_is_typed_to_return_what_the_closure_returns(tmp_path: Path) -> None:
    api = pytest.importorskip("mypy.api")
    file = tmp_path / "snippet.py"
    file.write_text(SNIPPET)
    config = tmp_path / "mypy.ini"
    config.write_text("[mypy]\nfollow_imports = silent\n[mypy-torch.*,numpy.*,sympy.*,triton.*]\nfollow_imports = skip\n")  # in seconds
    said, errors, _ = api.run([str(file), "--no-error-summary", "--config-file", str(config), "--cache-dir", str(tmp_path / "cache")])
    found = [line for line in said.splitlines() if ": error:" in line]
    assert not errors, errors
    assert len(found) == 1, said
    assert f"snippet.py:{SNIPPET.splitlines().index(next(line for line in SNIPPET.splitlines() if '# E' in line)) + 1}:" in found[0]
