"""Wrong arguments: an error that says what was expected and what came, and weights untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import sam_kernels
from tests.helpers.backends import replace_backend
from tests.optim.problem import assert_same_bits, closure_of, make_batch, make_model, weights

NAN = float("nan")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rho": -0.1}, ValueError, r"rho must be a finite number in \[0\.0, inf\), got -0\.1"),
        ({"rho": NAN}, ValueError, "rho must be a finite number"),
        ({"rho": "0.1/t"}, ValueError, r"rho must be a number, 'C/k\^p'"),
        ({"rho": None}, TypeError, "rho must be a number"),
        ({"rho": lambda t: -1.0}, ValueError, r"rho\(1\) must be a finite number"),
        ({"lambd": 1.5}, ValueError, r"lambd must be a finite number in \[0\.0, 1\.0\], got 1\.5"),
        ({"lambd": -0.1}, ValueError, "lambd must be a finite number"),
        ({"lambd": "t/1"}, ValueError, "lambd must be a number, '1/t', '1-1/t'"),
        ({"lambd": lambda t: 2.0}, ValueError, r"lambd\(1\) must be a finite number"),
        ({"adaptive": 1}, TypeError, "adaptive must be True or False"),
        ({"eta": -1.0}, ValueError, "eta must be a finite number"),
        ({"norm_eps": NAN}, ValueError, "norm_eps must be a finite number"),
        ({"eps": 1e-8}, TypeError, "eps is an option of the base optimizer, and SGD names none; SAM's own is norm_eps"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm must be a finite number"),
        ({"preserve_rng_state": 1}, TypeError, "preserve_rng_state must be True or False"),
        ({"model": [1]}, TypeError, r"model\[0\] must be a torch\.nn\.Module"),
        ({"lr": -1.0}, ValueError, "learning rate"),
        ({"no_such_option": 1}, TypeError, "no_such_option"),
    ],
)
def test_constructor(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sam_kernels.SAM(make_model().parameters(), torch.optim.SGD, **{"lr": 0.1, **arguments})


def test_parameters() -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        sam_kernels.SAM([], torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['params'\]\[1\] has dtype torch\.complex64"):
        sam_kernels.SAM([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.complex64))], torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match=r"'embedding' is a torch\.sparse_coo tensor"):
        sam_kernels.SAM([("embedding", nn.Parameter(torch.eye(3).to_sparse()))], torch.optim.SGD, lr=0.1)


def test_base_optimizer() -> None:
    model = make_model()
    with pytest.raises(TypeError, match="base_optimizer must be an optimizer class or instance, got 3"):
        sam_kernels.SAM(model.parameters(), 3)
    with pytest.raises(TypeError, match="made a Linear"):
        sam_kernels.SAM(model.parameters(), lambda params: nn.Linear(1, 1))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"\['lr'\] given beside an instance of SGD"):
        sam_kernels.SAM(model.parameters(), base, lr=0.1)
    with pytest.raises(ValueError, match="are not the parameters of the given SGD"):
        sam_kernels.SAM(model[0].parameters(), base)
    with pytest.raises(TypeError, match="USAM: lambd is 0 by definition"):
        sam_kernels.USAM(model.parameters(), torch.optim.SGD, lr=0.1, lambd=0.5)


@pytest.mark.parametrize("key", ["rho", "lambd", "eta", "adaptive"])
def test_a_bad_value_in_a_group_is_found_at_the_step(key: str) -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    optimizer.param_groups[0][key] = NAN
    before = weights(model)
    with pytest.raises((ValueError, TypeError), match=f"SAM: {key} must be"):
        optimizer.step(closure_of(optimizer, model, make_batch()))
    assert_same_bits(weights(model), before)


def test_order_of_the_two_steps() -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(RuntimeError, match="call first_step first"):
        optimizer.second_step()
    closure_of(optimizer, model, make_batch())()
    optimizer.first_step()
    for action in (optimizer.release_buffers, optimizer.__getstate__, lambda: optimizer.load_state_dict(optimizer.state_dict())):
        with pytest.raises(RuntimeError, match="between first_step and second_step"):
            action()
    optimizer.second_step()
    with pytest.raises(RuntimeError, match="call first_step first"):
        optimizer.second_step()


@pytest.mark.parametrize("closure", [3, [], [3], "closure"])
def test_closures(closure: Any) -> None:
    model = make_model()
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match="closure must be a callable or a non-empty list of callables"):
        optimizer.step(closure)


def test_a_forced_backend_that_is_missing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_backend(monkeypatch, "triton", "triton cannot be imported")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot be used: triton cannot be imported"):
        sam_kernels.use_backend("triton")
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        sam_kernels.use_backend("cuda")
