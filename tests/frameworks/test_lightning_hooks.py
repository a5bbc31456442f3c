"""Lightning's hooks, logs and callbacks around SAM's two passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.frameworks.conftest import Compared
from tests.frameworks.formula import error_of

lightning: Any = pytest.importorskip("lightning")
torchmetrics: Any = pytest.importorskip("torchmetrics")
from sam_kernels.integrations.lightning import is_second_pass  # noqa: E402
from tests.frameworks.lightning_runs import (  # noqa: E402
    BATCHES,
    LR,
    ROWS,
    Module,
    batches,
    loader,
    loss_of,
    manual_trainer,
    net,
    sgd,
    train_by_formula,
    trainer_of,
)

callbacks: Any = lightning.pytorch.callbacks
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
CLOSE = 1e-12


def weights_after_each_step() -> list[nn.Module]:
    """By the formula: the weights after 1, 2, … steps."""
    return [train_by_formula(net(), [[[each]] for each in batches()[:count]]) for count in range(1, BATCHES + 1)]


class Hooked(Module):
    """Writes down what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.calls.append("training_step, second pass" if is_second_pass(self) else "training_step")
        return super().training_step(batch, batch_idx)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self.calls.append("backward")
        super().backward(loss, *args, **kwargs)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.calls.append("on_before_zero_grad")

    def on_before_backward(self, loss: Tensor) -> None:
        self.calls.append("on_before_backward")

    def on_after_backward(self) -> None:
        self.calls.append("on_after_backward")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.calls.append("on_before_optimizer_step")

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("configure_gradient_clipping")
        super().configure_gradient_clipping(*args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append("optimizer_step")
        super().optimizer_step(*args, **kwargs)
        self.calls.append("optimizer_step has ended")


def test_the_order_of_hooks() -> None:
    """That of docs/guides/frameworks.md."""
    module = Hooked()
    trainer_of(accumulate_grad_batches=2, limit_train_batches=2, gradient_clip_val=0.3).fit(module, loader())
    passes = ["on_before_backward", "backward", "training_step, second pass", "backward", "on_after_backward"]
    assert module.calls == [
        *("training_step", "on_before_zero_grad", *passes),
        *(
            "optimizer_step",
            "training_step",
            *passes,
            "on_before_optimizer_step",
            "configure_gradient_clipping",
            "optimizer_step has ended",
        ),
    ]
    assert vars(module).keys().isdisjoint({"backward", "optimizer_step", "clip_gradients", "log", "training_step"})
    assert not is_second_pass(module)
    assert not is_second_pass(Module())
    assert not is_second_pass(net())


def test_logs_are_those_of_the_first_pass() -> None:
    class Logging(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = loss_of(self.net, batch)
            self.log("loss", loss, on_step=True, on_epoch=True)
            self.log_dict({"doubled": 2 * loss, "one": torch.tensor(1.0)}, on_step=False, on_epoch=True)
            self.log("count", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
            if not is_second_pass(self):
                self.accuracy(self.net(batch[0]), batch[1])
                self.seen.update(torch.ones(len(batch[1])))
            self.twice.update(torch.ones(len(batch[1])))
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
            return loss

        def __init__(self) -> None:
            super().__init__()
            self.accuracy = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
            self.seen, self.twice = torchmetrics.SumMetric(), torchmetrics.SumMetric()

    module, trainer = Logging(), trainer_of()
    trainer.fit(module, loader())
    before = [net(), *weights_after_each_step()[:-1]]
    losses = torch.stack([loss_of(model, batch) for model, batch in zip(before, batches(), strict=True)])
    rights = [(model(x).argmax(1) == y).double().mean() for model, (x, y) in zip(before, batches(), strict=True)]
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}  # float32
    assert metrics == {
        "loss": pytest.approx(losses.mean().item(), rel=1e-6),
        "loss_step": pytest.approx(losses[-1].item(), rel=1e-6),
        "loss_epoch": pytest.approx(losses.mean().item(), rel=1e-6),
        "doubled": pytest.approx(2 * losses.mean().item(), rel=1e-6),
        "one": 1.0,
        "count": BATCHES,
        "accuracy": pytest.approx(torch.stack(rights).mean().item(), rel=1e-6),
    }
    assert module.seen.compute() == BATCHES * ROWS
    assert module.twice.compute() == 2 * BATCHES * ROWS  # what the page warns of


def test_validation_sees_the_weights_of_the_step() -> None:
    class Validated(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append([param.detach().clone() for param in self.net.parameters()])
            self.log("val_loss", loss_of(self.net, batch))

    seen: list[list[Tensor]] = []
    trainer = trainer_of(val_check_interval=2, num_sanity_val_steps=0, limit_val_batches=1)
    trainer.fit(Validated(), loader(), loader())
    expected = weights_after_each_step()[1::2]
    assert len(seen) == len(expected) == 3
    for weights, model in zip(seen, expected, strict=True):
        assert all(torch.allclose(*pair, rtol=1e-12) for pair in zip(weights, model.parameters(), strict=True))
    last = loss_of(expected[-1], batches()[0]).item()
    assert trainer.callback_metrics["val_loss"].item() == pytest.approx(last, rel=1e-6)


def average(models: list[nn.Module]) -> nn.Module:
    result = net()
    with torch.no_grad():
        for param, *others in zip(result.parameters(), *(model.parameters() for model in models), strict=True):
            param.copy_(torch.stack(others).mean(0))
    return result


def test_weight_averaging_sees_the_weights_of_the_step(compared: Compared) -> None:
    module = Module()
    trainer_of(callbacks=[callbacks.WeightAveraging()]).fit(module, loader())  # the averages become the module's at the end
    error = error_of(module.net, average(weights_after_each_step()))
    compared("lightning", "SAM", "WeightAveraging: mean of the weights of 6 steps", error, CLOSE)


def test_an_exponential_average_sees_the_weights_of_the_step(compared: Compared) -> None:
    module = Module()
    trainer_of(callbacks=[callbacks.EMAWeightAveraging(decay=0.5)]).fit(module, loader())
    models = weights_after_each_step()
    expected = models[0]  # torch's average begins with the first
    for model in models[1:]:
        with torch.no_grad():
            for param, new in zip(expected.parameters(), model.parameters(), strict=True):
                param.mul_(0.5).add_(new, alpha=0.5)
    compared("lightning", "SAM", "EMAWeightAveraging: after 6 steps", error_of(module.net, expected), CLOSE)


def test_stochastic_weight_averaging(compared: Compared) -> None:
    """The mean of the weights at the starts of epochs 2 to 4."""
    module = Module()
    swa = callbacks.StochasticWeightAveraging(swa_lrs=LR, swa_epoch_start=2, annealing_epochs=1)
    trainer_of(max_epochs=4, callbacks=[swa]).fit(module, loader())
    ends = [train_by_formula(net(), [[[each]] for each in batches() * count]) for count in (1, 2, 3)]
    error = error_of(module.net, average(ends))
    compared("lightning", "SAM", "StochasticWeightAveraging: mean of 3 epochs", error, CLOSE)


def test_the_learning_rate_is_monitored(tmp_path: Path) -> None:
    def scheduled(module: Any) -> Any:
        optimizer = sgd(module)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Logger(lightning.pytorch.loggers.CSVLogger):  # type: ignore[misc]
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            logged.append((step, dict(metrics)))

    logged: list[tuple[int, dict[str, float]]] = []
    monitor = callbacks.LearningRateMonitor(logging_interval="step", log_momentum=True)
    trainer_of(logger=Logger(tmp_path), log_every_n_steps=1, callbacks=[monitor]).fit(Module(scheduled), loader())
    rates = [metrics["lr-SAM"] for _, metrics in logged if "lr-SAM" in metrics]
    assert rates == [LR * 0.5 ** (i // 2) for i in range(BATCHES)]
    assert {metrics["lr-SAM-momentum"] for _, metrics in logged if "lr-SAM-momentum" in metrics} == {0.9}


def test_checkpoints_hold_the_weights_of_the_step(tmp_path: Path) -> None:
    checkpoint = callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    trainer_of(callbacks=[checkpoint], enable_checkpointing=True, default_root_dir=tmp_path).fit(Module(), loader())
    for count, model in enumerate(weights_after_each_step(), 1):
        if count % 2 == 0:
            saved = torch.load(tmp_path / f"step={count}.ckpt", weights_only=False)
            for name, value in model.state_dict().items():
                assert torch.allclose(saved["state_dict"][f"net.{name}"], value, rtol=1e-12)
            assert saved["optimizer_states"][0]["param_groups"][0]["sam_step"] == count


def test_an_interrupted_fit_gives_the_module_back() -> None:
    class Failing(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 3 and is_second_pass(self):
                raise ValueError("of the user's")
            return super().training_step(batch, batch_idx)

    module, trainer = Failing(), trainer_of()
    with pytest.raises(ValueError, match="of the user's"):
        trainer.fit(module, loader())
    assert vars(module).keys().isdisjoint({"backward", "optimizer_step", "clip_gradients", "log"})
    assert "training_step" not in vars(trainer.strategy)
    for param, right in zip(module.net.parameters(), weights_after_each_step()[2].parameters(), strict=True):
        assert torch.allclose(param, right, rtol=1e-12)  # not perturbed
    assert not is_second_pass(module)


def test_a_module_is_fitted_again_and_without_the_callback(compared: Compared) -> None:
    module = Module()
    for _ in range(2):
        trainer_of().fit(module, loader())
    twice = train_by_formula(train_by_formula(net(), [[[each]] for each in batches()]), [[[each]] for each in batches()])
    compared("lightning", "SAM", "automatic: weights after two fits of 6 steps", error_of(module.net, twice), CLOSE)
    plain = Module(lambda module: torch.optim.SGD(module.parameters(), lr=LR))
    plain.net.load_state_dict(net().state_dict())
    manual_trainer().fit(plain, loader())
    expected = net()
    base = torch.optim.SGD(expected.parameters(), lr=LR)
    for batch in batches():
        base.zero_grad()
        loss_of(expected, batch).backward()
        base.step()
    assert all(map(torch.equal, plain.net.parameters(), expected.parameters()))
