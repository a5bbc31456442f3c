"""A base optimizer may call its options as SAM calls its own: each keeps its own value, under every way to give, change and store it."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import sam_kernels
from tests.optim.problem import assert_same_bits, closure_of, make_batch, make_model, through_a_file, twin, weights, written_out_step

pytorch_optimizer = pytest.importorskip("pytorch_optimizer")

# SAM's own value, another one, and the base's: for every option of a group.
VALUES: dict[str, tuple[Any, Any, Any]] = {
    "rho": (0.07, 0.02, 0.9),
    "lambd": (0.6, 0.3, 1e-4),
    "eta": (0.01, 0.02, 7.0),
    "adaptive": (True, False, "yes"),
    "scale": (0.5, 2.0, "large"),
}


class Named(Optimizer):
    """Gradient descent whose groups have any options of their own; each must be what it was given, at every step."""

    def __init__(self, params: Any, lr: float = 0.1, **own: Any) -> None:
        super().__init__(params, {"lr": lr, **own})
        self.seen: list[dict[str, Any]] = []

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            self.seen.append({key: value for key, value in group.items() if key in self.defaults})
            for param in group["params"]:
                if param.grad is not None:
                    param.add_(param.grad, alpha=-group["lr"])


def step_of(optimizer: Any, model: nn.Module, seed: int = 5) -> None:
    optimizer.step(closure_of(optimizer, model, make_batch(seed=seed)))


@pytest.mark.parametrize("name", VALUES)
def test_the_bases_value_is_the_bases_and_sams_is_sams(name: str) -> None:
    ours, _, theirs = VALUES[name]
    model = make_model(torch.float64)
    other, batch = twin(model), make_batch(torch.float64)
    optimizer = sam_kernels.SAM(model.parameters(), functools.partial(Named, **{name: theirs}), **{"rho": 0.05, "lr": 0.1, name: ours})
    group = optimizer.param_groups[0]
    assert (group[f"sam_{name}"], group[name]) == (ours, theirs)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, model, batch))
        written_out_step(other, torch.optim.SGD(other.parameters(), lr=0.1), batch, **{"rho": 0.05, name: ours})
    for got, expected in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    assert optimizer.base_optimizer.seen == [{"lr": 0.1, name: theirs}] * 3


@pytest.mark.parametrize(
    "value", [0.06, lambda t: 0.06, torch.tensor(0.06, dtype=torch.float64), "0.06"], ids=["number", "call", "tensor", "str"]
)
def test_adadelta_keeps_its_decay_beside_any_kind_of_radius(value: Any) -> None:
    model, batch = make_model(torch.float64), make_batch(torch.float64)
    other = twin(model)
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.Adadelta, rho=value, lr=1.0)
    base = torch.optim.Adadelta(other.parameters(), lr=1.0)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, model, batch))
        written_out_step(other, base, batch, rho=0.06)
    for got, expected in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_asgd_keeps_its_decay_beside_the_mix() -> None:
    model, batch = make_model(torch.float64), make_batch(torch.float64)
    other = twin(model)
    optimizer = sam_kernels.UnifiedSAM(model.parameters(), functools.partial(torch.optim.ASGD, lambd=0.02), lambd=0.25, rho=0.05, lr=0.1)
    base = torch.optim.ASGD(other.parameters(), lr=0.1, lambd=0.02)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, model, batch))
        written_out_step(other, base, batch, rho=0.05, lambd=0.25)
    for got, expected in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_the_step_count_of_a_base_is_not_sams() -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), Named, lr=0.1, sam_step=40)
    step_of(optimizer, model)
    assert (optimizer.param_groups[0]["sam_step"], optimizer.param_groups[0]["sam_sam_step"]) == (40, 1)


def test_rwsams_temperature_beside_a_bases_beta() -> None:
    model = make_model()
    inputs, targets = make_batch()
    optimizer = sam_kernels.RWSAM(model, functools.partial(Named, beta=0.9), beta=2.0, rho=0.05, lr=0.1)
    optimizer.step(lambda: (model(inputs) - targets).square().mean(1))
    assert optimizer.base_optimizer.seen == [{"lr": 0.1, "beta": 0.9}]
    norms, found = optimizer.last_norms, optimizer.last_weights
    torch.testing.assert_close(found, (2.0 * norms).softmax(0), rtol=1e-5, atol=1e-7)


# --- keywords that two could mean ---


class HandsOn(torch.optim.ASGD):
    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)


AMBIGUOUS = [
    ("SAM", torch.optim.ASGD, {"lambd": 0.5}),
    ("SAM", HandsOn, {"lambd": 0.5}),
    ("SAM", functools.partial(HandsOn, alpha=0.7), {"lambd": 0.5}),
    ("SAM", lambda params, **kwargs: torch.optim.ASGD(params, **kwargs), {"lambd": 0.5}),
    ("UnifiedSAM", torch.optim.ASGD, {"lambd": 0.5}),
    ("SAM", pytorch_optimizer.Lamb, {"max_grad_norm": 1.0}),
    ("SAM", pytorch_optimizer.Adan, {"max_grad_norm": 1.0}),
    ("GSAM", torch.optim.RMSprop, {"alpha": 0.4, "rho": 0.05}),
    ("LookSAM", torch.optim.ASGD, {"alpha": 0.4}),
    ("LookSAM", pytorch_optimizer.Ranger, {"k": 4}),
    ("WSAM", pytorch_optimizer.AccSGD, {"kappa": 0.9}),
    ("VaSSO", pytorch_optimizer.StableSPAM, {"theta": 0.9}),
    ("VaSSO", pytorch_optimizer.ASGD, {"theta": 0.9}),
    ("RWSAM", pytorch_optimizer.SGDP, {"beta": 1.0, "delta": 0.1}),
]


@pytest.mark.parametrize(("member", "base", "given"), AMBIGUOUS, ids=[f"{m}-{next(iter(g))}-{i}" for i, (m, _, g) in enumerate(AMBIGUOUS)])
def test_a_keyword_of_both_is_refused_with_both_ways_to_write_it(member: str, base: Any, given: dict[str, Any]) -> None:
    model = make_model()
    params = model if member == "RWSAM" else model.parameters()
    name = next(iter(given)) if member != "RWSAM" else "delta"
    with pytest.raises(TypeError, match=rf"{member}: {name} is an option of {member} and of .*functools\.partial\(.*, {name}=\.\.\.\)"):
        getattr(sam_kernels, member)(params, base, **given)


def test_a_bound_keyword_settles_it() -> None:
    base = functools.partial(torch.optim.RMSprop, alpha=0.9)
    optimizer = sam_kernels.LookSAM(make_model().parameters(), base, alpha=0.3, k=3, lr=0.01)
    assert (optimizer.descent.alpha, optimizer.base_optimizer.param_groups[0]["alpha"]) == (0.3, 0.9)


def test_an_instance_settles_it() -> None:
    model = make_model()
    base = torch.optim.ASGD(model.parameters(), lambd=0.02)
    optimizer = sam_kernels.SAM(model.parameters(), base, lambd=0.5)
    assert (optimizer.param_groups[0]["lambd"], optimizer.param_groups[0]["sam_lambd"]) == (0.02, 0.5)


def test_a_bases_own_default_needs_no_word() -> None:
    optimizer = sam_kernels.SAM(make_model().parameters(), torch.optim.ASGD)
    assert (optimizer.param_groups[0]["lambd"], optimizer.param_groups[0]["sam_lambd"]) == (1e-4, 1.0)


@pytest.mark.parametrize(
    "base", [torch.optim.AdamW, functools.partial(torch.optim.AdamW), pytorch_optimizer.AdaBelief], ids=["torch", "partial", "other"]
)
def test_eps_is_the_bases(base: Any) -> None:
    optimizer = sam_kernels.SAM(make_model().parameters(), base, eps=1e-4, norm_eps=1e-3)
    assert (optimizer.base_optimizer.param_groups[0]["eps"], optimizer.norm_eps) == (1e-4, 1e-3)


@pytest.mark.parametrize("base", [torch.optim.SGD, HandsOn, pytorch_optimizer.Lion], ids=["SGD", "hands-on", "Lion"])
def test_eps_for_a_base_that_has_none_is_refused(base: Any) -> None:
    with pytest.raises(TypeError, match=r"SAM: eps is an option of the base optimizer, and \w+ names none; SAM's own is norm_eps"):
        sam_kernels.SAM(make_model().parameters(), base, eps=1e-4)


BASES_ELSEWHERE = [
    (pytorch_optimizer.AdaDelta, "rho", 0.9),
    (pytorch_optimizer.Tiger, "beta", 0.965),
    (pytorch_optimizer.A2Grad, "rho", None),
    (pytorch_optimizer.FTRL, "beta", 0.0),
]


@pytest.mark.parametrize(("base", "name", "theirs"), BASES_ELSEWHERE, ids=[base.__name__ for base, *_ in BASES_ELSEWHERE])
def test_bases_of_other_packages_step_as_by_themselves(base: Any, name: str, theirs: Any) -> None:
    model, batch = make_model(torch.float64), make_batch(torch.float64)
    other = twin(model)
    optimizer = sam_kernels.SAM(model.parameters(), base, rho=0.05, lr=0.01)
    plain = base(other.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, model, batch))
        written_out_step(other, plain, batch, rho=0.05)
    if theirs is not None:
        assert optimizer.base_optimizer.param_groups[0][name] == theirs
    for got, expected in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


# --- groups ---


def adadelta(model: nn.Module, **options: Any) -> Any:
    return sam_kernels.SAM(model.parameters(), torch.optim.Adadelta, **{"rho": 0.07, "lr": 1.0, **options})


def test_a_group_key_of_both_is_refused_and_adds_nothing() -> None:
    model = make_model()
    optimizer = adadelta(model[0])
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['rho'\] is an option of SAM and of Adadelta; write 'sam_rho' for SAM's"):
        optimizer.add_param_group({"params": list(model[2].parameters()), "rho": 0.2})
    assert len(optimizer.param_groups) == len(optimizer.base_optimizer.param_groups) == 1


@pytest.mark.parametrize("on", ["constructor", "wrapper", "base"])
def test_a_group_of_its_own_keeps_both_values(on: str) -> None:
    model = make_model()
    first, second = list(model[0].parameters()), list(model[2].parameters())
    if on == "constructor":
        optimizer = sam_kernels.SAM([{"params": first}, {"params": second, "sam_rho": 0.2}], torch.optim.Adadelta, rho=0.07)
    else:
        optimizer = sam_kernels.SAM(first, torch.optim.Adadelta, rho=0.07)
        owner = optimizer if on == "wrapper" else optimizer.base_optimizer
        owner.add_param_group({"params": second, "sam_rho": 0.2, **({"rho": 0.5} if on == "base" else {})})
    assert [group["sam_rho"] for group in optimizer.param_groups] == [0.07, 0.2]
    assert [group["rho"] for group in optimizer.param_groups] == [0.9, 0.5 if on == "base" else 0.9]


def test_the_long_name_means_sams_where_nothing_clashes() -> None:
    model = make_model()
    optimizer = sam_kernels.SAM([{"params": model.parameters(), "sam_rho": 0.2}], torch.optim.SGD, lr=0.1, rho=0.05)
    assert optimizer.param_groups[0]["rho"] == 0.2
    assert "sam_rho" not in optimizer.param_groups[0]


def test_both_names_where_nothing_clashes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"param_groups\[0\] has 'rho' and 'sam_rho'; give one of them"):
        sam_kernels.SAM([{"params": make_model().parameters(), "sam_rho": 0.2, "rho": 0.1}], torch.optim.SGD, lr=0.1)


def test_what_user_code_writes_to_a_group_goes_to_its_owner() -> None:
    model = make_model(torch.float64)
    other, batch = twin(model), make_batch(torch.float64)
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.Adadelta, rho=0.07, lr=1.0)
    optimizer.param_groups[0]["rho"] = 0.5
    optimizer.param_groups[0]["sam_rho"] = 0.02
    optimizer.step(closure_of(optimizer, model, batch))
    written_out_step(other, torch.optim.Adadelta(other.parameters(), rho=0.5, lr=1.0), batch, rho=0.02)
    for got, expected in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("on", ["wrapper", "base"])
def test_a_scheduler_changes_lr_and_neither_rho(on: str) -> None:
    model = make_model()
    optimizer = adadelta(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer if on == "wrapper" else optimizer.base_optimizer, 1, 0.5)
    step_of(optimizer, model)
    scheduler.step()
    group = optimizer.param_groups[0]
    assert (group["lr"], group["rho"], group["sam_rho"]) == (0.5, 0.9, 0.07)


# --- checkpoints ---


@pytest.mark.parametrize("target", ["wrapper", "wrapper, by its base", "plain base", "copy", "pickle"])
def test_both_values_survive_a_checkpoint(target: str) -> None:
    model = make_model()
    optimizer = adadelta(model)
    optimizer.param_groups[0].update({"rho": 0.8, "sam_rho": 0.03})
    step_of(optimizer, model)
    other_model = twin(model)
    saved = through_a_file(optimizer.state_dict())
    if target == "plain base":
        other: Any = torch.optim.Adadelta(other_model.parameters())
        other.load_state_dict(saved)
    elif target in ("copy", "pickle"):
        other_model, other = copy.deepcopy((model, optimizer)) if target == "copy" else pickle.loads(pickle.dumps((model, optimizer)))
    else:
        other = adadelta(other_model, rho=0.5)
        (other if target == "wrapper" else other.base_optimizer).load_state_dict(saved)
    assert (other.param_groups[0]["rho"], other.param_groups[0]["sam_rho"]) == (0.8, 0.03)
    if target != "plain base":
        step_of(optimizer, model)
        step_of(other, other_model)
        assert_same_bits(weights(other_model), weights(model))


def test_a_plain_checkpoint_leaves_sams_value() -> None:
    model = make_model()
    plain = torch.optim.Adadelta(model.parameters(), rho=0.6)
    optimizer = adadelta(model)
    optimizer.load_state_dict(plain.state_dict())
    assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["sam_rho"]) == (0.6, 0.07)


def test_a_checkpoint_of_the_version_before_gives_each_its_value() -> None:
    """It wrote one ``rho`` for both, the base's, and SAM's other options under their own names."""
    model = make_model()
    optimizer = adadelta(model)
    step_of(optimizer, model)
    saved = copy.deepcopy(optimizer.state_dict())
    group = saved["param_groups"][0]
    del group["sam_rho"]
    group.update({"rho": 0.9, "lambd": 0.4, "adaptive": False, "eta": 0.0, "sam_step": 6})
    optimizer.load_state_dict(saved)
    got = optimizer.param_groups[0]
    assert (got["rho"], got["sam_rho"], got["lambd"], got["sam_step"]) == (0.9, 0.07, 0.4, 6)


def test_a_checkpoint_of_the_version_before_is_sams_where_nothing_clashes() -> None:
    model = make_model()
    optimizer = sam_kernels.VaSSO(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    step_of(optimizer, model)
    params = [param.detach() for param in model.parameters()]
    state = {i: {"momentum_buffer": param + 1, "direction_average": param + 2} for i, param in enumerate(params)}
    options = {key: value for key, value in optimizer.state_dict()["param_groups"][0].items() if key not in ("params", "direction")}
    group = {**options, "rho": 0.3, "lambd": None, "sam_step": 9, "direction": "vasso", "params": list(range(len(params)))}
    with pytest.warns(UserWarning, match=r"param_groups\[0\]\['lambd'\] was a function when .* saved, which has none, and is 1.0 here"):
        optimizer.load_state_dict({"state": state, "param_groups": [group]})
    got = optimizer.param_groups[0]
    assert (got["rho"], got["lambd"], got["sam_step"]) == (0.3, 1.0, 9)
    assert_same_bits([entry["direction_average"] for entry in optimizer.state_dict()["state"].values()], [param + 2 for param in params])


def test_a_function_for_both_stays_with_the_program() -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), functools.partial(Named, rho=lambda t: 0.9), rho=lambda t: 0.1 / t, lr=0.1)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["sam_rho"](2) == 0.05


def test_names_of_direction_and_rule_beside_a_bases_options() -> None:
    model = make_model()
    base = functools.partial(Named, direction="downhill", descent=3)
    optimizer = sam_kernels.VaSSO(model.parameters(), base, lr=0.1)
    step_of(optimizer, model)
    saved = through_a_file(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    step_of(optimizer, model)
    assert optimizer.base_optimizer.seen == [{"lr": 0.1, "direction": "downhill", "descent": 3}] * 2
    other = sam_kernels.FriendlySAM(model.parameters(), base, lr=0.1)
    with pytest.raises(ValueError, match="checkpoint is of direction 'vasso', this optimizer has direction 'friendly'"):
        other.load_state_dict(saved)


# --- one base, two wrappers ---


def test_a_base_wrapped_again_with_another_radius_is_refused() -> None:
    model = make_model()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    sam_kernels.SAM(model.parameters(), base, rho=0.1)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['lambd'\] is 1\.0, of an earlier SAM .* made with 0\.0"):
        sam_kernels.USAM(model.parameters(), base, rho=0.1)
    again = sam_kernels.SAM(model.parameters(), base, rho=0.1)
    assert again.param_groups[0]["rho"] == 0.1


def test_groups_of_an_instance_keep_the_radius_that_they_were_given() -> None:
    model = make_model()
    base = torch.optim.SGD([{"params": model[0].parameters(), "rho": 0.3}, {"params": model[2].parameters()}], lr=0.1)
    optimizer = sam_kernels.SAM(model.parameters(), base, rho=0.1)
    assert [group["rho"] for group in optimizer.param_groups] == [0.3, 0.1]
