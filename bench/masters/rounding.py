"""What is left of a small perturbation once it is rounded to bfloat16: to nearest, and stochastically."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.providers import RHO
from sam_kernels import functional as F

__all__ = ["measure"]

SIZE = 1024
DRAWS = (1, 16, 64)


def _row(what: str, found: Tensor, wanted: Tensor) -> dict[str, Any]:
    found, wanted = found.to(torch.float64), wanted.to(torch.float64)
    product = (found * wanted).sum()
    return {
        "rounding": what,
        "cosine": (product / (found.norm() * wanted.norm())).item(),
        "projection": (product / wanted.square().sum()).item(),
        "moved": (found != 0).to(torch.float64).mean().item(),
    }


def measure() -> dict[str, Any]:
    """Of d, what the weights of ``nn.Linear(1024, 1024)`` move by, and e = rho g / ‖g‖ with random g: the cosine, the projection
    ⟨d, e⟩ / ⟨e, e⟩, and the share of weights that move. "mean of 16": of d over as many draws."""
    torch.manual_seed(0)
    params = nn.Linear(SIZE, SIZE, bias=False).weight.detach().to(torch.bfloat16)
    grads = torch.randn(SIZE, SIZE).to(torch.bfloat16)
    norm = grads.to(torch.float32).norm()
    wanted = RHO * grads.to(torch.float64) / norm

    def moved(seed: int | None) -> Tensor:
        perturbed, backup = params.clone(), torch.empty_like(params)
        F.perturb_([perturbed], [grads], [backup], norm, rho=RHO, rounding_seed=seed)
        return perturbed.to(torch.float64) - params.to(torch.float64)

    rows = [_row("nearest", moved(None), wanted)]
    total = torch.zeros_like(wanted)
    for seed in range(max(DRAWS)):
        total += moved(seed)
        if seed + 1 in DRAWS:
            what = "stochastic" if seed == 0 else f"stochastic, mean of {seed + 1}"
            rows.append(_row(what, total / (seed + 1), wanted))
    return {"layer": f"nn.Linear({SIZE}, {SIZE})", "rho": RHO, "rows": rows}
