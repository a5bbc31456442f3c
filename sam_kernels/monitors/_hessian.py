"""How sharp the place is, by second derivatives: the Hessian's largest eigenvalue and its trace, from products with vectors.

Sources: Lanczos, 1950; Hutchinson, 1990; Pearlmutter, 1994, for products by differentiating g·v. For networks: PyHessian, Yao et al.,
arXiv 1912.07145.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sam_kernels._validate import check_count, check_seed
from sam_kernels.monitors._products import HessianProducts, Vector
from sam_kernels.optim._seeds import derived_seed

__all__ = ["hessian_top_eigenvalue", "hessian_trace"]


def hessian_top_eigenvalue(
    closure: Callable[[], Any],
    params: Iterable[Tensor],
    *,
    iterations: int = 30,
    seed: int = 0,
) -> Tensor:  # ()
    """The largest eigenvalue of the Hessian of the loss, which is the curvature along the sharpest direction.

    Largest with its sign, not in magnitude: of eigenvalues -5 and 2 the result is 2. (The most negative one of f is minus that of -f.)

    The method is Lanczos' (1950) from a random normal vector, with full reorthogonalisation, coefficients in float64. It stops after
    ``iterations`` products, or as soon as they span an invariant space. The result is never above the largest eigenvalue but for rounding,
    and is it after as many products as the Hessian has distinct eigenvalues. Before that no error is guaranteed: convergence is fast where
    the largest eigenvalue is well above the next ones, and slow where it is not. On the small networks of the tests 30 are within
    10⁻⁶. Compare with twice the iterations.

    The loss is computed once and all products are of one graph, so dropout masks and batch statistics are the same in each. Layers see the
    mode they are in: call ``model.eval()`` first for the loss that is evaluated. Products are computed in the arithmetic of the parameters
    (under autocast, in that of the forward pass): of 16-bit ones expect two digits. Where second derivatives are not there, as at the kink
    of a ReLU, the Hessian is what autograd makes of it.

    ``grad``, the weights and the global random state are left alone, but for what the closure does itself (dropout draws; running
    statistics are updated once). Parameters on several devices, and of several dtypes, are one vector. Models of DistributedDataParallel:
    call ``ddp.module`` in the closure; the loss, and so the result, is the rank's own.

    Cost: a forward pass, a backward pass, and for each iteration a backward pass through both, about two backward passes each. Memory: the
    graph of both passes, and ``iterations`` vectors of as many elements as the parameters, float32 (float64 where a parameter is).

    Args:
        closure: runs the forward pass and returns the loss, a floating-point tensor of one element, without a backward pass; called once.
        params: the parameters, together: dense tensors of float32, float64, bfloat16 or float16. Those that do not require a gradient are
            left out. Rows and columns of what the loss does not depend on, and of what autograd gives no gradient (an embedding's
            ``padding_idx``), are zero, and 0 is then an eigenvalue.
        iterations: largest number of products with the Hessian.
        seed: of the first vector, in [0, 2^64); with one seed it is the same on every backend to 1e-6.

    Returns: (), float64 where a parameter is, else float32, on the device of the first trainable parameter. NaN where a derivative is not
    finite.

    Raises:
        TypeError, ValueError: for arguments of the wrong type or out of range, sharded parameters, sparse gradients, a loss that is no
            tensor of one element, or that depends on none of the parameters.
        RuntimeError: for a loss without a graph, or operations without second derivatives, which are named with what to use instead: fused
            attention (take ``sdpa_kernel(SDPBackend.MATH)``), compiled models, reentrant checkpointing, functions that are differentiable
            once. A function of your own whose backward pass is differentiable and wrong is not found: ``torch.autograd.gradgradcheck`` is.
    """
    name = "hessian_top_eigenvalue"
    iterations = check_count(name, "iterations", iterations, low=1)
    seed = check_seed(name, "seed", seed)
    products = HessianProducts(name, closure, params)
    return products.result(_largest_ritz_value(products, iterations, seed))


def hessian_trace(
    closure: Callable[[], Any],
    params: Iterable[Tensor],
    *,
    num_samples: int = 50,
    seed: int = 0,
) -> Tensor:  # ()
    """The trace of the Hessian H of the loss, which is the sum of its eigenvalues, estimated by Hutchinson's method (1990).

    The mean of zᵀ H z over ``num_samples`` vectors z of random signs: unbiased, of variance 2 Σ_{i≠j} H_ij² / ``num_samples``, exact for a
    diagonal H. Sums are float64. A seed has the same signs on every backend; samples of different seeds are independent, so results of
    several seeds may be averaged, and their spread is the standard error.

    Cost: a forward pass, a backward pass, and for each sample about two backward passes. Memory: the graph of both passes, and three
    vectors. All else as for :func:`hessian_top_eigenvalue`.

    Args:
        closure, params: as there.
        num_samples: number of vectors.
        seed: of the vectors, in [0, 2^64).

    Returns: (), float64 where a parameter is, else float32, on the device of the first trainable parameter. Not finite where a derivative
    is not.

    Raises: as there.
    """
    name = "hessian_trace"
    num_samples = check_count(name, "num_samples", num_samples, low=1)
    seed = check_seed(name, "seed", seed)
    products = HessianProducts(name, closure, params)
    found = []
    for k in range(num_samples):
        z = products.random(derived_seed(seed, k), "rademacher")
        found.append(products.dots([z], products.of(z))[0])
    return products.result(math.fsum(found) / num_samples if all(map(math.isfinite, found)) else math.nan)


def _largest_ritz_value(products: HessianProducts, iterations: int, seed: int) -> float:
    """The largest eigenvalue of QᵀHQ, Q an orthonormal basis of the Krylov space of a random vector. NaN where a product is not finite."""
    w = products.random(seed, "normal")
    beta = products.norm(w)
    if beta == 0.0:  # one element whose normal number is 0: any vector will do
        w, beta = products.random(seed, "rademacher"), math.sqrt(products.numel)
    basis: list[Vector] = []
    alphas: list[float] = []
    betas: list[float] = []
    for _ in range(min(iterations, products.numel)):
        basis.append(products.scaled(w, 1.0 / beta))
        w = products.of(basis[-1], scale=products.root)
        alpha = 0.0
        for _ in range(2):  # Kahan's "twice is enough"
            dots = products.dots(basis, w)
            products.subtract_(w, basis, dots)
            alpha += dots[-1]
        beta = products.norm(w)
        if not math.isfinite(alpha) or not math.isfinite(beta):
            return math.nan
        alphas.append(alpha)
        betas.append(beta)
        if beta <= products.eps * max(map(abs, alphas + betas[:-1])):  # the space is invariant: what is left is rounding
            break
    off_diagonal = torch.tensor(betas[:-1], dtype=torch.float64, device="cpu")
    tridiagonal = torch.tensor(alphas, dtype=torch.float64, device="cpu").diag() + off_diagonal.diag(1) + off_diagonal.diag(-1)
    return float(torch.linalg.eigvalsh(tridiagonal)[-1])
