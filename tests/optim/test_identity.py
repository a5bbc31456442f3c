"""Parameters have identity: each lies in memory of its own, once; and nothing of one that has left stays."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor, nn

import sam_kernels
from tests.optim.family import CLOSURES_ONLY, MEMBERS
from tests.optim.family_runs import make, run
from tests.optim.problem import assert_same_bits, closure_of, loss_of, make_batch, make_model, twin, weights

BUFFER = torch.arange(400, dtype=torch.float32)
SIZE = 1 << 18  # elements of a parameter that is replaced again and again
TABLE = BUFFER[:200].view(2, 100)


def parameter(view: Tensor) -> nn.Parameter:
    return nn.Parameter(view)


def sam(params: Any, **options: Any) -> Any:
    return sam_kernels.SAM(params, torch.optim.SGD, **{"lr": 0.1, "rho": 0.1, **options})


def squares_of(optimizer: Any, params: list[nn.Parameter]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.stack([(i + 1) * param.square().sum() for i, param in enumerate(params)]).sum()
        loss.backward()
        return loss

    return closure


SHARED = {
    "the same twice": lambda: [each := parameter(BUFFER[:10]), each],
    "one memory": lambda: [parameter(BUFFER[:10]), parameter(BUFFER[:10])],
    "one place": lambda: [parameter(BUFFER[:10]), parameter(BUFFER[9:20])],
    "a part": lambda: [parameter(BUFFER), parameter(BUFFER[100:110])],
    "a part, later spans between": lambda: [parameter(TABLE), parameter(BUFFER[50:60]), parameter(BUFFER[150:160])],
    "columns": lambda: [parameter(TABLE[:, ::2]), parameter(TABLE[:, ::3])],
    "a row of a transposed": lambda: [parameter(TABLE.t()), parameter(TABLE[1])],
    "halves of doubles": lambda: [parameter(BUFFER[:10]), parameter(BUFFER[4:8].view(torch.float64))],
}
ALONE = {
    "halves of a flat buffer": lambda: [parameter(BUFFER[:10]), parameter(BUFFER[10:20]), parameter(BUFFER[20:28].view(2, 4))],
    "columns": lambda: [parameter(TABLE[:, ::2]), parameter(TABLE[:, 1::2])],
    "blocks of columns": lambda: [parameter(TABLE[:, :30]), parameter(TABLE[:, 30:])],
    "transposed": lambda: [parameter(TABLE.t()), parameter(BUFFER[200:300])],
    "gaps that meet and miss": lambda: [parameter(torch.as_strided(BUFFER, (3, 2), (2, 3))), parameter(BUFFER[300:310])],
    "without elements": lambda: [parameter(BUFFER[:0]), parameter(BUFFER[:10])],
}
OVERLAPPING = {
    "expanded": lambda: BUFFER[:1].expand(4),
    "an expanded column": lambda: TABLE[:, :1].expand(2, 30),
    "windows": lambda: BUFFER[:10].unfold(0, 3, 1),
    "strides of one length": lambda: torch.as_strided(BUFFER, (2, 2), (3, 3)),
    "gaps that are met": lambda: torch.as_strided(BUFFER, (4, 3), (2, 3)),
}


@pytest.mark.parametrize("case", SHARED)
def test_parameters_that_share_memory_are_refused_by_name(case: str) -> None:
    params = SHARED[case]()
    before = [param.detach().clone() for param in params]
    with pytest.raises(
        ValueError, match=r"SAM: parameters? param_groups\[0\]\['params'\]\[\d\] (and|is) param_groups\[0\]\['params'\]\[\d\]"
    ):
        sam(params)
    assert_same_bits([param.detach() for param in params], before)


@pytest.mark.parametrize("case", ALONE)
def test_views_that_do_not_overlap_step_as_copies_do(case: str) -> None:
    params = ALONE[case]()
    copies = [nn.Parameter(param.detach().clone()) for param in params]
    before = BUFFER.clone()
    try:
        for each in (params, copies):
            optimizer = sam(each, lr=0.01, momentum=0.9)
            for _ in range(3):
                optimizer.step(squares_of(optimizer, each))
        for got, expected in zip(params, copies, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    finally:
        BUFFER.copy_(before)


@pytest.mark.parametrize("case", OVERLAPPING)
def test_a_parameter_that_overlaps_itself_is_refused_by_name(case: str) -> None:
    with pytest.raises(ValueError, match=r"parameter param_groups\[0\]\['params'\]\[1\] is expanded"):
        sam([parameter(BUFFER[300:310]), parameter(OVERLAPPING[case]())])


def test_names_say_where_a_parameter_is_listed_twice() -> None:
    weight = parameter(BUFFER[:4])
    with pytest.raises(ValueError, match="parameter 'head' is 'stem' as well; list it once"):
        sam([("stem", weight), ("head", weight)])


@pytest.mark.parametrize("by", ["wrapper", "base"])
def test_one_memory_in_two_groups_is_refused(by: str) -> None:
    optimizer = sam([parameter(BUFFER[:10])])
    owner = optimizer if by == "wrapper" else optimizer.base_optimizer
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[0\] and param_groups\[1\]\['params'\]\[0\] share memory"):  # noqa: PT012
        owner.add_param_group({"params": [parameter(BUFFER[5:15])]})
        optimizer.step(lambda: torch.tensor(0.0))
    if by == "wrapper":
        assert len(optimizer.param_groups) == 1


def test_a_frozen_view_of_a_trained_parameter_is_nobodys_matter() -> None:
    sam([parameter(BUFFER[:10]), nn.Parameter(BUFFER[5:8], requires_grad=False)])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_frozen_parameters_may_have_any_dtype(dtype: torch.dtype) -> None:
    model = make_model()
    other = twin(model)
    frozen = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)
    for net, params in ((model, [frozen, *model.parameters()]), (other, list(other.parameters()))):
        optimizer = sam(params)
        run(optimizer, net, 2)
    assert_same_bits(weights(model), weights(other))


def test_a_frozen_parameter_that_thaws_is_looked_at() -> None:
    model = make_model()
    late = nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False)
    optimizer = sam([*model.parameters(), late])
    run(optimizer, model, 1)
    late.requires_grad_(True)
    late.grad = torch.ones_like(late)
    before = weights(model)
    closure_of(optimizer, model, make_batch())()
    late.grad = torch.ones_like(late)
    with pytest.raises(TypeError, match=r"param_groups\[0\]\['params'\]\[4\] has dtype torch\.complex64"):
        optimizer.first_step()
    assert_same_bits(weights(model), before)


# --- .data ---


@pytest.mark.parametrize("name", ["SAM", "GSAM", "VaSSO", "LookSAM", "RSAM"])
def test_data_that_moves_between_steps_changes_nothing(name: str) -> None:
    model = make_model()
    other = twin(model)
    moved, still = make(name, model.parameters()), make(name, other.parameters())
    for k in range(4):
        run(moved, model, 1, start=k)
        run(still, other, 1, start=k)
        for param in model.parameters():
            param.data = param.data.clone()
    assert_same_bits(weights(model), weights(other))


def test_data_that_comes_to_share_memory_is_refused() -> None:
    first, second = parameter(torch.ones(3)), parameter(2 * torch.ones(3))
    optimizer = sam([first, second])
    optimizer.step(squares_of(optimizer, [first, second]))
    second.data = first.data
    before = first.detach().clone()
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step(squares_of(optimizer, [first, second]))
    assert_same_bits([first.detach()], [before])


def test_data_of_other_strides_is_followed() -> None:
    first = parameter(torch.arange(9.0).view(3, 3))
    copied = parameter(first.detach().clone())
    results = []
    for param, turns in ((first, True), (copied, False)):
        optimizer = sam([param], momentum=0.9)
        for k in range(3):
            if turns and k == 1:
                param.data = param.data.t().contiguous().t()
            optimizer.step(squares_of(optimizer, [param]))
        results.append(param.detach().clone())
    assert_same_bits(*[[result] for result in results])


@pytest.mark.parametrize("action", ["second_step", "first_step", "step", "base step"])
def test_data_set_between_the_two_steps_is_never_overwritten(action: str) -> None:
    model, batch = make_model(), make_batch()
    optimizer = sam(model.parameters())
    loss_of(model, batch).backward()
    optimizer.first_step()
    for param in model.parameters():
        param.data = torch.full_like(param, 3.0)
    actions: dict[str, Callable[[], Any]] = {
        "second_step": optimizer.second_step,
        "first_step": optimizer.first_step,
        "step": lambda: optimizer.step(closure_of(optimizer, model, batch)),
        "base step": optimizer.base_optimizer.step,
    }
    with pytest.raises(RuntimeError, match=r"4 of 4 parameters looked at lie elsewhere than first_step left them \(\.data was set\)"):
        actions[action]()
    assert all((param == 3.0).all() for param in model.parameters())


# --- parameters that leave ---


def _leave(optimizer: Any, model: nn.Module, how: str) -> nn.Module:
    """Parameters go, as code that prunes and grows a model makes them go; the model that is left to train."""
    groups = optimizer.param_groups
    going = groups if how in ("replaced", "all groups emptied", "all groups removed") else groups[1:]
    for group in going:
        for param in group["params"]:
            optimizer.state.pop(param, None)
    if how == "replaced":
        new = make_model()
        for group, layer in zip(groups, (new[0], new[2]), strict=True):
            group["params"][:] = list(layer.parameters())
        return new
    model[2] = nn.Linear(9, 2).requires_grad_(False)
    if how == "replaced by frozen ones":
        groups[1]["params"][:] = list(model[2].parameters())
    elif how == "group emptied":
        groups[1]["params"].clear()
    elif how == "group removed":
        del groups[1]
    elif how == "all groups emptied":
        for group in groups:
            group["params"].clear()
    elif how == "all groups removed":
        groups.clear()
    return model


@pytest.mark.parametrize(
    "how", ["replaced", "replaced by frozen ones", "group emptied", "group removed", "all groups emptied", "all groups removed"]
)
@pytest.mark.parametrize("name", ["SAM", "VaSSO", "LookSAM", "GSAM", "RSAM", "MomentumSAM", "S2SAM"])
def test_nothing_of_a_parameter_that_left_stays(name: str, how: str) -> None:
    model = make_model()
    optimizer = make(name, [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}])
    run(optimizer, model, 3)
    gone = [
        weakref.ref(param)
        for layer in ((model[0], model[2]) if "all" in how or how == "replaced" else (model[2],))
        for param in layer.parameters()
    ]
    model = _leave(optimizer, model, how)
    if "all" in how:
        model = make_model()
        assert optimizer.step(lambda: torch.tensor(2.0)) == 2.0
    else:
        run(optimizer, model, 2)
    gc.collect()
    assert not [ref() for ref in gone if ref() is not None]


def test_first_pass_gradients_that_were_copied_go_with_their_parameters() -> None:
    model = make_model()
    optimizer = make("GSAM", model.parameters())
    loss_of(model, make_batch()).backward()
    optimizer.first_step()  # the gradients stay the caller's: copied
    optimizer.zero_grad()
    loss_of(model, make_batch()).backward()
    optimizer.second_step()
    gone = [weakref.ref(param) for param in model.parameters()]
    optimizer.state.clear()
    model = make_model()
    optimizer.param_groups[0]["params"][:] = list(model.parameters())
    run(optimizer, model, 1)
    gc.collect()
    assert not [ref() for ref in gone if ref() is not None]


def _resident_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def _growth(optimizer: Any, step: Callable[[nn.Parameter], None]) -> int:
    """Bytes of the process after 35 replacements of a parameter of 1 MiB, beyond those after five."""
    before = 0
    for k in range(35):
        old = optimizer.param_groups[0]["params"][0]
        new = nn.Parameter(torch.full((SIZE,), float(k)))
        optimizer.param_groups[0]["params"][0] = new
        optimizer.state.pop(old, None)
        del old
        step(new)
        if k == 4:
            before = _resident_bytes()
    return _resident_bytes() - before


@pytest.mark.parametrize("name", ["SAM", "VaSSO", "FriendlySAM", "LookSAM", "GSAM", "RSAM", "m-SAM"])
def test_replacements_do_not_pile_up(name: str) -> None:
    start = nn.Parameter(torch.zeros(SIZE))
    optimizer = sam([start], momentum=0.9) if name == "m-SAM" else make(name, [start])

    def step(param: nn.Parameter) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = param.square().mean()
            loss.backward()
            return loss

        optimizer.step([closure, closure] if name == "m-SAM" else closure)

    del start
    assert _growth(optimizer, step) < 10 * 4 * SIZE  # a third of what has been replaced


def test_replacements_do_not_pile_up_in_rwsam() -> None:
    model = nn.Linear(512, 512, bias=False)
    optimizer = sam_kernels.RWSAM(model, torch.optim.SGD, beta=1.0, rho=0.05, lr=0.01, momentum=0.9)

    def step(param: nn.Parameter) -> None:
        model.weight = nn.Parameter(param.detach().view(512, 512))
        optimizer.param_groups[0]["params"][0] = model.weight
        optimizer.step(lambda: model(torch.ones(3, 512)).square().mean(1))

    assert _growth(optimizer, step) < 10 * 4 * SIZE  # a third of what has been replaced


def test_a_group_that_follows_cleared_groups_goes_on_counting() -> None:
    model = make_model()
    optimizer = sam(model.parameters(), rho="0.1/k^0.5")
    run(optimizer, model, 3)
    optimizer.param_groups.clear()
    optimizer.step(lambda: torch.tensor(0.0))
    optimizer.add_param_group({"params": list(model.parameters())})
    assert (optimizer.param_groups[0]["sam_step"], optimizer.param_groups[0]["rho"]) == (3, "0.1/k^0.5")


@pytest.mark.parametrize("how", ["emptied", "removed"])
@pytest.mark.parametrize("name", [name for name in MEMBERS if name not in ("SAMSPS", *CLOSURES_ONLY)])
def test_an_optimizer_without_parameters_has_every_call(name: str, how: str) -> None:
    optimizer = make(name, make_model().parameters())
    if how == "emptied":
        optimizer.param_groups[0]["params"].clear()
    else:
        optimizer.param_groups.clear()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.step(lambda: torch.tensor(1.0)) == 1.0
    if name != "WSAM-decoupled":
        assert optimizer.backward(lambda: torch.tensor(1.0)) == 1.0
    optimizer.step()
    optimizer.zero_grad()
    optimizer.release_buffers()
    assert optimizer.skipped_steps == 0


@pytest.fixture(autouse=True)
def _buffer_as_it_was() -> Iterator[None]:
    before = BUFFER.clone()
    yield
    BUFFER.copy_(before)


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """What was there before is not looked at again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
