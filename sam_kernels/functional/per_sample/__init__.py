"""Squared gradient norms of groups of samples, from a layer's inputs and the gradient of its outputs, without forming the gradients.

A group is one sample or a micro-batch of consecutive ones: M groups in all. The sequences of a micro-batch's samples, put one after the
other, are one longer sequence of T positions. ``grad_outputs`` belongs to the sum of all samples' losses.

dtypes are float32, bfloat16 and float16, mixed freely, or float64. Products and sums are float32 (float64 where a tensor is float64),
``square_norms`` float64. Tensors that are not contiguous are copied first. Errors: ``TypeError`` for a wrong type, layout or dtype,
``ValueError`` for shapes or devices that do not fit; they name the operation and the argument, and come before any memory is touched.
"""

from sam_kernels.functional.per_sample.affine import affine_grads_
from sam_kernels.functional.per_sample.conv import conv_square_norms_
from sam_kernels.functional.per_sample.embedding import embedding_square_norms_
from sam_kernels.functional.per_sample.linear import linear_method, linear_square_norms_

__all__ = ["affine_grads_", "conv_square_norms_", "embedding_square_norms_", "linear_method", "linear_square_norms_"]
