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
    title: str  # in README
    short: str  # on the page


@dataclass(frozen=True)
class Mark:
    """``words``: what the observation of a row that does not hold must contain. ``note``: for README, below its table."""

    symbol: str  # ✓, ✗ or –
    observed: str
    words: tuple[str, ...] = ()
    note: str = ""


ROWS = {
    "mixed precision": Row("Mixed precision with a `GradScaler`; an inf in either pass skips the step", "GradScaler"),
    "NaN": Row("A NaN gradient leaves weights and state as they were", "NaN"),
    "exception": Row("An exception in the second pass (out of memory, Ctrl-C) restores the weights", "exception"),
    "resuming": Row("Resuming from a checkpoint is exact, state of the base included", "checkpoint"),
    "accumulation": Row("Gradient accumulation", "accumulation"),
    "DDP": Row("DDP: the step of one process on the whole batch", "DDP"),
    "FSDP2": Row("FSDP2: the step of one process", "FSDP2"),
    "CUDA graph": Row("CUDA-graph capture", "CUDA graph"),
    "sample norms": Row("Gradient norms per sample", "norms per sample"),
    "batch norm": Row("BatchNorm statistics are updated once a step", "BatchNorm"),
}

_SUBTRACTS = "Composer restores weights by subtraction, to a rounding."
_BASE = "`optimizer.state_dict()` has no state of the base. Exact if `optimizer.base_optimizer.state_dict()` is saved and loaded too."
_LOCAL = "By design a step of m-SAM: every rank perturbs along its own gradient."
_DEVICE = "Undecided: nothing that can be checked without a device fails, and the capture itself was not run."
_SWITCHED = "With the documented lines: `model=model` here, `disable_running_stats` and `enable_running_stats` there."

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
        "Composer": Mark("✓", "the step is skipped, the scale halved; the weights are restored to a rounding", note=_SUBTRACTS),
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
            note=_BASE,
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
            note=_LOCAL,
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
        "sam_kernels": Mark("–", "with `capturable=True` weights and state stay at their addresses; not run on a device", note=_DEVICE),
        "davda54/sam": Mark(
            "✗",
            "a step leaves the weights at another address (`p.data = old_p`), and a replay works on stale weights, as replays of recorded "
            "operations show",
            ("a step leaves the weights at another address",),
        ),
        "pytorch_optimizer": Mark("–", "no value is read on the host, addresses stay; not run on a device", note=_DEVICE),
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
        "sam_kernels": Mark("✓", "with `model=model`", note=_SWITCHED),
        "davda54/sam": Mark("✓", "with its example's `disable_running_stats`; `num_batches_tracked` counts both passes", note=_SWITCHED),
        "pytorch_optimizer": Mark("✓", "with its `disable_running_stats`; `num_batches_tracked` counts both passes", note=_SWITCHED),
        "Composer": Mark("✗", "both passes update them", ("both passes of a step update the statistics",)),
    },
}

SUPERSCRIPTS = "¹²³⁴⁵⁶⁷⁸⁹"


def markdown() -> str:
    """Return README's table with its notes."""
    notes: list[str] = []
    lines = [f"| | {' | '.join(VERSIONS)} |", f"|---|{':-:|' * len(VERSIONS)}"]
    for key, row in ROWS.items():
        cells = []
        for name in VERSIONS:
            mark = MARKS[key][name]
            if mark.note and mark.note not in notes:
                notes.append(mark.note)
            cells.append(mark.symbol + (SUPERSCRIPTS[notes.index(mark.note)] if mark.note else ""))
        lines.append(f"| {row.title} | {' | '.join(cells)} |")
    below = " ".join(f"{SUPERSCRIPTS[i]} {note}" for i, note in enumerate(notes))
    return "\n".join([*lines, "", below])


def page() -> str:
    """Return the table of docs/peers.md: a line for each mark."""
    lines = ["| row | implementation, version | | observed |", "|---|---|:-:|---|"]
    for key, row in ROWS.items():
        for name, version in VERSIONS.items():
            mark = MARKS[key][name]
            lines.append(f"| {row.short} | {name}{'' if version == 'this one' else f' {version}'} | {mark.symbol} | {mark.observed} |")
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
