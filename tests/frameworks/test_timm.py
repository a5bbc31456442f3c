"""timm's training loop and its optimizers, with SAM in them, against SAM written out in float64."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_kernels import RWSAM, SAM
from tests.frameworks.conftest import Compared
from tests.frameworks.formula import LR, RHO, STEPS, by_formula, error_of
from tests.frameworks.test_loops import (
    BAR,
    CLIP,
    PAGE,
    WITHOUT_SAM,
    Batch,
    Followed,
    Net,
    batches,
    in_pairs,
    run,
    sam,
    sgd,
    share_of,
    singly,
)
from tests.helpers.pages import blocks_under

timm: Any = pytest.importorskip("timm")
pytest.importorskip("timm.optim")
from timm.data import Mixup  # noqa: E402
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2, list_optimizers  # noqa: E402
from timm.scheduler import CosineLRScheduler  # noqa: E402
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad  # noqa: E402

from sam_kernels.integrations.timm import SAMScaler  # noqa: E402


def base_of(model: nn.Module, name: str = "sgd", lr: float = LR) -> Any:
    return create_optimizer_v2(model, opt=name, lr=lr, momentum=0.9, weight_decay=0.01)


@pytest.mark.parametrize(("accumulate", "has_scale"), [(1, True), (1, False), (2, True)])
def test_the_pages_loop(accumulate: int, has_scale: bool, compared: Compared) -> None:
    (code,) = blocks_under(PAGE, "timm", "py")
    seen: list[Batch] = []
    mixup, loss_fn = Mixup(mixup_alpha=0.8, num_classes=3), SoftTargetCrossEntropy()

    def recorded(*batch: Tensor) -> Batch:
        seen.append(mixup(*(each.clone() for each in batch)))
        return seen[-1]

    def around(model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
        return ModelEmaV3(model, decay=0.9), CosineLRScheduler(optimizer, t_initial=STEPS, warmup_t=2, t_in_epochs=False)

    model = Net()
    base = base_of(model)
    optimizer = SAM(base.param_groups, base, rho=RHO)
    ema, scheduler = around(model, optimizer)
    scaler = SAMScaler("cpu", enabled=has_scale)
    loader = batches(STEPS * accumulate)
    run(code)["train_one_epoch"](
        0, model, loader, optimizer, loss_fn, scaler, recorded, ema, scheduler, accumulate=accumulate, clip_grad=CLIP
    )  # fmt: skip

    expected, updates = Net(), iter(range(1, STEPS + 1))
    base = base_of(expected)
    right_ema, right_scheduler = around(expected, base)

    def after() -> None:
        update = next(updates)
        right_ema.update(expected, step=update)
        right_scheduler.step_update(update)

    def loss(model: Any, batch: Batch, _: int) -> Tensor:
        return loss_fn(model(batch[0]), batch[1]) / accumulate

    by_formula(expected, Followed(base, after), in_pairs(seen) if accumulate == 2 else singly(seen), loss, whole=False, clip=CLIP)
    error = max(error_of(model, expected), error_of(ema.module, right_ema.module))
    algorithm = "SAM" if accumulate == 1 else "m-SAM by accumulation"
    scaled = "scaled" if has_scale else "not scaled"
    what = f"SAMScaler ({scaled}), mixup, clipping, timm.scheduler, ModelEmaV3: weights and averages after {STEPS} steps"
    compared("timm", algorithm, what, error, BAR)


@pytest.mark.parametrize("mode", ["value", "agc"])
def test_timms_other_ways_of_clipping_are_of_the_second_gradient(mode: str) -> None:
    model, expected = Net(), Net()
    optimizer, scaler = sam(model), SAMScaler("cpu")
    (batch,) = batches(1)
    loss = scaler(lambda: share_of(1)(model, batch, 0), optimizer, clip_grad=0.01, clip_mode=mode, parameters=model.parameters())
    assert loss.item() == share_of(1)(expected, batch, 0).item()

    class Clipping(Followed):
        def step(self) -> None:
            dispatch_clip_grad(expected.parameters(), 0.01, mode=mode)
            super().step()

    by_formula(expected, Clipping(sgd(expected)), [[batch]], share_of(1), whole=False, clip=0.0)
    assert error_of(model, expected) < BAR
    unclipped = Net()
    by_formula(unclipped, sgd(unclipped), [[batch]], share_of(1), whole=False, clip=0.0)
    assert error_of(model, unclipped) > 1e-3


def test_a_gradient_that_overflows_halves_the_scale_and_skips() -> None:
    model = Net()
    optimizer, scaler = sam(model), SAMScaler("cpu")
    before, scale = [param.clone() for param in model.parameters()], scaler._scaler.get_scale()
    (batch,) = batches(1)
    scaler(lambda: share_of(1)(model, batch, 0) * float("inf"), optimizer)
    assert all(map(torch.equal, model.parameters(), before))
    assert scaler._scaler.get_scale() == scale / 2
    assert scaler.state_dict() == {**NativeScaler("cpu").state_dict(), "scale": scale / 2}


def test_timms_own_scaler_is_not_silent() -> None:
    model = Net()
    optimizer, scaler = sam(model), NativeScaler("cpu")
    with pytest.warns(UserWarning, match=WITHOUT_SAM):
        scaler(share_of(1)(model, batches(1)[0], 0), optimizer)


@pytest.mark.parametrize(
    ("wrong", "kind", "match"),
    [
        ({"forward": torch.ones(())}, TypeError, r"expected the forward pass, .* got a torch.float32 tensor.*_forward, optimizer"),
        (
            {"optimizer": torch.optim.SGD([torch.ones(1, requires_grad=True)])},
            TypeError,
            r"the optimizer is SGD.*SAM\(optimizer.param_groups",
        ),
        ({"optimizer": RWSAM(nn.Linear(2, 2), torch.optim.SGD, lr=0.1, beta=1.0)}, TypeError, r"RWSAM needs losses of samples"),
        ({"create_graph": True}, ValueError, r"create_graph=True .*leave it out"),
        ({"clip_grad": 1.0}, ValueError, r"clip_grad needs parameters"),
    ],
)
def test_what_samscaler_refuses(wrong: dict[str, Any], kind: type[Exception], match: str) -> None:
    model = Net()
    usual: dict[str, Any] = {"forward": lambda: model(torch.ones(1, 5).double()).sum(), "optimizer": sam(model)}
    with pytest.raises(kind, match=match):
        SAMScaler("cpu")(**{**usual, **wrong})
    assert all(param.grad is None for param in model.parameters())


# Others are of packages that are not installed, or of CUDA alone.
_OWN = [name for name in list_optimizers(exclude_filters=["fused*", "bnb*"]) if name != "adahessian"]


def test_every_optimizer_of_timm(compared: Compared) -> None:
    error = 0.0
    for name in [*_OWN, "lookahead_adamw", "lookahead_sgd"]:
        models, loader = (Net(), Net()), batches(7)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base, right = (base_of(each, name, 0.01) for each in models)
        optimizer = SAM(base.param_groups, base, rho=RHO)
        torch.manual_seed(2)  # Kron draws
        for batch in loader:

            def closure(batch: Batch = batch, optimizer: SAM = optimizer, model: nn.Module = models[0]) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(batch[0]), batch[1])
                loss.backward()
                return loss

            optimizer.step(closure)
        torch.manual_seed(2)
        by_formula(models[1], right, singly(loader), share_of(1), whole=False, clip=0.0)
        assert error_of(models[0], Net()) > 1e-5, name
        own = error_of(*models)
        assert own < BAR, name
        error = max(error, own)
    assert len(_OWN) > 80
    compared("timm", "SAM", f"around each of {len(_OWN) + 2} optimizers of timm.optim: weights after 7 steps", error, BAR)


def test_lookahead_is_synchronised_by_name() -> None:
    model = Net()
    base = base_of(model, "lookahead_sgd")
    optimizer = SAM(base.param_groups, base, rho=RHO)
    share_of(1)(model, batches(1)[0], 0).backward()
    optimizer.first_step(zero_grad=True)
    share_of(1)(model, batches(1)[0], 0).backward()
    optimizer.second_step()
    before = [param.clone() for param in model.parameters()]
    assert hasattr(optimizer, "sync_lookahead")  # as timm's train.py asks
    optimizer.sync_lookahead()
    slow = [base._base_optimizer.state[param]["lookahead_slow_buff"] for param in model.parameters()]
    assert all(map(torch.equal, slow, before))  # the first time they are a copy
    assert not hasattr(sam(Net()), "sync_lookahead")


@pytest.mark.parametrize("name", ["adahessian", "lookahead_adahessian"])
def test_adahessian_is_refused(name: str) -> None:
    base = base_of(Net(), name)
    with pytest.raises(TypeError, match=r"differentiates the gradient in \.grad.*of first order"):
        SAM(base.param_groups, base, rho=RHO)
