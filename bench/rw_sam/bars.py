"""The figures to reach, from the rows of one run."""

from __future__ import annotations

from bench.per_sample.bars import Bar

__all__ = ["BARS"]

BARS = (
    Bar("mlp", "a step with exact norms over SAM's", "exact", "sam", 1.05, at_most=True),
    Bar("transformer", "a step with exact norms over SAM's", "exact", "sam", 1.12, at_most=True),
    Bar("resnet18", "a step with exact norms over SAM's", "exact", "sam", 1.17, at_most=True),
    *(
        Bar(model, "exact norms: rank correlation with autograd's", "exact", None, 0.999, at_most=False, key="rank_correlation")
        for model in ("mnist_mlp", "mnist_cnn")
    ),
)
