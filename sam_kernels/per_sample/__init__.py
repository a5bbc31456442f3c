"""Gradient norms of every sample or micro-batch, and gradients weighted by them, out of one forward and one backward pass."""

from sam_kernels.per_sample._registry import Rule, register_rule
from sam_kernels.per_sample._terms import Convolution, Dense, Outer, Rows, Term
from sam_kernels.per_sample.engine import GradNorms

__all__ = ["Convolution", "Dense", "GradNorms", "Outer", "Rows", "Rule", "Term", "register_rule"]
