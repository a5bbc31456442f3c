"""``capturable=True``: what a CUDA graph would read lies in tensors, and the steps are those of ``capturable=False``.

Row 11 of the behaviours in docs/internals/contracts.md. The graphs themselves: ``tests/gpu/test_graphs.py``.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp

import sam_kernels
from sam_kernels.optim._engine import capturable, passes, skipped, update
from tests.optim.problem import BACKENDS, assert_same_bits, closure_of, loss_of, make_batch, make_model, twin, weights

BASES = [
    pytest.param(torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}, id="sgd-momentum"),
    pytest.param(torch.optim.Adam, {"weight_decay": 0.1}, id="adam"),
    pytest.param(torch.optim.AdamW, {"weight_decay": 0.1}, id="adamw"),
    pytest.param(torch.optim.RMSprop, {}, id="rmsprop-not-fused"),
]
SCHEDULES: dict[str, dict[str, Any]] = {
    "numbers": {"rho": 0.1, "lambd": 0.3},
    "tensors": {"rho": torch.tensor(0.1, dtype=torch.float64), "lambd": torch.tensor(0.3, dtype=torch.float64)},
    "strings": {"rho": "0.1/k^0.5", "lambd": "1-1/t"},
    "usam_to_sam": {"rho": 0.1, "lambd": "1/t"},
    "callables": {"rho": lambda t: 1 / (t + 9), "lambd": lambda t: t / (t + 2)},
}
every_base = pytest.mark.parametrize(("base", "kwargs"), BASES)


def number(value: Any) -> float:
    return float(value)


def make(model: nn.Module, base: Any = torch.optim.SGD, *, capturable: bool, lr: float = 0.05, **options: Any) -> Any:
    """Beside ``capturable``, lr is a tensor too."""
    rate = torch.tensor(lr, dtype=torch.float64) if capturable else lr
    return sam_kernels.SAM(model.parameters(), base, capturable=capturable, lr=rate, **options)


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for k in steps:
        optimizer.step(closure_of(optimizer, model, make_batch(next(model.parameters()).dtype, seed=k)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@every_base
def test_row_11_steps_are_those_of_an_optimizer_that_is_not_capturable(
    base: Any, kwargs: dict[str, Any], schedule: str, backend: str
) -> None:
    """With a scheduler of lr, and another radius after three steps."""
    model = make_model(torch.float64)
    other = twin(model)
    options = copy.deepcopy(SCHEDULES[schedule])
    with sam_kernels.use_backend(backend):
        capturable, plain = (
            make(model, base, capturable=True, **options, **kwargs),
            make(other, base, capturable=False, **options, **kwargs),
        )
        schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5) for optimizer in (capturable, plain)]
        for k in range(6):
            if k == 3 and schedule == "numbers":
                capturable.param_groups[0]["rho"].fill_(0.2)
                plain.param_groups[0]["rho"] = 0.2
            train(model, capturable, range(k, k + 1))
            train(other, plain, range(k, k + 1))
            for scheduler in schedulers:
                scheduler.step()
            for got, expected in zip(weights(model), weights(other), strict=True):
                # The same bits but for C / t^p, where powers and a number by a tensor are rounded differently.
                rtol, atol = (1e-13, 1e-14) if schedule == "strings" else (0.0, 0.0)
                torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
        assert number(capturable.param_groups[0]["lr"]) == plain.param_groups[0]["lr"] == 0.05 / 8
    assert number(capturable.param_groups[0]["sam_step"]) == plain.param_groups[0]["sam_step"] == 6


def test_row_11_the_tensors_stay_the_same_ones() -> None:
    """A graph reads from where they lay when it was recorded."""
    model = make_model()
    optimizer = make(model, capturable=True, rho=0.1, lambd="1/t", momentum=0.9)
    group = optimizer.param_groups[0]
    before = {key: value for key, value in group.items() if isinstance(value, Tensor)}
    assert set(before) == {"rho", "sam_step", "lr"}
    assert all(value.shape == () and value.dtype is torch.float64 for value in before.values())
    train(model, optimizer, range(3))
    loss_of(model, make_batch()).backward()
    optimizer.first_step(zero_grad=True)
    loss_of(model, make_batch()).backward()
    optimizer.second_step()
    assert all(group[key] is value for key, value in before.items())
    assert number(group["sam_step"]) == 4.0


def test_row_11_a_number_in_the_place_of_a_tensor_is_followed_by_the_next_step() -> None:
    model = make_model()
    other = twin(model)
    optimizer, expected = make(model, capturable=True), make(other, capturable=True, rho=0.3, lambd=0.5)
    optimizer.param_groups[0].update({"rho": 0.3, "lambd": 0.5})
    train(model, optimizer, range(2))
    train(other, expected, range(2))
    assert_same_bits(weights(model), weights(other))
    assert [number(optimizer.param_groups[0][key]) for key in ("rho", "lambd")] == [0.3, 0.5]
    assert isinstance(optimizer.param_groups[0]["rho"], Tensor)


def test_row_11_a_radius_of_zero() -> None:
    """As a number it leaves the group out, which the host decides; a tensor's value is nothing the host knows."""
    for rho, calls in ((0.0, 1), (torch.tensor(0.0), 2)):
        model, other, seen = make_model(), make_model(), []
        optimizer = make(model, capturable=True, rho=rho)
        plain = torch.optim.SGD(other.parameters(), lr=0.05)
        closure = closure_of(optimizer, model, make_batch())
        optimizer.step(lambda closure=closure, seen=seen: seen.append(1) or closure())
        plain.step(closure_of(plain, other, make_batch()))
        assert len(seen) == calls
        for got, expected in zip(weights(model), weights(other), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("saves", [True, False], ids=["from_capturable", "from_plain"])
@pytest.mark.parametrize("loads", [True, False], ids=["into_capturable", "into_plain"])
@pytest.mark.parametrize("options", [{"rho": 0.1, "lambd": 0.3}, {"rho": 0.1, "lambd": "1-1/t"}], ids=["numbers", "schedule"])
@every_base
def test_row_01_checkpoints_of_either_continue_in_either(
    base: Any, kwargs: dict[str, Any], options: dict[str, Any], loads: bool, saves: bool
) -> None:
    model = make_model()
    optimizer = make(model, base, capturable=saves, **options, **kwargs)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(3, 6))

    resumed_model = make_model()
    resumed = make(resumed_model, base, capturable=loads, lr=7.0, rho=9.0, lambd=0.9, **kwargs)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    group = resumed.param_groups[0]
    assert isinstance(group["rho"], Tensor) is isinstance(group["sam_step"], Tensor) is loads
    assert type(group["lambd"]) is (str if isinstance(options["lambd"], str) else Tensor if loads else float)
    assert number(group["sam_step"]) == 3
    train(resumed_model, resumed, range(3, 6))
    assert_same_bits(weights(resumed_model), weights(model))


def test_row_01_a_checkpoint_of_the_base_keeps_radius_and_mix() -> None:
    model = make_model()
    plain = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss_of(model, make_batch()).backward()
    plain.step()
    optimizer = make(model, torch.optim.AdamW, capturable=True, rho=0.07)
    optimizer.load_state_dict(plain.state_dict())
    group = optimizer.param_groups[0]
    assert (number(group["rho"]), number(group["lambd"]), number(group["sam_step"]), group["lr"]) == (0.07, 1.0, 0.0, 0.01)
    plain.load_state_dict(optimizer.state_dict())
    assert torch.equal(plain.state[next(model.parameters())]["exp_avg"], optimizer.state[next(model.parameters())]["exp_avg"])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_row_02_copies_continue_alike_and_share_nothing(how: str) -> None:
    model = make_model()
    optimizer = make(model, torch.optim.AdamW, capturable=True, rho=0.1, lambd="1/t")
    train(model, optimizer, range(2))
    copied_model, copied = copy.deepcopy((model, optimizer)) if how == "deepcopy" else pickle.loads(pickle.dumps((model, optimizer)))
    assert copied.capturable
    train(model, optimizer, range(2, 4))
    assert number(copied.param_groups[0]["sam_step"]) == 2.0
    train(copied_model, copied, range(2, 4))
    assert_same_bits(weights(copied_model), weights(model))
    optimizer.param_groups[0]["rho"].fill_(0.5)
    assert number(copied.param_groups[0]["rho"]) == 0.1


def test_row_02_every_group_has_tensors_of_its_own() -> None:
    model = make_model()
    optimizer = make(model[0], capturable=True, rho=0.1, momentum=0.9)
    train_first = closure_of(optimizer, model, make_batch())
    optimizer.step(train_first)
    optimizer.add_param_group({"params": list(model[2].parameters()), "rho": 0.2})
    optimizer.step(train_first)
    first, second = optimizer.param_groups
    assert (number(first["sam_step"]), number(second["sam_step"])) == (2.0, 2.0)
    assert (number(first["rho"]), number(second["rho"])) == (0.1, 0.2)
    first["lambd"].fill_(0.25)
    assert number(second["lambd"]) == 1.0
    with pytest.raises(ValueError, match="rho must be a finite number"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "rho": torch.tensor(-0.1)})
    assert len(optimizer.param_groups) == 2


def test_row_02_one_tensor_given_for_all_groups_is_shared() -> None:
    rho, params = torch.tensor(0.1), [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = sam_kernels.SAM([{"params": [param]} for param in params], torch.optim.SGD, lr=0.1, rho=rho, capturable=True)
    assert all(group["rho"] is rho for group in optimizer.param_groups)


def test_row_03_distributed_checkpoint() -> None:
    model = make_model()
    optimizer = make(model, capturable=True, rho=0.1, lambd="1/t", momentum=0.9)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(dcp.get_optimizer_state_dict(model, optimizer))
    resumed_model = make_model()
    resumed_model.load_state_dict(model.state_dict())
    resumed = make(resumed_model, capturable=True, rho=0.3, momentum=0.9)
    dcp.set_optimizer_state_dict(resumed_model, resumed, saved)
    assert number(resumed.param_groups[0]["sam_step"]) == 3.0
    train(model, optimizer, range(3, 6))
    train(resumed_model, resumed, range(3, 6))
    assert_same_bits(weights(resumed_model), weights(model))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"capturable": 1}, TypeError, "capturable must be True or False, got 1"),
        ({"rho": torch.tensor(1)}, TypeError, "rho must be a number or a dense floating-point tensor .*int64"),
        ({"rho": torch.ones(2)}, ValueError, r"rho must be a number or a tensor that holds one, got .*\(2,\)"),
        ({"rho": torch.tensor(-0.1)}, ValueError, r"rho must be a finite number in \[0.0, inf\)"),
        ({"lambd": torch.tensor(1.5)}, ValueError, r"lambd must be a finite number in \[0.0, 1.0\], got 1.5"),
        ({"lambd": lambda t: 0.5}, TypeError, "lambd is called with the step t as a tensor and must make a tensor of it, got 0.5"),
        ({"rho": lambda t: 0.1 if t < 5 else 0.2}, TypeError, "rho is called with the step t as a tensor"),
        ({"lambd": lambda t: t + 1}, ValueError, r"lambd\(t\) must be a finite number"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sam_kernels.SAM(make_model().parameters(), torch.optim.SGD, **{"lr": 0.1, "capturable": True, **arguments})


def test_tensors_are_put_on_the_device_of_the_parameters() -> None:
    device = torch.device("meta")
    lr, group = torch.tensor(0.1, device=device), {"params": [torch.empty(2, device=device)], "rho": 0.1, "lambd": torch.tensor(0.5)}
    group |= {"sam_step": 3, "lr": lr, "eta": 0.1}
    capturable.to_tensors(group, {name: name for name in ("rho", "lambd", "sam_step")})
    assert {key: value.device for key, value in group.items() if isinstance(value, Tensor)} == dict.fromkeys(
        ("rho", "lambd", "sam_step", "lr"), device
    )
    assert group["lr"] is lr
    assert group["eta"] == 0.1


def test_a_capturable_base_is_fused() -> None:
    """Torch's own step refuses capturable=True on the CPU: it was not asked."""
    model = make_model()
    other = twin(model)
    lr = torch.tensor(0.01, dtype=torch.float64)
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.AdamW(model.parameters(), lr=lr, capturable=True), capturable=True)
    plain = sam_kernels.SAM(other.parameters(), torch.optim.AdamW, lr=0.01)
    train(model, optimizer, range(3))
    train(other, plain, range(3))
    assert_same_bits(weights(model), weights(other))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_learning_rate_in_a_tensor_without_capturable(base: Any) -> None:
    model = make_model()
    other = twin(model)
    given = sam_kernels.SAM(model.parameters(), base, lr=torch.tensor(0.05, dtype=torch.float64))
    plain = sam_kernels.SAM(other.parameters(), base, lr=0.05)
    train(model, given, range(3))
    train(other, plain, range(3))
    assert_same_bits(weights(model), weights(other))


@pytest.fixture
def start_recording(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, as if a CUDA graph were recorded."""

    def start() -> None:
        for module in (capturable, update, passes, skipped):
            monkeypatch.setattr(module, "is_recording", lambda device: True)

    return start


@every_base
def test_what_is_warm_can_be_recorded(base: Any, kwargs: dict[str, Any], start_recording: Callable[[], None]) -> None:
    model = make_model()
    optimizer = make(model, base, capturable=True, lambd="1/t", **kwargs)
    train(model, optimizer, range(1))
    start_recording()
    if base is torch.optim.RMSprop:
        with pytest.raises(RuntimeError, match="recorded into a CUDA graph, but the step of RMSprop is made by its own"):
            train(model, optimizer, range(1))
    else:
        train(model, optimizer, range(2))


@pytest.mark.parametrize(
    ("capturable", "base", "options", "warm", "message"),
    [
        (False, torch.optim.SGD, {}, True, "made without capturable=True"),
        (True, torch.optim.SGD, {"momentum": 0.9}, False, "the base optimizer's state is not there yet"),
        (True, torch.optim.AdamW, {}, False, "the base optimizer's state is not there yet"),
        (True, torch.optim.SGD, {"preserve_rng_state": True}, True, "preserve_rng_state=True reads"),
    ],
)
def test_what_a_graph_would_freeze_is_refused(
    capturable: bool, base: Any, options: dict[str, Any], warm: bool, message: str, start_recording: Callable[[], None]
) -> None:
    model = make_model()
    optimizer = make(model, base, capturable=capturable, **options)
    if warm:
        train(model, optimizer, range(1))
    start_recording()
    before = weights(model)
    with pytest.raises(RuntimeError, match=f"recorded into a CUDA graph, but .*{message}"):
        train(model, optimizer, range(1))
    assert_same_bits(weights(model), before)


def test_a_capture_before_any_step_is_refused(start_recording: Callable[[], None]) -> None:
    model = make_model()
    optimizer = make(model, capturable=True)
    optimizer._passes.skips.found_inf = torch.zeros((), device="meta")  # on another device than the parameters: not moved yet
    start_recording()
    with pytest.raises(RuntimeError, match="no step was made before"):
        train(model, optimizer, range(1))


def test_a_number_put_in_place_is_refused_while_recording(start_recording: Callable[[], None]) -> None:
    model = make_model()
    optimizer = make(model, capturable=True)
    train(model, optimizer, range(1))
    optimizer.param_groups[0]["rho"] = 0.3
    start_recording()
    with pytest.raises(RuntimeError, match="param_groups hold a new rho"):
        train(model, optimizer, range(1))
