"""Gradient norms of groups of samples: tiles of products that stay in registers, each group's sum in one fixed order.

float32, bfloat16 and float16 in any mix; none for float64. Two launches an operation (three for an embedding's, beside torch's sort),
nothing waits for the device, bits depend on the sizes alone.
"""

from sam_kernels.backends.triton.per_sample.affine import affine_grads_
from sam_kernels.backends.triton.per_sample.embedding import embedding_square_norms_
from sam_kernels.backends.triton.per_sample.linear import linear_method, linear_square_norms_

conv_square_norms_ = None  # unfolded by the caller, some groups at a time, then a linear layer

__all__ = ["affine_grads_", "conv_square_norms_", "embedding_square_norms_", "linear_method", "linear_square_norms_"]
