"""Train a small GPT with SAM over FSDP2's shards, in bfloat16, with checkpoints that any number of ranks resumes.

    torchrun --nproc_per_node 2 examples/fsdp2_gpt.py --steps 40 --checkpoints runs/gpt
    torchrun --nproc_per_node 2 examples/fsdp2_gpt.py --steps 60 --checkpoints runs/gpt   # resumes at step 40

The text is Python's own: the help topics that ``help("if")`` prints. On a machine without a GPU the ranks use gloo.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import click
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import sam_kernels

CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 64, 128, 4, 3, 16  # BATCH: sequences of a rank
VOCABULARY = 256  # bytes


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, WIDTH)
        q, k, v = (each.unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in self.qkv(self.norm_1(x)).chunk(3, dim=-1))
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:  # (B, T) int64 -> ()
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


def text() -> Tensor:  # (bytes,) int64
    joined = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(joined.encode("utf-8")), dtype=torch.uint8).to(torch.int64)


def batch_at(data: Tensor, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The sequences of this rank in one step, by the step alone, so that a resumed run sees the same ones."""
    generator = torch.Generator().manual_seed(step * distributed.get_world_size() + distributed.get_rank())
    starts = torch.randint(len(data) - CONTEXT - 1, (BATCH, 1), generator=generator)
    rows = data[starts + torch.arange(CONTEXT + 1)].to(device)
    return rows[:, :-1], rows[:, 1:]


def last_complete(checkpoints: Path) -> Path | None:
    """The newest folder whose save has ended: ``.metadata`` is written last. Rank 0 looks, so that all ranks load the same one."""
    steps = {int(path.parent.name.removeprefix("step-")): path.parent for path in checkpoints.glob("step-*/.metadata")}
    found = [steps[max(steps)] if steps else None]
    distributed.broadcast_object_list(found, src=0)
    return found[0]


@click.command()
@click.option("--steps", default=40, show_default=True, help="Step to train up to.")
@click.option("--rho", default=0.05, show_default=True, help="Radius of the perturbation; 0 trains with AdamW alone.")
@click.option("--checkpoints", type=click.Path(path_type=Path), help="Folder of checkpoints: the last complete one is resumed.")
@click.option("--every", default=20, show_default=True, help="Steps between two checkpoints; the last step is saved too.")
def main(steps: int, rho: float, checkpoints: Path | None, every: int) -> None:
    """Train a small GPT with SAM around AdamW."""
    on_gpu = torch.cuda.is_available()
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = GPT().to(device)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = sam_kernels.SAM(model.parameters(), torch.optim.AdamW, rho=rho, lr=3e-3, weight_decay=0.1, max_grad_norm=1.0)

    state: dict[str, Any] = {"step": 0}
    if checkpoints is not None and (complete := last_complete(checkpoints)):
        state["model"], state["optimizer"] = get_state_dict(model, optimizer)
        dcp.load(state, checkpoint_id=complete)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    data, start = text(), state["step"]
    began = time.perf_counter()
    for step in range(start, steps):
        inputs, targets = batch_at(data, step, device)

        def closure(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(inputs, targets)
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        if distributed.get_rank() == 0 and (step % 10 == 0 or step == steps - 1):
            print(f"step {step}: loss {loss.item():.6f}", flush=True)
        if checkpoints is not None and ((step + 1) % every == 0 or step == steps - 1):
            state["step"] = step + 1
            state["model"], state["optimizer"] = get_state_dict(model, optimizer)
            dcp.save(state, checkpoint_id=checkpoints / f"step-{step + 1:06}")
    if distributed.get_rank() == 0:
        seconds = time.perf_counter() - began
        ranks, skipped = distributed.get_world_size(), optimizer.skipped_steps
        print(f"{max(steps - start, 0)} steps in {seconds:.1f} s on {ranks} ranks, {skipped} skipped", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
