"""Largest eigenvalue and trace of Hessians, against the whole matrix in float64 and against the formulas of both methods."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import sam_kernels
from sam_kernels import monitors
from sam_kernels.optim._seeds import derived_seed
from sam_kernels.reference.random import random_numbers
from tests.optim.problem import every_backend

Closure = Callable[[], Tensor]
DOUBLE = torch.float64


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:  # (n, length) -> (n, 4)
        with sdpa_kernel(SDPBackend.MATH):
            return self.head(self.layer(self.embedding(tokens)).mean(1))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))


def cnn() -> nn.Module:
    features = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(6 * 16, 4))


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network in float64, inputs and labels."""
    torch.manual_seed(0)
    model, shape = {"mlp": (mlp, (6,)), "cnn": (cnn, (1, 8, 8)), "transformer": (Transformer, (5,))}[name]
    inputs = torch.randint(0, 11, (32, *shape)) if name == "transformer" else torch.randn(32, *shape, dtype=DOUBLE)
    return model().to(DOUBLE), inputs, torch.randint(0, 4, (32,))


def closure_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> Closure:
    return lambda: nn.functional.cross_entropy(model(inputs), labels)


def whole_hessian(model: nn.Module, loss_of: Callable[[Callable[..., Tensor]], Tensor]) -> Tensor:  # (N, N)
    """Rows and columns in the order of the parameters."""
    names, params = zip(*model.named_parameters(), strict=True)

    def loss(*values: Tensor) -> Tensor:
        return loss_of(lambda *inputs: functional_call(model, dict(zip(names, values, strict=True)), inputs))

    blocks = torch.autograd.functional.hessian(loss, tuple(param.detach() for param in params))
    sizes = [param.numel() for param in params]
    return torch.cat(
        [torch.cat([block.reshape(n, m) for block, m in zip(row, sizes, strict=True)], 1) for row, n in zip(blocks, sizes, strict=True)]
    )


def reference_vector(params: Iterable[Tensor], seed: int, distribution: str) -> Tensor:  # (N,) float64
    return torch.cat([z.reshape(-1) for z in random_numbers([[torch.zeros(p.shape)] for p in params], seed, distribution)])


def quadratic(matrix: Tensor, w: Tensor) -> Closure:
    return lambda: w @ matrix @ w / 2


@pytest.fixture(scope="module", params=[("mlp", False), ("cnn", False), ("cnn", True), ("transformer", False)], ids=str)
def known(request: pytest.FixtureRequest) -> tuple[nn.Module, Closure, Tensor]:
    """A network, its loss, and its whole Hessian."""
    name, is_training = request.param
    model, inputs, labels = problem(name)
    model.train(is_training)
    hessian = whole_hessian(model, lambda call: nn.functional.cross_entropy(call(inputs), labels))
    return model, closure_of(model, inputs, labels), hessian


def test_the_largest_eigenvalue_is_that_of_the_whole_matrix(known: tuple[nn.Module, Closure, Tensor]) -> None:
    model, closure, hessian = known
    expected = torch.linalg.eigvalsh(hessian)
    assert expected[0] < -0.1  # indefinite
    for seed in (0, 1):
        found = monitors.hessian_top_eigenvalue(closure, model.parameters(), seed=seed)
        assert (found.shape, found.dtype) == ((), DOUBLE)
        assert found.item() == pytest.approx(expected[-1].item(), rel=1e-6)
    assert monitors.hessian_top_eigenvalue(closure, model.parameters(), iterations=60).item() == pytest.approx(
        expected[-1].item(), rel=1e-12
    )
    lowest = -monitors.hessian_top_eigenvalue(lambda: -closure(), model.parameters(), iterations=60)
    assert lowest.item() == pytest.approx(expected[0].item(), rel=1e-9)


def test_the_trace_is_the_mean_over_the_generators_signs(known: tuple[nn.Module, Closure, Tensor]) -> None:
    model, closure, hessian = known
    vectors = [reference_vector(model.parameters(), derived_seed(3, k), "rademacher") for k in range(5)]
    expected = math.fsum((z @ hessian @ z).item() for z in vectors) / 5
    found = monitors.hessian_trace(closure, model.parameters(), num_samples=5, seed=3)
    assert (found.shape, found.dtype) == ((), DOUBLE)
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_the_trace_is_unbiased_and_has_the_variance_that_is_documented() -> None:
    model, inputs, labels = problem("mlp")
    hessian = whole_hessian(model, lambda call: nn.functional.cross_entropy(call(inputs), labels))
    variance = 2 * (hessian.square().sum() - hessian.diag().square().sum()).item()
    samples, seeds = 2, 300
    closure = closure_of(model, inputs, labels)
    found = torch.stack([monitors.hessian_trace(closure, model.parameters(), num_samples=samples, seed=s) for s in range(seeds)])
    assert abs(found.mean() - hessian.trace()).item() < 4 * math.sqrt(variance / samples / seeds)
    # The sum of squares over the variance is near chi-square with 300 degrees of freedom: a relative standard deviation of √(2/300), 8 %.
    assert (found - hessian.trace()).square().mean().item() == pytest.approx(variance / samples, rel=0.33)


@pytest.mark.parametrize("iterations", [1, 2, 3, 7])
def test_before_it_converges_it_is_the_ritz_value_of_the_krylov_space(iterations: int) -> None:
    model, inputs, labels = problem("mlp")
    hessian = whole_hessian(model, lambda call: nn.functional.cross_entropy(call(inputs), labels))
    columns = [reference_vector(model.parameters(), 5, "normal")]
    for _ in range(iterations - 1):
        columns.append(hessian @ columns[-1])
    q = torch.linalg.qr(torch.stack(columns, 1))[0]
    expected = torch.linalg.eigvalsh(q.T @ hessian @ q)[-1].item()
    found = monitors.hessian_top_eigenvalue(closure_of(model, inputs, labels), model.parameters(), iterations=iterations, seed=5)
    assert found.item() == pytest.approx(expected, rel=1e-5)  # the normals of a backend are those of the reference within 1e-6
    assert found < torch.linalg.eigvalsh(hessian)[-1]


def test_it_is_the_largest_with_its_sign() -> None:
    w = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    swapped = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=DOUBLE)  # every vector of signs is an eigenvector
    for matrix, expected in ((torch.tensor([-5.0, 2.0]).diag(), 2.0), (torch.tensor([-5.0, -2.0]).diag(), -2.0), (swapped, 1.0)):
        for seed in range(8):
            found = monitors.hessian_top_eigenvalue(quadratic(matrix.to(DOUBLE), w), [w], seed=seed)
            assert found.item() == pytest.approx(expected, rel=1e-12)


def test_parameters_that_the_loss_does_not_depend_on_are_zeros() -> None:
    w, unused = torch.ones(3, dtype=DOUBLE, requires_grad=True), torch.ones(2, dtype=DOUBLE, requires_grad=True)
    closure = quadratic(torch.tensor([-5.0, -2.0, -1.0], dtype=DOUBLE).diag(), w)
    assert monitors.hessian_top_eigenvalue(closure, [w]).item() == pytest.approx(-1.0)
    assert monitors.hessian_top_eigenvalue(closure, [w, unused]).item() == pytest.approx(0.0, abs=1e-12)
    assert monitors.hessian_trace(closure, [unused, w]).item() == pytest.approx(-8.0, rel=1e-12)
    for linear in (lambda: w.sum(), lambda: (3 * w).sum() + unused.sum(), lambda: (w * 0).sum()):
        assert monitors.hessian_top_eigenvalue(linear, [w, unused]).item() == 0.0
        assert monitors.hessian_trace(linear, [w, unused]).item() == 0.0


def test_one_sample_is_exact_for_a_diagonal_hessian() -> None:
    w = torch.linspace(-1, 1, 40, dtype=DOUBLE).requires_grad_()
    for seed in range(5):
        found = monitors.hessian_trace(lambda: (w**4).sum(), [w], num_samples=1, seed=seed)
        assert found.item() == pytest.approx((12 * w.detach() ** 2).sum().item(), rel=1e-14)


def test_one_element_and_equal_eigenvalues_need_one_product() -> None:
    for numel in (1, 7):
        w = torch.ones(numel, requires_grad=True)
        products: list[int] = []

        class Counted(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                return x * 2

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                products.append(1)  # noqa: B023
                return grad * 2

        found = monitors.hessian_top_eigenvalue(lambda: Counted.apply(w).square().sum(), [w], iterations=20)  # noqa: B023
        assert (found.dtype, found.item()) == (torch.float32, pytest.approx(8.0, rel=1e-6))
        assert len(products) <= 3  # the first pass, and one product; rounding may ask for another


@every_backend
def test_a_seed_has_one_result(backend: str) -> None:
    model, inputs, labels = problem("mlp")
    closure, params = closure_of(model, inputs, labels), list(model.parameters())

    def results(seed: int) -> tuple[float, float]:
        trace = monitors.hessian_trace(closure, iter(params), num_samples=3, seed=seed)
        return trace.item(), monitors.hessian_top_eigenvalue(closure, iter(params), iterations=4, seed=seed).item()

    with sam_kernels.use_backend("foreach"):
        expected = results(9)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with sam_kernels.use_backend(backend):
                found = results(9)
                assert results(9) == found
                assert found[0] == pytest.approx(expected[0], rel=1e-12)  # signs are the same, normals within 1e-6
                assert found[1] == pytest.approx(expected[1], rel=1e-5)
                assert all(a != pytest.approx(b, rel=1e-4) for a, b in zip(results(10), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("function", [monitors.hessian_top_eigenvalue, monitors.hessian_trace])
def test_nothing_else_changes(function: Any) -> None:
    model, inputs, labels = problem("cnn")
    closure_of(model, inputs, labels)().backward()
    grads, weights = [[x.clone() for x in xs] for xs in ([p.grad for p in model.parameters()], model.parameters())]
    state, batches = torch.get_rng_state(), int(model[1].num_batches_tracked)
    grad_objects = [p.grad for p in model.parameters()]
    with torch.no_grad():
        function(closure_of(model, inputs, labels), model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grad_objects, strict=True))
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), grads, strict=True))
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    assert int(model[1].num_batches_tracked) == batches + 1
    assert torch.is_grad_enabled()


def test_all_products_see_one_dropout_mask() -> None:
    model, inputs, labels = problem("mlp")
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        return nn.functional.cross_entropy(model[2](nn.functional.dropout(model[1](model[0](inputs)), 0.5)), labels)

    torch.manual_seed(7)
    mask = nn.functional.dropout(torch.ones(32, 12, dtype=DOUBLE), 0.5)
    torch.manual_seed(7)
    top = monitors.hessian_top_eigenvalue(closure, model.parameters(), iterations=60)
    assert len(calls) == 1
    fixed = lambda: nn.functional.cross_entropy(model[2](model[1](model[0](inputs)) * mask), labels)  # noqa: E731
    assert top.item() == pytest.approx(monitors.hessian_top_eigenvalue(fixed, model.parameters(), iterations=60).item(), rel=1e-9)


def test_dtypes_frozen_repeated_and_empty_parameters() -> None:
    frozen = nn.Parameter(torch.ones(3, dtype=torch.complex64), requires_grad=False)
    a, b = torch.ones(2, requires_grad=True), torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    empty = torch.ones(0, requires_grad=True)

    def closure() -> Tensor:
        return (3 * a.square()).sum() + (a.sum() * b.float().sum()) + b.float().square().sum() + empty.sum()

    hessian = torch.ones(5, 5).fill_diagonal_(0)
    hessian[:2, :2], hessian[2:, 2:] = 6 * torch.eye(2), 2 * torch.eye(3)
    expected = torch.linalg.eigvalsh(hessian)[-1].item()
    for params in ([a, b], [frozen, a, empty, a, b, b]):
        top = monitors.hessian_top_eigenvalue(closure, params)
        assert (top.dtype, top.item()) == (torch.float32, pytest.approx(expected, rel=2**-8))
        assert monitors.hessian_trace(closure, params, num_samples=400).item() == pytest.approx(18.0, abs=4 * math.sqrt(2 * 12 / 400))
    wide = torch.ones(2, dtype=DOUBLE, requires_grad=True)
    assert monitors.hessian_trace(lambda: closure() + wide.square().sum(), [a, b, wide], num_samples=1).dtype is DOUBLE
    conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    images = torch.randn(4, 2, 5, 5).to(memory_format=torch.channels_last)
    plain = nn.Conv2d(2, 3, 3)
    plain.load_state_dict(conv.state_dict())
    traces = [monitors.hessian_trace(lambda: m(images).tanh().square().mean(), m.parameters()).item() for m in (conv, plain)]  # noqa: B023
    assert traces[0] == pytest.approx(traces[1], rel=1e-4)  # elements are counted in C order, not as they lie in memory


@pytest.mark.parametrize("how", ["bfloat16", "autocast inside", "autocast around"])
def test_half_precision_is_near_float64(how: str) -> None:
    model, inputs, labels = problem("mlp")
    expected = [
        f(closure_of(model, inputs, labels), model.parameters()).item() for f in (monitors.hessian_top_eigenvalue, monitors.hessian_trace)
    ]
    model.to(torch.bfloat16 if how == "bfloat16" else torch.float32)
    inputs = inputs.to(next(model.parameters()).dtype)

    def closure() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast inside"):
            return nn.functional.cross_entropy(model(inputs).float(), labels)

    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast around"):
        found = [f(closure, model.parameters()) for f in (monitors.hessian_top_eigenvalue, monitors.hessian_trace)]
    assert [each.dtype for each in found] == [torch.float32] * 2
    assert [each.item() for each in found] == pytest.approx(expected, rel=0.05)


def test_derivatives_have_the_dtypes_of_the_forward_pass_under_the_callers_autocast() -> None:
    model, inputs, labels = problem("mlp")
    model.float()

    def closure() -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return nn.functional.cross_entropy(model(inputs.float()), labels)

    for function in (monitors.hessian_top_eigenvalue, monitors.hessian_trace):
        expected = function(closure, model.parameters()).item()
        with torch.autocast("cpu", torch.bfloat16):
            assert function(closure, model.parameters()).item() == pytest.approx(expected, rel=1e-6)


def test_more_iterations_than_elements_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        matrix = torch.randn(3, 3, generator=generator)
        matrix, w = matrix + matrix.T, torch.ones(3, requires_grad=True)
        expected = torch.linalg.eigvalsh(matrix.double())
        found = monitors.hessian_top_eigenvalue(quadratic(matrix, w), [w], iterations=40).item()
        assert found == pytest.approx(expected[-1].item(), abs=1e-6 * expected.abs().max().item())


def test_unit_vectors_do_not_underflow_in_float16() -> None:
    w = torch.ones(1 << 20, dtype=torch.float16, requires_grad=True)
    found = monitors.hessian_top_eigenvalue(lambda: 1e-5 * w.float().square().sum(), [w], iterations=3)
    assert found.item() == pytest.approx(2e-5, rel=0.01)


def test_what_is_not_finite_is_nan() -> None:
    w = torch.zeros(2, requires_grad=True)
    for closure in (lambda: w.abs().sqrt().sum(), lambda: (w * math.nan).square().sum()):
        assert monitors.hessian_top_eigenvalue(closure, [w]).isnan()
        assert monitors.hessian_trace(closure, [w]).isnan()


def test_checkpointed_layers_are_right() -> None:
    model, inputs, labels = problem("mlp")

    def closure() -> Tensor:
        return nn.functional.cross_entropy(checkpoint(model, inputs, use_reentrant=False), labels)

    for function in (monitors.hessian_top_eigenvalue, monitors.hessian_trace):
        expected = function(closure_of(model, inputs, labels), model.parameters())
        assert function(closure, model.parameters()).item() == pytest.approx(expected.item(), rel=1e-9)
