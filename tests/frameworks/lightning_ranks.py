"""Lightning and Fabric on two processes: ``torchrun --nproc-per-node 2 -m tests.frameworks.lightning_ranks FOLDER``.

Every function of ``SCENARIOS`` trains on this rank's batches and returns what ``test_lightning_ddp.py`` compares; rank r writes r.pt.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import tests.frameworks.conftest  # noqa: F401  # defines torchvision's operators, before lightning imports it

# isort: split
import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard

from sam_kernels.integrations.lightning import SAMCallback, sam_of
from tests.frameworks.lightning_runs import Batch, Manual, Module, batches, loader, loss_of, manual_trainer, net, sgd, trainer_of
from tests.frameworks.test_lightning_precision import SCALE, mixed, scaler

RANKS = 2
Result = dict[str, Any]


def batches_of(rank: int, dtype: torch.dtype = torch.float64) -> list[Batch]:
    """Six of each rank."""
    return batches(6 * RANKS, dtype)[rank::RANKS]


def averaging(module: Any, **options: Any) -> Any:
    return sgd(module, model=module.trainer.model, **options)


def locally(module: Any) -> Any:
    return averaging(module, local_ascent=True)


def all_reduces(make: Callable[[Any], Any] = sgd, **options: Any) -> Result:
    """How many all-reduces of gradients a fit makes. The module's gradients are one bucket."""
    counts: list[int] = []

    def counted(module: Any) -> Any:
        def hook(_, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations with its own classes
            counts.append(1)
            return allreduce_hook(None, bucket)  # type: ignore[arg-type]  # of the default group

        module.trainer.model.register_comm_hook(None, hook)
        return make(module)

    automatic(counted, **options)
    return {"count": len(counts)}


def result_of(model: nn.Module, **more: Any) -> Result:
    return {"weights": [param.detach().clone() for param in model.parameters()], **more}


def automatic(
    make: Callable[[Any], Any] = sgd,
    *,
    strategy: Any = "ddp",
    micro_batches: int = 1,
    data: Any = None,
    dtype: Any = torch.float64,
    **options: Any,
) -> Result:
    """A fit of six batches of each rank."""
    module = Module(make, net(dtype))
    trainer = trainer_of(devices=RANKS, strategy=strategy, use_distributed_sampler=False, **options)
    trainer.callbacks[0].micro_batches = SAMCallback(micro_batches).micro_batches
    rank = int(os.environ["RANK"])
    trainer.fit(module, loader(batches_of(rank, dtype) if data is None else data))
    sam = sam_of(trainer.optimizers[0])
    scale = trainer.precision_plugin.scaler.get_scale() / SCALE if getattr(trainer.precision_plugin, "scaler", None) else None
    return result_of(module.net, steps=trainer.global_step, skipped=sam.skipped_steps, scale=scale)


def refused(**options: Any) -> Result:
    try:
        automatic(**options)
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": "none"}


def with_an_overflow(dtype: torch.dtype, **options: Any) -> Result:
    """One batch, of rank 1 alone, whose gradient is not finite."""
    rank = int(os.environ["RANK"])
    data = batches_of(rank, dtype)
    if rank == 1:
        data[2] = (data[2][0] * (1e6 if dtype is torch.float32 else torch.inf), data[2][1])
    return automatic(data=data, dtype=dtype, **options)


def resumed(folder: Path) -> Result:
    """Two epochs, and one after another with a checkpoint in between. The learning rate follows a schedule of steps."""

    def scheduled(module: Any) -> Any:
        optimizer = sgd(module)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    data = loader(batches_of(int(os.environ["RANK"])))
    options = {"devices": RANKS, "strategy": "ddp", "use_distributed_sampler": False, "accumulate_grad_batches": 2}
    whole, first, second = Module(scheduled), Module(scheduled), Module(scheduled)
    trainer_of(max_epochs=2, **options).fit(whole, data)
    trainer = trainer_of(**options)
    trainer.fit(first, data)
    trainer.save_checkpoint(folder / "run.ckpt")
    trainer_of(max_epochs=2, **options).fit(second, data, ckpt_path=folder / "run.ckpt", weights_only=False)
    return result_of(second.net, whole=[param.detach().clone() for param in whole.net.parameters()])


def sharded() -> Result:
    """ModelParallelStrategy, whose ``configure_model`` shards the module."""

    class Sharded(Module):
        def configure_model(self) -> None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    module = Sharded()
    trainer = trainer_of(devices=RANKS, strategy=ModelParallelStrategy(RANKS, 1), use_distributed_sampler=False, accumulate_grad_batches=3)
    trainer.fit(module, loader(batches_of(int(os.environ["RANK"]))))
    return {"weights": [param.full_tensor() for param in module.net.parameters()], "steps": trainer.global_step}


# --- manual optimization ---


def by_backward(module: Any, optimizer: Any, batch: Any) -> None:
    optimizer.zero_grad()
    optimizer.backward(lambda: module.closure(*batch))
    optimizer.step()


def by_two_steps(module: Any, optimizer: Any, batch: Any) -> None:
    module.closure(*batch)
    optimizer.first_step(zero_grad=True)
    module.closure(*batch)
    optimizer.second_step(zero_grad=True)


def by_micro_batches(module: Any, optimizer: Any, batch: Any) -> None:
    def closure(*piece: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = module.closure(*piece)
        return loss

    optimizer.step(closure, batch=batch, micro_batches=2)


def by_accumulation(module: Any, optimizer: Any, batch: Any) -> None:
    """``toggle_model(sync_grad=False)``: DDP's no_sync around the calls that are not the last of a step."""
    module.count = count = getattr(module, "count", 0) + 1
    with optimizer.toggle_model(sync_grad=count % 3 == 0):
        optimizer.backward(lambda: module.closure(*batch, share=1 / 3))
    if count % 3 == 0:
        optimizer.step()
        optimizer.zero_grad()


def manual(step: Callable[..., None], make: Callable[[Any], Any] = sgd) -> Result:
    module = Manual(step, make)
    trainer = manual_trainer(devices=RANKS, strategy="ddp", use_distributed_sampler=False)
    trainer.fit(module, loader(batches_of(int(os.environ["RANK"]))))
    return result_of(module.net, steps=trainer.global_step)


# --- Fabric ---


def fabric(accumulation: int = 1, *, local_ascent: bool = False, without_sync: bool = False, two_steps: bool = False) -> Result:
    """``without_sync``: ``fabric.no_backward_sync`` around the calls that are not the last of a step."""
    runner = lightning.Fabric(accelerator="cpu", devices=RANKS, strategy="ddp")
    runner.launch()
    plain = net()
    model = runner.setup(plain)
    optimizer: Any = sgd(plain, model=model, local_ascent=local_ascent)
    optimizer = runner.setup_optimizers(optimizer)
    for i, batch in enumerate(batches_of(runner.global_rank), 1):

        def closure(batch: Batch = batch) -> Tensor:
            loss = loss_of(model, batch) / accumulation
            runner.backward(loss)
            return loss

        if two_steps:
            closure()
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step(zero_grad=True)
            continue
        with runner.no_backward_sync(model, enabled=without_sync) if i % accumulation else nullcontext():
            optimizer.backward(closure)
        if i % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    return result_of(plain, steps=optimizer.param_groups[0]["sam_step"])


SCENARIOS: dict[str, Callable[[], Result]] = {
    **{
        f"accumulation {k}, clip {clip}": partial(automatic, accumulate_grad_batches=k, gradient_clip_val=clip or None)
        for k in (1, 3)
        for clip in (0.0, 0.3)
    },
    "agreeing": partial(automatic, averaging, accumulate_grad_batches=3),
    "local, accumulation 1": partial(automatic, locally),
    "local, accumulation 3": partial(automatic, locally, accumulate_grad_batches=3),
    "micro-batches": partial(automatic, micro_batches=2, accumulate_grad_batches=3),
    "local, micro-batches": partial(automatic, locally, micro_batches=2, accumulate_grad_batches=3),
    "bucket views": lambda: automatic(strategy=DDPStrategy(gradient_as_bucket_view=True), accumulate_grad_batches=3),
    "unused parameters": partial(automatic, strategy="ddp_find_unused_parameters_true", accumulate_grad_batches=3),
    "static graph": lambda: automatic(strategy=DDPStrategy(static_graph=True)),
    "static graph, accumulation": lambda: refused(strategy=DDPStrategy(static_graph=True), accumulate_grad_batches=3),
    "skipped, float64": partial(with_an_overflow, torch.float64, accumulate_grad_batches=2),
    "skipped, 16-mixed": lambda: with_an_overflow(torch.float32, plugins=[mixed("16-mixed", scaler())], gradient_clip_val=0.1),
    "all-reduces": partial(all_reduces, accumulate_grad_batches=3),
    "all-reduces, micro-batches": partial(all_reduces, accumulate_grad_batches=3, micro_batches=2),
    "all-reduces, local": partial(all_reduces, locally, accumulate_grad_batches=3),
    "sharded": sharded,
    "manual, backward": partial(manual, by_backward),
    "manual, first_step, second_step": partial(manual, by_two_steps),
    "manual, micro-batches": partial(manual, by_micro_batches),
    "manual, local": partial(manual, by_backward, locally),
    "manual, local, accumulation": partial(manual, by_accumulation, locally),
    "Fabric": fabric,
    "Fabric, first_step, second_step": partial(fabric, two_steps=True),
    "Fabric, accumulation 3": partial(fabric, 3),
    "Fabric, local, accumulation 3": partial(fabric, 3, local_ascent=True, without_sync=True),
    "Fabric, no_backward_sync": partial(fabric, 3, without_sync=True),
}


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = {"resumed": resumed(folder)}
    for name, scenario in SCENARIOS.items():
        try:
            results[name] = scenario()
        except Exception as error:
            raise RuntimeError(f"scenario {name!r}") from error
    torch.save(results, folder / f"{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
