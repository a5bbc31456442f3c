"""SAM inside of PyTorch Lightning and Fabric, against the formula in float64."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sam_kernels import RWSAM, SAM
from tests.frameworks.conftest import Compared
from tests.frameworks.formula import RHO, SAM_OR_M, by_formula, error_of

lightning: Any = pytest.importorskip("lightning")
integration: Any = pytest.importorskip("sam_kernels.integrations.lightning")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

LR, BATCHES = 0.1, 6
CLOSE = 1e-12  # float64, five steps


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(4, 5, dtype=torch.float64, generator=generator) for _ in range(BATCHES)]
    return [(x, torch.randint(0, 3, (4,), generator=generator)) for x in inputs]


def loss_of(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Module(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, make: Any = None) -> None:
        super().__init__()
        self.net, self.hooks, self._make = net(), 0, make

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = loss_of(self.net, batch)
        self.log("loss", loss, on_step=True)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.hooks += 1

    def configure_optimizers(self) -> Any:
        if self._make is not None:
            return self._make(self)
        optimizer = SAM(self.parameters(), torch.optim.SGD, lr=LR, momentum=0.9, rho=RHO)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)}


def trainer_of(**options: Any) -> Any:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(**{"max_epochs": 1, "accelerator": "cpu", "callbacks": [integration.SAMCallback()], **quiet, **options})


def loader() -> Any:
    return torch.utils.data.DataLoader(batches(), batch_size=None)  # type: ignore[arg-type]  # a list is a dataset


def expected_of(accumulation: int, clip: float) -> nn.Module:
    expected = net()
    steps = [batches()[i : i + accumulation] for i in range(0, BATCHES, accumulation)]
    base = torch.optim.SGD(expected.parameters(), lr=LR, momentum=0.9)
    by_formula(expected, base, steps, lambda model, batch, _: loss_of(model, batch) / accumulation, whole=False, clip=clip)
    return expected


@pytest.mark.parametrize(("accumulation", "clip"), [(1, 0.0), (1, 0.3), (3, 0.3)])
def test_automatic_optimization(accumulation: int, clip: float, compared: Compared) -> None:
    module = Module()
    trainer = trainer_of(accumulate_grad_batches=accumulation, gradient_clip_val=clip or None)
    trainer.fit(module, loader())
    error = error_of(module.net, expected_of(accumulation, clip))
    compared("lightning", SAM_OR_M[accumulation], f"automatic: weights after {BATCHES // accumulation} steps, clip {clip}", error, CLOSE)
    assert module.hooks == BATCHES // accumulation
    assert "backward" not in vars(module)
    last = loss_of(net_before_last(accumulation, clip), batches()[-1]).item()
    assert trainer.callback_metrics["loss"].item() == pytest.approx(last, rel=1e-5)  # at the weights; Lightning keeps it in float32


def net_before_last(accumulation: int, clip: float) -> nn.Module:
    model = net()
    steps = [batches()[i : i + accumulation] for i in range(0, BATCHES - accumulation, accumulation)]
    base = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    by_formula(model, base, steps, lambda each, batch, _: loss_of(each, batch) / accumulation, whole=False, clip=clip)
    return model


def test_a_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = Module(), Module(), Module()
    trainer_of(max_epochs=2).fit(whole, loader())
    trainer = trainer_of()
    trainer.fit(first, loader())
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    trainer_of(max_epochs=2).fit(second, loader(), ckpt_path=tmp_path / "run.ckpt", weights_only=False)
    for param, right in zip(second.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(param, right)


def test_manual_optimization(compared: Compared) -> None:
    class Manual(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                loss = loss_of(self.net, batch)
                self.manual_backward(loss)
                return loss

            sam = integration.sam_of(optimizer)
            sam.backward(closure)
            sam.step()
            sam.zero_grad()

    module = Manual()
    trainer_of(callbacks=[]).fit(module, loader())
    compared("lightning", "SAM", f"manual: weights after {BATCHES} steps", error_of(module.net, expected_of(1, 0.0)), CLOSE)


def test_fabric(compared: Compared) -> None:
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = net()
    optimizer: Any = SAM(model.parameters(), torch.optim.SGD, lr=LR, momentum=0.9, rho=RHO)
    model, optimizer = fabric.setup(model, optimizer)
    sam = integration.sam_of(optimizer)
    for i, batch in enumerate(batches()):
        for step in (sam.first_step, sam.second_step) if i % 2 else ():
            fabric.backward(loss_of(model, batch))
            step(zero_grad=True)
        if i % 2 == 0:

            def closure(batch: Any = batch) -> Tensor:
                loss = loss_of(model, batch)
                fabric.backward(loss)
                return loss

            sam.backward(closure)
            optimizer.step()
            optimizer.zero_grad()
    compared("lightning", "SAM", f"Fabric: weights after {BATCHES} steps", error_of(model.module, expected_of(1, 0.0)), CLOSE)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda module: torch.optim.SGD(module.parameters(), lr=LR), "must return one optimizer of SAM, got SGD"),
        (lambda module: RWSAM(module.net, torch.optim.SGD, lr=LR, beta=1.0), "RWSAM needs losses of samples"),
    ],
    ids=["another", "rwsam"],
)
def test_other_optimizers_are_refused(make: Any, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        trainer_of().fit(Module(make), loader())
    with pytest.raises(TypeError, match="SGD holds no optimizer of SAM"):
        integration.sam_of(torch.optim.SGD(net().parameters(), lr=LR))
