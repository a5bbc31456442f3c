"""What each implementation is expected to do in each row. README's table and the one of docs/peers.md are made of it.

Run as ``python -m tests.peers.table`` it prints both; with ``--write`` it replaces what stands between the pages' markers.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BEGIN", "END", "MARKS", "PAGE", "README", "ROWS", "VERSIONS", "Mark", "Row", "markdown", "page", "section"]

ROOT = Path(__file__).parents[2]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "peers.md"
BEGIN, END = "<!-- peers:begin -->", "<!-- peers:end -->"

VERSIONS = {"sam_kernels": "this one", "davda54/sam": "3c3afdb", "pytorch_optimizer": "4.1.0", "Composer": "0.32.1"}


@dataclass(frozen=True)
class Row:
    title: str  # in README; empty: on the page alone
    requirement: str  # on the page


@dataclass(frozen=True)
class Mark:
    """``words``: what the observation of a row that does not hold must contain."""

    symbol: str  # ✓, ✗ or –
    observed: str
    words: tuple[str, ...] = ()


ROWS = {
    "mixed precision": Row("Mixed precision: an inf gradient skips the step", "`GradScaler`: an inf in either pass skips the step"),
    "NaN": Row("A NaN gradient changes nothing", "A NaN in either pass leaves weights and state as they were"),
    "exception": Row(
        "An exception in the second pass restores the weights",
        "An exception in the second pass (out of memory, Ctrl-C) restores the weights",
    ),
    "resuming": Row("Exact resume from `optimizer.state_dict()`", "Resuming from a checkpoint is exact, state of the base included"),
    "accumulation": Row("Gradient accumulation", "Gradient accumulation"),
    "DDP": Row("DDP: the step of one process", "DDP: the step of one process on the whole batch"),
    "FSDP2": Row("FSDP2: the step of one process", "FSDP2: the step of one process on the whole batch"),
    "CUDA graph": Row("CUDA-graph capture (–: not decided without a GPU)", "CUDA-graph capture"),
    "sample norms": Row("Gradient norms per sample", "Gradient norms per sample"),
    "batch norm": Row("", "BatchNorm statistics are updated once a step"),
}

_NAN = "after a NaN in either pass the weights are NaN"
_PERTURBED = "the weights stay perturbed, by exactly ρ"
_NO_NORMS = "no function returns them, and no tensor that the optimizer holds after a step has them"
_WAYS = (
    "of three ways none holds: two make the weights NaN after an inf in the second pass, one (`scaler.step` of each half) leaves them "
    "perturbed; steps without an inf are right in all three"
)
_WAYS_WORDS = (
    "unscale_ before each half: inf in pass 2: the weights become NaN",
    "step of each half: inf in pass 2: the weights have moved by 0.100, still perturbed",
    "step(optimizer, closure): inf in pass 2: the weights become NaN",
)
_NAN_WORDS = ("NaN in pass 1: the weights become NaN", "NaN in pass 2: the weights become NaN")
_PERTURBED_WORDS = (
    "OutOfMemoryError in pass 2: the weights have moved by 0.100, still perturbed",
    "KeyboardInterrupt in pass 2: the weights have moved by 0.100, still perturbed",
)
_NO_NORMS_WORDS = ("no function returns them",)

MARKS: dict[str, dict[str, Mark]] = {
    "mixed precision": {
        "sam_kernels": Mark("✓", "the step is skipped, the scale halved"),
        "davda54/sam": Mark("✗", _WAYS, _WAYS_WORDS),
        "pytorch_optimizer": Mark("✗", _WAYS, _WAYS_WORDS),
        "Composer": Mark("✓", "the step is skipped, the scale halved; the weights are restored to a rounding"),
    },
    "NaN": {
        "sam_kernels": Mark("✓", "the step is skipped, no bit changes"),
        "davda54/sam": Mark("✗", _NAN, _NAN_WORDS),
        "pytorch_optimizer": Mark("✗", _NAN, _NAN_WORDS),
        "Composer": Mark("✗", f"{_NAN}, without a scaler", _NAN_WORDS),
    },
    "exception": {
        "sam_kernels": Mark("✓", "the weights have their bits again"),
        "davda54/sam": Mark("✗", _PERTURBED, _PERTURBED_WORDS),
        "pytorch_optimizer": Mark("✗", _PERTURBED, _PERTURBED_WORDS),
        "Composer": Mark("✗", _PERTURBED, _PERTURBED_WORDS),
    },
    "resuming": {
        "sam_kernels": Mark("✓", "the bits of the uninterrupted run, with SGD and AdamW"),
        "davda54/sam": Mark(
            "✗",
            "the momentum is lost: `optimizer.state_dict()` has no state of the base. Exact if `optimizer.base_optimizer.state_dict()` is "
            "saved and loaded too, which its README does not mention",
            ("optimizer.state_dict: the state of SGD is lost",),
        ),
        "pytorch_optimizer": Mark("✓", "the bits of the uninterrupted run, with SGD and AdamW"),
        "Composer": Mark(
            "✗",
            "loading with the functions that its trainer calls raises (`step` wants a closure), as its own warning says; "
            "`optimizer.state_dict()` loses the momentum",
            ("AssertionError: Sharpness Aware Minimization requires closure", "optimizer.state_dict: the state of SGD is lost"),
        ),
    },
    "accumulation": {
        "sam_kernels": Mark("✓", "a closure that goes through the micro-batches makes the step of the undivided batch"),
        "davda54/sam": Mark("✓", "a loop over the micro-batches in both passes makes the step of the undivided batch"),
        "pytorch_optimizer": Mark("✓", "a loop over the micro-batches in both passes makes the step of the undivided batch"),
        "Composer": Mark("✓", "a closure that goes through the micro-batches, as its trainer's does, makes that step"),
    },
    "DDP": {
        "sam_kernels": Mark("✓", "the step of one process; replicas have equal bits"),
        "davda54/sam": Mark("✓", "the step of one process, without the `no_sync` of its README, which makes it m-SAM"),
        "pytorch_optimizer": Mark("✓", "the step of one process; replicas have equal bits"),
        "Composer": Mark(
            "✗",
            "by design the first pass is not synchronised, and no option changes it: a step of m-SAM. Each rank restores its weights by "
            "subtracting its own perturbation, so the replicas' last bits drift apart",
            ("every rank perturbs along its own gradient (m-SAM)", "the weights of the ranks are", "apart after 4 steps"),
        ),
    },
    "FSDP2": {
        "sam_kernels": Mark("✓", "the step of one process"),
        "davda54/sam": Mark(
            "✗",
            "`p.data = old_p` does nothing to a DTensor: no error, and the weights stay perturbed after every step",
            ("the weights stay perturbed after every step",),
        ),
        "pytorch_optimizer": Mark("✓", "the step of one process"),
        "Composer": Mark("✓", "the step of one process"),
    },
    "CUDA graph": {
        "sam_kernels": Mark("–", "with `capturable=True` weights and state stay at their addresses; not run on a device"),
        "davda54/sam": Mark(
            "✗",
            "a step leaves the weights at another address (`p.data = old_p`), and a replay works on stale weights, as replays of recorded "
            "operations show",
            ("a step leaves the weights at another address",),
        ),
        "pytorch_optimizer": Mark("–", "no value is read on the host, addresses stay; not run on a device"),
        "Composer": Mark(
            "✗",
            "a step reads the loss on the host (`if loss:`), in both passes",
            ("a step reads a value on the host (aten._local_scalar_dense",),
        ),
    },
    "sample norms": {
        "sam_kernels": Mark("✓", "`per_sample.GradNorms`, from the passes of a step"),
        "davda54/sam": Mark("✗", _NO_NORMS, _NO_NORMS_WORDS),
        "pytorch_optimizer": Mark("✗", _NO_NORMS, _NO_NORMS_WORDS),
        "Composer": Mark("✗", _NO_NORMS, _NO_NORMS_WORDS),
    },
    "batch norm": {
        "sam_kernels": Mark("✓", "with `model=model`"),
        "davda54/sam": Mark("✓", "with its example's `disable_running_stats`; `num_batches_tracked` counts both passes"),
        "pytorch_optimizer": Mark("✓", "with its `disable_running_stats`; `num_batches_tracked` counts both passes"),
        "Composer": Mark("✗", "both passes update them", ("both passes of a step update the statistics",)),
    },
}


def markdown() -> str:
    """Return README's table."""
    lines = [f"| [Decided by tests](docs/peers.md) | {' | '.join(VERSIONS)} |", f"|---|{':-:|' * len(VERSIONS)}"]
    lines += [f"| {row.title} | {' | '.join(MARKS[key][name].symbol for name in VERSIONS)} |" for key, row in ROWS.items() if row.title]
    return "\n".join(lines)


def page() -> str:
    """Return the table of docs/peers.md: a line for each mark."""
    lines = ["| requirement | implementation, version | | observed |", "|---|---|:-:|---|"]
    for key, row in ROWS.items():
        requirement = row.requirement  # in the first line alone
        for name, version in VERSIONS.items():
            mark = MARKS[key][name]
            shown = name if version == "this one" else f"{name} {version}"
            lines.append(f"| {requirement} | {shown} | {mark.symbol} | {mark.observed} |")
            requirement = ""
    return "\n".join(lines)


def section(path: Path) -> str | None:
    """Return what stands between the markers of a page, or None where it has none."""
    text = path.read_text(encoding="utf-8")
    return text.partition(BEGIN)[2].partition(END)[0].strip() if BEGIN in text and END in text else None


def _write(path: Path, wanted: str) -> None:
    if (found := section(path)) is None:
        print(f"{path.name}: no markers")
        return
    text = path.read_text(encoding="utf-8")
    head, tail = text.partition(BEGIN)[0], text.partition(END)[2]
    path.write_text(f"{head}{BEGIN}\n{wanted}\n{END}{tail}", encoding="utf-8")
    print(f"{path.name}: {'as it was' if found == wanted else 'written'}")


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        _write(README, markdown())
        _write(PAGE, page())
    else:
        print(markdown(), page(), sep="\n\n")
