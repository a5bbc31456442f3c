"""Exceptions in every part of a step, and options that are refused: masters and weights stay together."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sam_kernels
from sam_kernels import SAM
from sam_kernels.operations import AdamWStep, CheckFinite, Combine, Operands, Perturb, Restore, SgdStep
from sam_kernels.validation.backends import backend_of
from tests.helpers.compare import assert_same_bits
from tests.helpers.pairwise import covering_pairs
from tests.optim import family
from tests.optim.family_runs import base_of, make
from tests.optim.master_problem import assert_whole, closure_of, look, masters_of, params_of, run
from tests.optim.problem import BACKENDS

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

F32, F16, B16 = torch.float32, torch.float16, torch.bfloat16
SGD, ADAMW, RMSPROP = "sgd-momentum", "adamw", "rmsprop"
MIXED = (B16, F16, F32)
KINDS = {SGD: torch.optim.SGD, ADAMW: torch.optim.AdamW, RMSPROP: torch.optim.RMSprop}


def everything_of(optimizer: Any) -> list[Tensor | None]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    state = [value for param in params for value in optimizer.state[param].values() if isinstance(value, Tensor)]
    return [None if each is None else each.detach().clone() for each in (*params, *masters_of(optimizer), *state)]


# --- exceptions ---

FAILURES = [
    {"name": name, "base": base_of(name, base), "call": call, "way": way}
    for name, base, call, way in itertools.product(family.MEMBERS, KINDS, (1, 2), ("raises", "is not finite"))
    if base_of(name, base) in family.MEMBERS[name].bases and call <= (1 if name in family.ONE_PASS else 2)
]


@pytest.mark.parametrize("row", [FAILURES[i] for i in covering_pairs(FAILURES)], ids=lambda row: "-".join(map(str, row.values())))
def test_a_pass_that_fails_changes_nothing(row: dict[str, Any]) -> None:
    params = params_of(MIXED)
    optimizer = make(row["name"], params, row["base"], master_weights=True, **({"k": 1} if row["name"] == "LookSAM" else {}))

    def closure_at(i: int, *, fails: bool = False) -> Callable[..., float]:
        def spoil(call: int) -> None:
            if fails and call == row["call"]:
                if row["way"] == "raises":
                    raise KeyboardInterrupt
                params[1].grad[3, 4] = torch.nan  # type: ignore[index]

        return closure_of(params, 10 * i, loss=1000.0, spoil=spoil)

    optimizer.step(closure_at(0))
    optimizer.step(closure_at(1))
    before = everything_of(optimizer)
    try:
        optimizer.step(closure_at(2, fails=True))
        assert row["way"] == "is not finite"
    except KeyboardInterrupt:
        assert row["way"] == "raises"
    assert_same_bits("everything", everything_of(optimizer), before)
    optimizer.step(closure_at(3))
    assert_whole(optimizer, params)


UPDATES = (SgdStep, AdamWStep)
LAUNCHES = {SGD: (Perturb, CheckFinite, SgdStep), ADAMW: (Perturb, CheckFinite, AdamWStep), RMSPROP: (Perturb, CheckFinite, Restore)}
INTERRUPTED = [(base, kind) for base, kinds in LAUNCHES.items() for kind in kinds]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("base", "kind"), INTERRUPTED)
def test_an_interrupt_around_a_launch(monkeypatch: pytest.MonkeyPatch, backend: str, base: str, kind: Any) -> None:
    """Before an update everything is as before the step. Within one, masters and weights of lists are old or new together."""
    operations = backend_of(backend).operations
    real, left, is_done = operations[kind], 0, False

    def launch(op: Any, lists: Operands) -> Any:
        nonlocal left
        left -= 1
        if left == 0 and not is_done:
            raise KeyboardInterrupt
        result = real(op, lists)
        if left == 0:
            raise KeyboardInterrupt
        return result

    monkeypatch.setitem(operations, kind, launch)
    with sam_kernels.use_backend(backend):
        for at, done in itertools.product(range(1, 5), (False, True)):
            is_done = done
            params = params_of((B16, F16, B16))
            optimizer = make("SAM", [{"params": params[:1]}, {"params": params[1:]}], base, master_weights=True)
            left = 0
            run(optimizer, params, range(2))
            before, left = everything_of(optimizer), at
            try:
                optimizer.step(closure_of(params, 20))
                assert left > 0  # the step has fewer launches
                continue
            except KeyboardInterrupt:
                pass
            is_of_update = kind in UPDATES or (kind is Restore and at > 2)
            if not is_of_update:
                assert_same_bits("everything", everything_of(optimizer), before)
            if kind is not Restore:
                assert_whole(optimizer, params)
            masters = [each.clone() for each in masters_of(optimizer) if each is not None]
            look(optimizer, params)
            assert_same_bits("masters", masters_of(optimizer), masters)
            assert_whole(optimizer, params)


def test_an_interrupt_before_the_weights_of_decoupled_wsam_are_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    params = params_of(B16)
    optimizer = make("WSAM-decoupled", params, SGD, master_weights=True)
    run(optimizer, params, range(2))
    operations = backend_of("foreach").operations
    real = operations[Combine]

    def launch(op: Any, lists: Operands) -> Any:
        real(op, lists)
        raise KeyboardInterrupt

    with sam_kernels.use_backend("foreach"), monkeypatch.context() as patch:
        patch.setitem(operations, Combine, launch)
        with pytest.raises(KeyboardInterrupt):
            optimizer.step(closure_of(params, 20))
    assert_whole(optimizer, params)


class Raising(torch.optim.RMSprop):
    """Raises when it has written the first parameter of its groups."""

    fails = False

    def step(self, closure: Any = None) -> None:
        if self.fails:
            with torch.no_grad():
                self.param_groups[0]["params"][0].add_(1.0)
            raise KeyboardInterrupt
        super().step()


class Hoarding(torch.optim.SGD):
    """Steps on parameters that it has put aside."""

    def __init__(self, params: Any, **kwargs: Any) -> None:
        super().__init__(params, **kwargs)
        self.own = list(self.param_groups[0]["params"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for param in self.own:
            param.sub_(param.grad, alpha=self.param_groups[0]["lr"])


def test_exceptions_within_the_step_of_the_base() -> None:
    params = params_of(MIXED)
    optimizer = SAM(params, Raising, lr=0.01, master_weights=True)
    run(optimizer, params, range(2))
    first = masters_of(optimizer)[0]
    assert first is not None
    before = first.clone()
    optimizer.base_optimizer.fails = True  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure_of(params, 20))
    assert_same_bits("the first master", [first], [before + 1.0])  # as a base without masters leaves its parameters
    assert_whole(optimizer, params)
    assert all(master is None or (master.grad is None and not master.requires_grad) for master in masters_of(optimizer))


def test_a_base_that_keeps_parameters_of_its_own_is_refused() -> None:
    params = params_of(B16)
    before = [param.detach().clone() for param in params]
    optimizer = SAM(params, Hoarding, lr=0.1, master_weights=True)
    with pytest.raises(RuntimeError, match=r"Hoarding.step\(\) has written the 16-bit parameters and not the masters"):
        run(optimizer, params, range(1))
    assert_same_bits("params", params, before)


@pytest.mark.parametrize("base", KINDS)
@pytest.mark.parametrize("is_second_half", [False, True])
def test_a_step_of_the_base_past_the_masters_is_refused(base: str, is_second_half: bool) -> None:
    params = params_of(B16)
    optimizer = make("SAM", params, base, master_weights=True)
    run(optimizer, params, range(1))
    closure_of(params, 10)()
    if is_second_half:
        optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"past their masters, and with float32 state; call SAM's step\(\)"):
        optimizer.base_optimizer.step()
    optimizer.step()
    assert_whole(optimizer, params)


# --- bad input ---


@pytest.mark.parametrize(
    ("dtype", "options", "error", "words"),
    [
        (B16, {"master_weights": 1}, TypeError, "master_weights must be True or False, got 1"),
        (B16, {"master_weights": None}, TypeError, "master_weights must be True or False"),
        (B16, {"master_weights": True, "capturable": True}, ValueError, "master_weights=True with capturable=True"),
        (B16, {"stochastic_rounding": "yes"}, TypeError, "stochastic_rounding must be True, False or 'update', got 'yes'"),
        (B16, {"stochastic_rounding": 1}, TypeError, "stochastic_rounding must be True, False or 'update', got 1"),
        (B16, {"stochastic_rounding": "update", "master_weights": True}, ValueError, "'update' with master_weights=True"),
        (B16, {"stochastic_rounding": True, "capturable": True}, ValueError, "stochastic_rounding with capturable=True"),
        (F16, {"stochastic_rounding": True}, ValueError, r"param_groups\[0\]\['params'\]\[0\] is float16"),
        (F16, {"stochastic_rounding": True, "master_weights": True}, ValueError, "is float16"),
        (F32, {"master_weights": True}, UserWarning, "nothing to do.* all of these are float32; leave it out"),
        (F32, {"stochastic_rounding": True}, UserWarning, "stochastic_rounding has nothing to do"),
    ],
)
def test_options_that_are_refused(dtype: torch.dtype, options: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        make("SAM", params_of(dtype), SGD, **options)


def test_stochastic_updates_are_those_of_fused_bases() -> None:
    with pytest.raises(ValueError, match="'update': RMSprop rounds its update by itself"):
        make("SAM", params_of(B16), RMSPROP, stochastic_rounding="update")
    params = params_of(B16)
    optimizer = make("SAM", params, "adamw-amsgrad", stochastic_rounding="update")
    before = [param.detach().clone() for param in params]
    with pytest.raises(RuntimeError, match="is made by its own step"):
        run(optimizer, params, range(1))
    assert_same_bits("params", params, before)
    assert optimizer.param_groups[0]["sam_step"] == 0


def test_frozen_parameters_count_where_nothing_else_is_there() -> None:
    """A model that is unfrozen later."""
    params = params_of(B16)
    for param in params:
        param.requires_grad_(False)
    make("SAM", params, SGD, master_weights=True)
