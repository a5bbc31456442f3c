"""Precision plugins of Lightning and Fabric with SAM: the formula under the same autocast, and steps that a GradScaler skips."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels.schedules import Radius
from tests.frameworks.conftest import Compared
from tests.frameworks.formula import SAM_OR_M, error_of

lightning: Any = pytest.importorskip("lightning")
from sam_kernels.integrations.lightning import is_second_pass, sam_of  # noqa: E402
from tests.frameworks.lightning_runs import (  # noqa: E402
    Manual,
    Module,
    batches,
    loader,
    loss_of,
    manual_trainer,
    net,
    sgd,
    steps_of,
    train_by_formula,
    trainer_of,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
FLOAT32 = 1e-5  # float32 weights, six steps: their rounding, and that of losses which are scaled
SCALE = 2.0**12
BAD = 2  # the batch whose float16 activations overflow


def autocast_to(dtype: torch.dtype) -> Callable[[], Any]:
    return partial(torch.autocast, "cpu", dtype)


def scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=1000)


def mixed(precision: str, a_scaler: Any = None) -> Any:
    return lightning.pytorch.plugins.MixedPrecision(precision, "cpu", a_scaler)


def data(*, overflows: bool) -> list[tuple[Tensor, Tensor]]:
    found = batches(dtype=torch.float32)
    if overflows:
        found[BAD] = (found[BAD][0] * 1e6, found[BAD][1])  # beyond float16, not beyond float32
    return found


class Watch(lightning.Callback):  # type: ignore[misc]
    """The weights and the scale after every batch, and the gradients' norm where the step is about to be made."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []
        self.scales: list[float] = []
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.norms.append(torch.stack([param.grad.square().sum() for param in pl_module.parameters()]).sum().sqrt().item())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.weights.append([param.detach().clone() for param in pl_module.parameters()])
        self.scales.append(trainer.precision_plugin.scaler.get_scale() if trainer.precision_plugin.scaler else 1.0)


@pytest.mark.parametrize(("accumulation", "clip"), [(1, 0.0), (1, 0.1), (2, 0.1)])
def test_bfloat16_autocast(accumulation: int, clip: float, compared: Compared) -> None:
    module = Module(model=net(torch.float32))
    options = {"accumulate_grad_batches": accumulation, "gradient_clip_val": clip or None}
    trainer_of(precision="bf16-mixed", **options).fit(module, loader(data(overflows=False)))
    steps = [[[each] for each in step] for step in steps_of(data(overflows=False), accumulation)]
    expected = train_by_formula(net(torch.float32), steps, clip=clip, context=autocast_to(torch.bfloat16))
    what = f"automatic, bf16-mixed: weights after {len(steps)} steps, clip {clip}"
    compared("lightning", SAM_OR_M[accumulation], what, error_of(module.net, expected), FLOAT32)


@pytest.mark.parametrize("overflows", [False, True])
@pytest.mark.parametrize(("accumulation", "clip"), [(1, 0.0), (1, 0.1), (2, 0.1)])
def test_float16_autocast_with_a_scaler(accumulation: int, clip: float, overflows: bool, compared: Compared) -> None:
    """The ascent is not clipped; the second gradient is unscaled before it is; a step that is not finite changes nothing."""
    module, watch = Module(model=net(torch.float32)), Watch()
    trainer = trainer_of(
        plugins=[mixed("16-mixed", scaler())],
        accumulate_grad_batches=accumulation,
        gradient_clip_val=clip or None,
        callbacks=[watch],
    )
    trainer.fit(module, loader(data(overflows=overflows)))
    steps = [[[each] for each in step] for step in steps_of(data(overflows=overflows), accumulation)]
    expected = train_by_formula(net(torch.float32), steps, clip=clip, context=autocast_to(torch.float16), scale=SCALE)
    how = ", one skipped" if overflows else ""
    what = f"automatic, 16-mixed: weights after {len(steps)} steps{how}, clip {clip}"
    compared("lightning", SAM_OR_M[accumulation], what, error_of(module.net, expected), FLOAT32)
    sam = sam_of(trainer.optimizers[0])
    assert sam.skipped_steps == overflows
    assert trainer.global_step == len(steps)
    bad = BAD // accumulation  # the step
    assert [scale / SCALE for scale in watch.scales[accumulation - 1 :: accumulation]] == [
        0.5 if overflows and step >= bad else 1.0 for step in range(len(steps))
    ]
    weights = watch.weights[accumulation - 1 :: accumulation]
    for step in range(1, len(steps)):
        is_same = all(map(torch.equal, weights[step - 1], weights[step]))
        assert is_same == (overflows and step == bad)
    finite = [norm for step, norm in enumerate(watch.norms) if not (overflows and step == bad)]
    assert all(0 < norm < 10 for norm in finite)  # unscaled: scaled ones would be 4096 times as long
    assert "_step_supports_amp_scaling" not in vars(sam)


def test_16_mixed_as_lightning_allows_it_on_the_cpu(compared: Compared) -> None:
    """Lightning makes bf16-mixed of it."""
    module = Module(model=net(torch.float32))
    trainer = trainer_of(precision="16-mixed")
    trainer.fit(module, loader(data(overflows=False)))
    assert trainer.precision == "bf16-mixed"
    steps = [[[each]] for each in data(overflows=False)]
    expected = train_by_formula(net(torch.float32), steps, context=autocast_to(torch.bfloat16))
    assert error_of(module.net, expected) < FLOAT32


def test_an_own_clipping_hook_gets_the_unscaled_gradient(compared: Compared) -> None:
    class Clipping(Module):
        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            self.clip_gradients(self.optimizers(), gradient_clip_val=0.1, gradient_clip_algorithm="norm")

    module = Clipping(model=net(torch.float32))
    trainer_of(plugins=[mixed("16-mixed", scaler())]).fit(module, loader(data(overflows=False)))
    steps = [[[each]] for each in data(overflows=False)]
    expected = train_by_formula(net(torch.float32), steps, clip=0.1, context=autocast_to(torch.float16), scale=SCALE)
    what = "automatic, 16-mixed: weights after 6 steps, configure_gradient_clipping"
    compared("lightning", "SAM", what, error_of(module.net, expected), FLOAT32)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_radius_sees_loss_and_norm_of_its_own_batch(micro_batches: int) -> None:
    """Neither scaled, nor divided by the number of accumulated batches; and so are the losses in ``outputs``."""

    class Seeing(Radius):
        def radius(self, info: Any) -> float:
            seen.append((float(info.loss), float(info.norm)))
            return 0.05

    class Losses(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = loss_of(self.net, batch)
            if not is_second_pass(self):
                grads = torch.autograd.grad(loss * SCALE, list(self.net.parameters()), retain_graph=True)
                norm = torch.stack([(grad / SCALE).square().sum() for grad in grads]).sum().sqrt()
                expected.append((loss.item(), norm.item()))
            return loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            means.append(float(outputs["loss"]))

    seen: list[tuple[float, float]] = []
    expected: list[tuple[float, float]] = []
    means: list[float] = []
    module = Losses(lambda module: sgd(module, rho=Seeing()), net(torch.float32))
    trainer = trainer_of(plugins=[mixed("16-mixed", scaler())], accumulate_grad_batches=2)
    trainer.callbacks[0].micro_batches = micro_batches
    trainer.fit(module, loader(data(overflows=False)))
    assert len(seen) == 6 * micro_batches
    for (loss, norm), (right_loss, right_norm) in zip(seen, expected, strict=True):
        assert loss == pytest.approx(right_loss, rel=1e-6)
        assert norm == pytest.approx(right_norm, rel=1e-3)  # of float16 gradients
    losses = torch.tensor([loss for loss, _ in expected]).reshape(6, micro_batches).mean(1) / 2
    assert means == pytest.approx(losses.tolist(), rel=1e-6)


def test_double_precision(compared: Compared) -> None:
    """The plugin converts a float32 module and the batches."""
    module = Module(model=net(torch.float32))
    trainer_of(precision="64-true", gradient_clip_val=0.3).fit(module, loader(data(overflows=False)))
    expected = net(torch.float32).double()
    steps = [[[(x.double(), y)]] for x, y in data(overflows=False)]
    error = error_of(module.net.double(), train_by_formula(expected, steps, clip=0.3))
    compared("lightning", "SAM", "automatic, 64-true: weights after 6 steps, clip 0.3", error, 1e-12)


def test_bfloat16_weights_with_masters(compared: Compared) -> None:
    """bf16-true with ``master_weights=True``: the bits of a loop without Lightning."""

    def with_masters(module: Any) -> Any:
        return sgd(module, master_weights=True)

    module, plain = Module(with_masters, net(torch.float32)), net(torch.bfloat16)
    trainer_of(precision="bf16-true").fit(module, loader(data(overflows=False)))
    optimizer = with_masters(plain)
    for x, y in data(overflows=False):

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = loss_of(plain, (x.bfloat16(), y))
            loss.backward()
            return loss

        optimizer.zero_grad()
        optimizer.backward(closure)
        optimizer.step()
    are_same = all(map(torch.equal, module.net.parameters(), plain.parameters()))
    assert next(module.net.parameters()).dtype is torch.bfloat16
    compared("lightning", "SAM, master_weights", "automatic, bf16-true: a loop without Lightning", 0.0 if are_same else 1.0, 0.0)


# --- manual optimization, and Fabric ---


def by_backward(module: Any, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    optimizer.backward(lambda: module.closure(*batch))
    optimizer.step()


def by_two_steps(module: Any, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    module.closure(*batch)
    optimizer.first_step(zero_grad=True)
    module.closure(*batch)
    optimizer.second_step()


def by_closure(module: Any, optimizer: Any, *batches: Any) -> None:
    def closure(*batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        result: Tensor = module.closure(*batch)
        return result

    optimizer.step(closure, batch=batches[0], micro_batches=2)


WAYS = {"backward": by_backward, "first_step, second_step": by_two_steps, "step(closure, batch=..., micro_batches=2)": by_closure}


def ascents(name: str, batch: tuple[Tensor, Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
    x, y = batch
    return [[(x[:2], y[:2])], [(x[2:], y[2:])]] if "micro_batches" in name else [[batch]]


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", WAYS)
def test_manual_optimization(name: str, precision: str, compared: Compared) -> None:
    """One autocast of Lightning's is around both passes."""
    is_half = precision == "16-mixed"
    module, watch = Manual(WAYS[name], model=net(torch.float32)), Watch()
    trainer = manual_trainer(plugins=[mixed(precision, scaler() if is_half else None)], callbacks=[watch])
    trainer.fit(module, loader(data(overflows=is_half)))
    steps = [ascents(name, each) for each in data(overflows=is_half)]
    context = autocast_to(torch.float16 if is_half else torch.bfloat16)
    expected = train_by_formula(net(torch.float32), steps, context=context, scale=SCALE if is_half else 1.0)
    error = error_of(module.net, expected)
    what = f"manual, {precision}, {name}: weights after 6 steps{', one skipped' if is_half else ''}"
    compared("lightning", "m-SAM" if "micro" in name else "SAM", what, error, FLOAT32)
    assert trainer.global_step == 6
    assert sam_of(trainer.optimizers[0]).skipped_steps == is_half
    if is_half:
        assert [scale / SCALE for scale in watch.scales] == [1.0] * BAD + [0.5] * (6 - BAD)
        assert all(map(torch.equal, watch.weights[BAD - 1], watch.weights[BAD]))


class Loop:
    def __init__(self, fabric: Any, model: Any) -> None:
        self.fabric, self.model = fabric, model

    def closure(self, *batch: Tensor) -> Tensor:
        loss = loss_of(self.model, batch)  # type: ignore[arg-type]
        self.fabric.backward(loss)
        return loss


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("name", WAYS)
def test_fabric(name: str, precision: str, compared: Compared) -> None:
    """Fabric casts inputs to the lower precision, and outputs to float32: the loss is not under autocast."""
    is_half = precision == "16-mixed"
    dtype = torch.float16 if is_half else torch.bfloat16
    plugin = lightning.fabric.plugins.MixedPrecision(precision, "cpu", scaler() if is_half else None)
    fabric = lightning.Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    plain = net(torch.float32)
    model, optimizer = fabric.setup(plain, sgd(plain))
    scales, weights = [], []
    for batch in data(overflows=is_half):
        WAYS[name](Loop(fabric, model), optimizer, batch)
        scales.append(plugin.scaler.get_scale() if is_half else 1.0)
        weights.append([param.detach().clone() for param in plain.parameters()])
    expected = Casting(net(torch.float32), dtype)
    train_by_formula(expected, [ascents(name, each) for each in data(overflows=is_half)], scale=SCALE if is_half else 1.0)
    what = f"Fabric, {precision}, {name}: weights after 6 steps{', one skipped' if is_half else ''}"
    compared("lightning", "m-SAM" if "micro" in name else "SAM", what, error_of(plain, expected.inner), FLOAT32)
    assert optimizer.skipped_steps == is_half
    assert plugin.scaler is None or isinstance(plugin.scaler, torch.amp.GradScaler)
    if is_half:
        assert [scale / SCALE for scale in scales] == [1.0] * BAD + [0.5] * (6 - BAD)
        assert all(map(torch.equal, weights[BAD - 1], weights[BAD]))
        with pytest.raises(NotImplementedError, match="optimizers handling the unscaling"):  # SAM(max_grad_norm=...) clips
            fabric.clip_gradients(model, optimizer, max_norm=1.0)


class Casting(nn.Module):
    def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self._dtype = inner, dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self._dtype):
            result: Tensor = self.inner(x.to(self._dtype))
        return result.float()
