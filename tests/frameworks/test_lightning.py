"""SAM in Lightning's automatic optimization, against the formula in float64; runs that are resumed; what is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sam_kernels import GSAM, RSAM, RWSAM, S2SAM, SAM, SAMSPS, USAM, WSAM, LookSAM, MomentumSAM, norm_layers
from tests.frameworks.conftest import Compared
from tests.frameworks.formula import RHO, SAM_OR_M, by_formula, error_of

lightning: Any = pytest.importorskip("lightning")
from sam_kernels.integrations.lightning import SAMCallback, sam_of  # noqa: E402
from tests.frameworks.lightning_runs import (  # noqa: E402
    BATCHES,
    LR,
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
CLOSE = 1e-12  # float64, six steps


@pytest.mark.parametrize(("accumulation", "clip"), [(1, 0.0), (1, 0.3), (3, 0.0), (3, 0.3)])
def test_automatic_optimization(accumulation: int, clip: float, compared: Compared) -> None:
    module, expected = Module(), net()
    trainer = trainer_of(accumulate_grad_batches=accumulation, gradient_clip_val=clip or None)
    trainer.fit(module, loader())
    base = torch.optim.SGD(expected.parameters(), lr=LR, momentum=0.9)
    shares = lambda model, batch, _: loss_of(model, batch) / accumulation  # noqa: E731
    by_formula(expected, base, steps_of(batches(), accumulation), shares, whole=False, clip=clip)
    steps = BATCHES // accumulation
    compared(
        "lightning", SAM_OR_M[accumulation], f"automatic: weights after {steps} steps, clip {clip}", error_of(module.net, expected), CLOSE
    )
    assert trainer.global_step == steps
    for owner, names in ((module, ("backward", "optimizer_step", "clip_gradients", "log")), (trainer.strategy, ("training_step",))):
        assert not set(names) & vars(owner).keys()  # given back
    assert not vars(sam_of(trainer.optimizers[0])).get("_is_led")


def test_clipping_by_value(compared: Compared) -> None:
    module = Module()
    trainer_of(gradient_clip_val=0.05, gradient_clip_algorithm="value").fit(module, loader())
    expected = train_by_formula(net(), [[[batch]] for batch in batches()], clip=0.05, by_value=True)
    compared("lightning", "SAM", "automatic: weights after 6 steps, gradient_clip_algorithm='value'", error_of(module.net, expected), CLOSE)


def test_perturbations_of_accumulated_batches_are_those_of_their_own_losses(compared: Compared) -> None:
    """Without a norm in the denominator the perturbation follows the loss's scale, and Lightning divides losses by their number."""

    def unnormalised(module: Any) -> Any:
        return USAM(module.parameters(), torch.optim.SGD, lr=LR, momentum=0.9, rho=RHO)

    module = Module(unnormalised)
    trainer_of(accumulate_grad_batches=2).fit(module, loader())
    expected = train_by_formula(net(), [[[each] for each in step] for step in steps_of(batches(), 2)], lambd=0.0)
    compared("lightning", "USAM by accumulation", "automatic: weights after 3 steps", error_of(module.net, expected), CLOSE)


@pytest.mark.parametrize("name", ["SAM, rho=0", "GSAM"])
def test_accumulation_where_both_passes_have_one_scale(name: str, compared: Compared) -> None:
    """With rho = 0 there is one pass, and GSAM steps along both gradients: the bits of a loop without Lightning."""

    def make(module: Any) -> SAM:
        if name == "GSAM":
            return GSAM(module.parameters(), torch.optim.SGD, lr=LR, momentum=0.9, rho=RHO, alpha=0.3)
        return sgd(module, rho=0.0)

    module, plain = Module(make), net()
    trainer_of(accumulate_grad_batches=2).fit(module, loader())
    optimizer = make(plain)
    for i, batch in enumerate(batches()):

        def closure(batch: Any = batch) -> Tensor:
            loss = loss_of(plain, batch) / 2
            loss.backward()
            return loss

        optimizer.backward(closure)
        if i % 2:
            optimizer.step()
            optimizer.zero_grad()
    are_same = all(map(torch.equal, module.net.parameters(), plain.parameters()))
    compared("lightning", name, "automatic, accumulation 2: a loop without Lightning", 0.0 if are_same else 1.0, 0.0)


def test_the_last_step_of_an_epoch_may_have_fewer_batches() -> None:
    """Lightning divides by ``accumulate_grad_batches`` all the same."""
    module = Module()
    trainer_of(accumulate_grad_batches=4).fit(module, loader())
    expected = train_by_formula(net(), [[[each] for each in step] for step in steps_of(batches(), 4)], share=lambda count: 1 / 4)
    assert error_of(module.net, expected) < CLOSE


def test_the_scheduler_of_accumulation(compared: Compared) -> None:
    module, data = Module(), batches()
    trainer_of(max_epochs=2, callbacks=[lightning.pytorch.callbacks.GradientAccumulationScheduler({0: 1, 1: 3})]).fit(module, loader())
    steps = [*steps_of(data, 1), *steps_of(data, 3)]
    expected = train_by_formula(net(), [[[each] for each in step] for step in steps])
    what = "automatic: weights after 8 steps, GradientAccumulationScheduler"
    compared("lightning", "m-SAM by accumulation", what, error_of(module.net, expected), CLOSE)


# --- micro-batches inside of a batch ---


def halves(batch: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(batch[0][:2], batch[1][:2]), (batch[0][2:], batch[1][2:])]


@pytest.mark.parametrize(("accumulation", "kind"), [(1, "tuple"), (1, "mapping"), (2, "tuple")])
def test_micro_batches_of_a_batch(accumulation: int, kind: str, compared: Compared) -> None:
    class Mapped(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = loss_of(self.net, batch if kind == "tuple" else (batch["x"], batch["y"]))
            self.log("loss", loss, on_step=False, on_epoch=True)
            return {"loss": loss} if kind == "mapping" else loss

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            losses.append(outputs["loss"])

    losses: list[Tensor] = []
    module = Mapped()
    trainer = trainer_of(accumulate_grad_batches=accumulation)
    trainer.callbacks[0] = SAMCallback(micro_batches=2)
    data = batches() if kind == "tuple" else [{"x": x, "y": y, "name": "batch"} for x, y in batches()]
    trainer.fit(module, loader(data))
    steps = [[[half] for each in step for half in halves(each)] for step in steps_of(batches(), accumulation)]
    expected = train_by_formula(net(), steps)
    if kind == "tuple":
        what = f"automatic, micro_batches=2, accumulation {accumulation}: weights after {6 // accumulation} steps"
        compared("lightning", "m-SAM", what, error_of(module.net, expected), CLOSE)
    assert error_of(module.net, expected) < CLOSE
    assert losses[0].item() == pytest.approx(loss_of(net(), batches()[0]).item() / accumulation, rel=1e-12)
    assert trainer.callback_metrics["loss"].item() == pytest.approx(accumulation * torch.stack(losses).mean().item(), rel=1e-5)


def test_micro_batches_that_cannot_be() -> None:
    class Extra(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": loss_of(self.net, batch), "logits": batch[0]}

    for micro_batches, module, error, words in (
        (3, Module(), ValueError, "4 rows of batch cannot be cut into 3 equal micro-batches"),
        (2, Extra(), RuntimeError, r"must return the loss alone.*\(logits\).*log it with self.log"),
    ):
        trainer = trainer_of()
        trainer.callbacks[0] = SAMCallback(micro_batches=micro_batches)
        with pytest.raises(error, match=words):
            trainer.fit(module, loader())
        assert "backward" not in vars(module)
    with pytest.raises(ValueError, match="micro_batches must be at least 1, got 0"):
        SAMCallback(0)
    with pytest.raises(TypeError, match=r"micro_batches must be an integer, got a float|micro_batches must be an integer"):
        SAMCallback(2.0)  # type: ignore[arg-type]


# --- what the second pass must see, or must not change ---


def test_the_second_pass_draws_the_same_dropout_masks(compared: Compared) -> None:
    """Lightning makes the first forward pass before SAM is called."""

    def dropping() -> nn.Module:
        model = net()
        return nn.Sequential(model[0], nn.Dropout(0.5), model[1], model[2])  # type: ignore[index]

    module, expected = Module(lambda module: sgd(module, preserve_rng_state=True), dropping()), dropping()

    class Seed(lightning.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            torch.manual_seed(batch_idx)

    trainer_of(callbacks=[Seed()]).fit(module, loader())
    base = torch.optim.SGD(expected.parameters(), lr=LR, momentum=0.9)

    def loss(model: nn.Module, batch: Any, i: int) -> Tensor:
        torch.manual_seed(i)
        return loss_of(model, batch)

    by_formula(expected, base, steps_of(batches(), 1), loss, whole=False, clip=0.0)
    compared("lightning", "SAM", "automatic: weights after 6 steps, dropout and preserve_rng_state", error_of(module.net, expected), CLOSE)


def test_running_statistics_are_those_of_the_first_passes() -> None:
    def normalised() -> nn.Module:
        model = net()
        return nn.Sequential(model[0], nn.BatchNorm1d(8).double(), model[1], model[2])  # type: ignore[index]

    module, seen = Module(lambda module: sgd(module, model=module), normalised()), []

    class Watch(lightning.Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append({name: value.clone() for name, value in pl_module.net.state_dict().items()})

    trainer_of(callbacks=[Watch()]).fit(module, loader())
    norm = normalised()
    for state, (x, _) in zip(seen, batches(), strict=True):  # the forward passes at the weights alone
        running = {name: value.clone() for name, value in norm.state_dict().items() if name.startswith("1.")}
        norm.load_state_dict({**state, **{name: value for name, value in running.items() if "running" in name or "num" in name}})
        norm(x)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.allclose(getattr(module.net[1], name), getattr(norm[1], name), rtol=1e-12)  # type: ignore[index]


# --- resuming ---


@pytest.mark.parametrize("interval", ["none", "step", "epoch"])
def test_a_run_is_resumed_bit_for_bit(interval: str, tmp_path: Path) -> None:
    def scheduled(module: Any) -> Any:
        optimizer = sgd(module)
        if interval == "none":
            return optimizer
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": interval}}

    whole, first, second = Module(scheduled), Module(scheduled), Module(scheduled)
    trainer_of(max_epochs=2).fit(whole, loader())
    trainer = trainer_of()
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    trainer = trainer_of(max_epochs=2)
    trainer.fit(second, loader(), ckpt_path=tmp_path / "run.ckpt", weights_only=False)
    for param, right in zip(second.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(param, right)
    assert trainer.optimizers[0].param_groups[0]["sam_step"] == 12
    assert (trainer.optimizers[0].param_groups[0]["lr"] == LR) == (interval == "none")


def test_a_schedule_per_step_is_the_formulas(compared: Compared) -> None:
    def scheduled(module: Any) -> Any:
        optimizer = sgd(module)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def halve(i: int, optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["lr"] = LR * 0.5 ** ((i + 1) // 2)

    module = Module(scheduled)
    trainer_of().fit(module, loader())
    expected = train_by_formula(net(), [[[batch]] for batch in batches()], after=halve)
    compared("lightning", "SAM", "automatic: weights after 6 steps, a schedule per step", error_of(module.net, expected), CLOSE)


# --- bad input ---


def test_a_batch_without_a_loss_makes_no_step(compared: Compared) -> None:
    class Skipping(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx in skipped else loss_of(self.net, batch)

    data, skipped = batches(), [2, 3]
    module = Skipping()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*a first step without an ascent.*")
        trainer_of().fit(module, loader())
    expected = train_by_formula(net(), [[[batch]] for i, batch in enumerate(data) if i not in skipped])
    compared(
        "lightning", "SAM", "automatic: weights after 4 steps, training_step returned None twice", error_of(module.net, expected), CLOSE
    )
    for index, first in ((0, data[1:2]), (1, data[:1])):  # of two batches, one
        skipped, module = [index], Skipping()
        trainer_of(accumulate_grad_batches=2).fit(module, loader())
        steps = [[[each] for each in step] for step in (first, *steps_of(data[2:], 2))]
        assert error_of(module.net, train_by_formula(net(), steps, share=lambda count: 1 / 2)) < CLOSE


def test_a_loss_in_one_pass_alone_is_an_error() -> None:
    class Odd(Module):
        calls = 0

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.calls += 1
            return None if self.calls == 2 else loss_of(self.net, batch)

    with pytest.raises(RuntimeError, match=r"returned a loss in the first pass of the batch, and None.* in another one"):
        trainer_of().fit(Odd(), loader())


def test_an_iterator_in_the_place_of_a_batch_is_refused() -> None:
    class Iterating(Module):
        def training_step(self, dataloader_iter: Iterator[Any]) -> Any:  # type: ignore[override]
            return loss_of(self.net, next(dataloader_iter)[0])

    with pytest.raises(RuntimeError, match=r"would take another batch for the second pass; write training_step\(self, batch, batch_idx\)"):
        trainer_of().fit(Iterating(), loader())


def params(module: Any) -> Any:
    return module.parameters(), torch.optim.SGD


MANUALLY = r"optimize manually: self.automatic_optimization = False, and self.optimizers\(\).step\(closure\)"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda module: torch.optim.SGD(module.parameters(), lr=LR), "must return one optimizer of SAM, got SGD"),
        (lambda module: RWSAM(module.net, torch.optim.SGD, lr=LR, beta=1.0), "RWSAM needs losses of samples: " + MANUALLY),
        (lambda module: [sgd(module), sgd(module)], "multiple optimizers is only supported with manual optimization"),
        (lambda module: MomentumSAM(*params(module), lr=LR, momentum=0.9), "'momentum'.*moves the weights before the first.*" + MANUALLY),
        (lambda module: S2SAM(*params(module), lr=LR), "moves the weights before the first.*" + MANUALLY),
        (lambda module: RSAM(*params(module), lr=LR), "moves the weights before the first.*" + MANUALLY),
        (lambda module: WSAM(*params(module), lr=LR, decoupled=True), "chooses more than a gradient; " + MANUALLY),
        (lambda module: LookSAM(*params(module), lr=LR), "'looksam' chooses more than a gradient; " + MANUALLY),
        (lambda module: SAMSPS(*params(module)), "chooses more than a gradient; " + MANUALLY),
        (lambda module: SAM(norm_layers(module), torch.optim.SGD, lr=LR, freeze_unperturbed=True), "freeze_unperturbed.*" + MANUALLY),
    ],
    ids=["another", "rwsam", "two", "momentum", "s2sam", "rsam", "wsam", "look", "sps", "freezing"],
)
def test_other_optimizers_are_refused(make: Callable[[Any], Any], words: str) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    with pytest.raises(RuntimeError, match=words):
        trainer_of().fit(Module(make, model), loader())


def test_no_sam_is_found_in_another_optimizer() -> None:
    with pytest.raises(TypeError, match="SGD holds no optimizer of SAM"):
        sam_of(torch.optim.SGD(net().parameters(), lr=LR))


@pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy"])
@pytest.mark.parametrize("is_automatic", [True, False])
def test_strategies_with_weights_of_their_own_are_refused(name: str, is_automatic: bool) -> None:
    """By name: these strategies need packages, or devices, that a test has not."""
    kind = type(name, (lightning.pytorch.strategies.SingleDeviceStrategy,), {})
    words = rf"{name} updates, or gathers, weights of its own.*strategy='ddp'"
    if is_automatic:
        with pytest.raises(RuntimeError, match=words):
            trainer_of(strategy=kind("cpu")).fit(Module(), loader())
        return
    for step in (
        lambda module, optimizer, batch: optimizer.step(lambda: module.closure(*batch)),
        lambda module, optimizer, batch: optimizer.backward(lambda: module.closure(*batch)),
        lambda module, optimizer, batch: optimizer.first_step(),
    ):
        with pytest.raises(RuntimeError, match=words):
            manual_trainer(strategy=kind("cpu")).fit(Manual(step), loader())


def test_the_callback_with_manual_optimization_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"leave the callback out and write self.optimizers\(\).step\(closure\)"):
        trainer_of().fit(Manual(lambda module, optimizer, batch: None), loader())
