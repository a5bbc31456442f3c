"""The figures to reach, from the rows of one run."""

from __future__ import annotations

from typing import Any

from bench.per_sample.bars import Bar

__all__ = ["BARS", "over_sam"]

BARS = (
    *(
        Bar(model, "a step with exact norms over SAM's, median of the rounds", "exact", None, limit, at_most=True, key="over_sam_50")
        for model, limit in (("mlp", 1.05), ("transformer", 1.12), ("resnet18", 1.17), ("train_mnist", 1.15), ("train_digits", 1.15))
    ),
    *(
        Bar(model, "exact norms: rank correlation with autograd's", "exact", None, 0.999, at_most=False, key="rank_correlation")
        for model in ("mnist_mlp", "mnist_cnn")
    ),
)


def over_sam(row: dict[str, Any]) -> str:
    """20 %, median and 80 % of a step's time over that of SAM's step in the same round."""
    return " / ".join(f"{row[f'over_sam_{share}']:.2f}" for share in (20, 50, 80)) if "over_sam_50" in row else ""
