"""Perturbations that are random and never stored."""

from __future__ import annotations

from sam_kernels import _validate
from sam_kernels._grouping import run
from sam_kernels.functional._common import Tensors, check_lists, checked
from sam_kernels.functional._library import operation
from sam_kernels.functional._masters import check_backups
from sam_kernels.operations import Number, RandomPerturb

__all__ = ["random_perturb_"]

DISTRIBUTIONS = ("rademacher", "normal")


@operation(written=RandomPerturb.written, scheduled=("seed",))
def random_perturb_(
    params: Tensors,  # n tensors
    old_params: Tensors,  # n tensors
    *,
    seed: int,
    scale: Number,
    distribution: str,
    from_old: bool = False,
) -> None:
    """old_p <- p, then p <- p + scale z. ``from_old``: p <- old_p + scale z, without saving again: from a backup, or from the float32
    master of a 16-bit p. (Saving a 16-bit p in a wider old_p is refused.)

    ``distribution``: "rademacher" (z = -1 or 1, each with probability 1/2) or "normal". z is float32, is never stored, and is a function of
    ``seed`` (in [0, 2^64)), the row's index in the list and the element's position in the row: Philox4x32-10 (Salmon et al., SC 2011). The
    same on every backend and for any number of threads: signs bit for bit, normals within 1e-6. The position is that in memory, where p
    and old_p are dense and in one memory order, and that in C order otherwise.

    In detail: the key is (seed & 0xffffffff, seed >> 32). Element i takes word (i % 1024) // 256 of the counter
    (c & 0xffffffff, c >> 32, row, 0) with c = (i // 1024) * 256 + i % 256. A rademacher is -1 where the word's bit 31 is set. Normals come
    from words a, b = (0, 1) and (2, 3) of a counter, for the elements of these words (Box and Muller):
    r cos(2 pi u), r sin(2 pi u) with u = (b >> 8) 2^-24 and r = sqrt(-2 log(((a >> 8) + 1) 2^-24)).
    Reads p; writes old_p, p: 3 N s bytes (``from_old``: reads old_p; writes p: 2 N s, from masters to 16-bit p 6 N).
    """
    seed = _validate.check_seed(RandomPerturb.name, "seed", seed)
    _validate.check_choice(RandomPerturb.name, "distribution", distribution, DISTRIBUTIONS)
    op = checked(RandomPerturb(seed=seed, scale=scale, distribution=distribution, from_old=from_old))
    lists: dict[str, Tensors | None] = {"params": params, "old_params": old_params}
    check_lists(RandomPerturb, lists)
    if not from_old:
        check_backups(RandomPerturb.name, params, old_params)
    run(op, lists)
