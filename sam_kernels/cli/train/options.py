"""Checks of ``train``'s options beyond their click types. Each failure is a usage error that names the option."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence

import click

from sam_kernels.cli.train.optimizers import BASES, BY_DEFAULT, MEMBERS, PEER, Settings, options_of
from sam_kernels.cli.train.plan import Plan

__all__ = ["check_extra", "finite", "lambd", "micro_batches", "optimizer_names", "with_peer"]


def finite(_ctx: click.Context | None, _param: click.Parameter | None, value: float | None) -> float | None:
    """Option callback: FloatRange lets nan and inf through."""
    if value is not None and not math.isfinite(value):
        raise click.BadParameter(f"{value} is not finite.")
    return value


def lambd(ctx: click.Context, param: click.Parameter, value: str) -> float | str:
    """Option callback: a number in [0, 1] or the name of a schedule."""
    if value in ("1/t", "1-1/t"):
        return value
    number: float = click.FloatRange(0, 1)(value, param, ctx)
    finite(ctx, param, number)
    return number


def optimizer_names(text: str | None, base: str) -> list[str]:
    """From a comma-separated list. The plain optimizer goes by its own name, so that no table calls AdamW "sgd"."""
    known = [base, *MEMBERS]
    names = [base, *BY_DEFAULT] if text is None else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        kind, colon, number = name.partition(":")
        member = MEMBERS.get(kind)
        if kind not in known or (colon and (member is None or member.number is None)):
            other = f" ({name} needs --base {name})" if name in BASES else ""
            raise click.BadParameter(f"unknown optimizer {name!r}{other}; the names are {', '.join(known)}.", param_hint="'--optimizers'")
        if member is not None and base not in member.bases:
            raise click.BadParameter(f"{name} needs --base {' or '.join(member.bases)}.", param_hint="'--optimizers'")
        if member is not None and member.number is not None and colon:
            try:
                finite(None, None, member.number.convert(number, None, None))
            except click.BadParameter as error:
                raise click.BadParameter(f"{name!r}: {error.message}", param_hint="'--optimizers'") from error
    if not names:
        raise click.BadParameter(f"no optimizer given; the names are {', '.join(known)}.", param_hint="'--optimizers'")
    return list(dict.fromkeys(names))


def with_peer(names: Sequence[str]) -> list[str]:
    """The names with the peer of ``sam`` behind it."""
    if "sam" not in names:
        raise click.BadParameter("the loop is compared with sam, which --optimizers leaves out.", param_hint="'--peer'")
    return [each for name in names for each in ((name, PEER) if name == "sam" else (name,))]


def micro_batches(names: Sequence[str], settings: Settings, plan: Plan) -> None:
    """Micro-batches of one size, which together are the batch; more than one sample where BatchNorm has to normalise them."""
    for name in names:
        options = options_of(name, settings)
        for key, option in (
            ("micro_batch_size", "--optimizers" if ":" in name else "--micro-batch-size"),
            ("micro_batch", "--micro-batch"),
        ):
            size = options.get(key, plan.batch_size)
            if plan.batch_size % size:
                raise click.BadParameter(
                    f"a batch of {plan.batch_size} cannot be cut into micro-batches of {size}.", param_hint=f"'{option}'"
                )
            if key == "micro_batch_size" and size == 1 and plan.normalization == "batch":
                raise click.BadParameter("BatchNorm cannot normalise one sample; take --normalization group.", param_hint=f"'{option}'")


def check_extra() -> None:
    """The packages of the ``train`` extra, all at once: better than to fail on the plot after the training."""
    missing = [name for name in ("numpy", "scipy", "mlxtend", "sklearn", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(f"train needs {', '.join(missing)}: pip install 'sam_kernels[train]'")
