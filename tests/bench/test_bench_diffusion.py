"""The SDE view of m-sharpness: enumerated steps against formulas, expectations without Monte Carlo, and what the experiments claim."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sam_kernels
from bench.papers import diffusion, drift, variance, weak_order
from bench.papers.context import Context
from bench.papers.enumeration import Member, Steps, covariance, first_order
from bench.papers.fourier import Grid, after_diffusion, after_steps
from bench.papers.moments import affine, of_diffusion, of_steps
from bench.papers.small_problems import LinearProblem, Problem, least_squares, torus
from sam_kernels.cli.train.model import small_cnn

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("problem", [Problem(3), least_squares(3), torus()], ids=["tanh", "least_squares", "torus"])
def test_the_network_of_a_problem_is_its_formula(problem: Problem | LinearProblem) -> None:
    model, x = problem.model(), problem.start + 0.3
    nn.utils.vector_to_parameters(x, model.parameters())
    chosen = (2, 0)
    torch.testing.assert_close(problem.losses_of(model, chosen), problem.losses(x)[list(chosen)], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("m", [1, 2, 4, 8])
@pytest.mark.parametrize("lambd", [0.0, 1.0])
def test_the_first_order_of_the_mean_step_is_the_gradient_of_the_papers_regulariser(lambd: float, m: int) -> None:
    problem = Problem()
    plain, more = first_order(problem, Member("", 4, m, lambd))(problem.start)
    torch.testing.assert_close(more.mean(0), drift.gradient_of(drift.regulariser(problem, lambd, m), problem.start), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(plain.mean(0), drift.gradient_of(lambda x: problem.losses(x).mean(), problem.start), rtol=1e-12, atol=1e-14)


def test_the_noise_of_sgd_carries_the_factor_of_a_finite_population() -> None:
    problem = Problem()
    gradients = problem.gradients(problem.start.clone().requires_grad_()).detach()
    v, n = covariance(gradients, gradients), problem.count
    for size, m in ((2, 2), (4, 2), (4, 1)):
        plain, _ = first_order(problem, Member("", size, m))(problem.start)
        torch.testing.assert_close(covariance(plain, plain), v / size * (n - size) / (n - 1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("member", diffusion.MEMBERS[4:], ids=lambda member: member.name)
def test_only_the_drift_of_reweighting_is_no_gradient(member: Member) -> None:
    found = diffusion.asymmetry(Problem(), member)
    assert found > 0.01 if member.beta else found < 1e-13


def test_another_beta_is_not_the_drift_of_rwsam() -> None:
    problem, rho = Problem(), 1e-4
    steps = Steps(problem, Member("", 4, 4, beta=1.0), rho)(problem.start)
    left = {}
    for beta in (1.0, -1.0, 2.0):
        plain, more = first_order(problem, Member("", 4, 4, beta=beta))(problem.start)
        left[beta] = ((steps - plain).mean(0) / rho - more.mean(0)).norm()
    assert left[1.0] < 1e-2 * min(left[-1.0], left[2.0])


def test_the_papers_noise_of_pieces_is_that_of_the_step() -> None:
    """For m = 1 exactly, else to first order in the radius; SGD's is not."""
    problem, rho = Problem(), 0.01
    for member, share in ((Member("", 4, 1), 1e-13), (Member("", 4, 2), 3e-4)):
        plain, _ = first_order(problem, member)(problem.start)
        steps = Steps(problem, member, rho)(problem.start)
        noise = covariance(steps, steps)
        assert (diffusion.of_pieces(problem, member, rho) - noise).norm() < share * noise.norm()
        assert (covariance(plain, plain) - noise).norm() > 0.01 * noise.norm()


# --- expectations ---


def test_a_diffusion_with_constant_coefficients_is_the_known_one() -> None:
    grid, time = Grid(7), 0.7
    drift_, noise = np.array([0.3, -0.5]), np.array([[0.2, 0.05], [0.05, 0.1]])
    x, y = grid.points.T
    phi = np.stack([np.cos(x), np.sin(x - y)], -1)
    many = len(grid.points)
    found = after_diffusion(grid, np.tile(drift_, (many, 1)), np.tile(noise, (many, 1, 1)), time, phi)
    waves = np.array([[1.0, 0.0], [1.0, -1.0]])
    decay = np.exp(-0.5 * time * np.einsum("ki,ij,kj->k", waves, noise, waves))
    moved = grid.points + time * drift_
    wanted = np.stack([np.cos(moved[:, 0]), np.sin(moved[:, 0] - moved[:, 1])], -1) * decay
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_the_mean_over_steps_is_that_of_every_sequence_of_batches() -> None:
    """By the optimizer at the learning rate itself, from a point of both grids."""
    problem, eta, rho = torus(), 0.1, 0.2
    start = torch.tensor([2 * np.pi / 3, 4 * np.pi / 3], dtype=torch.float64)

    def end(sequence: tuple[tuple[int, ...], ...]) -> float:
        x = start.clone().requires_grad_()
        optimizer = sam_kernels.SAM([x], torch.optim.SGD, rho=rho, lr=eta)
        for batch in sequence:

            def closure(chosen: tuple[int, ...] = batch) -> torch.Tensor:
                optimizer.zero_grad()
                loss = problem.losses(x)[list(chosen)].mean()
                loss.backward()  # type: ignore[no-untyped-call]  # torch's own is untyped
                return loss

            optimizer.step(closure)
        return float(torch.cos(x[0] - x[1]).detach())

    wanted = np.mean([end(sequence) for sequence in product(((0, 1), (0, 2), (1, 2)), repeat=2)])
    found = {}
    for n in (15, 21):
        grid = Grid(n)
        phi = np.cos(grid.points[:, :1] - grid.points[:, 1:])
        after = after_steps(grid, problem_steps(problem, torch.from_numpy(grid.points), rho), eta, 2, phi)
        found[n] = after[np.abs(grid.points - start.numpy()).sum(1).argmin(), 0]
    # The interpolation converges exponentially: six more points a side are worth far more than a factor of ten.
    assert abs(found[15] - wanted) < 1e-6
    assert abs(found[21] - wanted) < 1e-7


def problem_steps(problem: LinearProblem, points: torch.Tensor, rho: float) -> weak_order.Floats:
    """(P, 3, 2): SAM's steps by the formula, for many points at once."""
    gradients = torch.func.jacrev(problem.losses)

    def of(x: torch.Tensor) -> torch.Tensor:
        moved = []
        for chosen in ((0, 1), (0, 2), (1, 2)):
            g = gradients(x)[list(chosen)].mean(0)
            moved.append(gradients(x + rho * g / g.norm())[list(chosen)].mean(0))
        return torch.stack(moved)

    found: weak_order.Floats = torch.func.vmap(of)(points).numpy()
    return found


def test_moments_of_affine_steps_are_those_of_every_sequence() -> None:
    problem, eta = least_squares(), 0.1
    k = affine(Steps(problem, Member("", 2, 1, 0.0), 0.2), problem.start)
    start = problem.start.numpy()
    z = np.append(start, 1.0)
    ends = [(np.eye(4) - eta * second) @ (np.eye(4) - eta * first) @ z for first, second in product(k, k)]
    np.testing.assert_allclose(of_steps(k, eta, 2, start), np.mean([np.outer(end, end) for end in ends], axis=0), rtol=1e-12)
    with pytest.raises(ValueError, match="not affine"):
        affine(Steps(problem, Member("", 2, 2, 1.0), 0.2), problem.start)


def test_moments_of_a_diffusion_are_those_of_an_ornstein_uhlenbeck_process() -> None:
    a, eta, time, s = 0.8, 0.1, 1.5, 0.6
    k = np.array([[[a, sign * s], [0.0, 0.0]] for sign in (1, -1)])  # x - x⁺ = a x ± s: noise s²
    found = of_diffusion(-k.mean(0), k, eta, time, np.array([2.0]))
    mean = 2 * np.exp(-a * time)
    assert found[0, 1] == pytest.approx(mean, rel=1e-12)
    assert found[0, 0] - mean**2 == pytest.approx(eta * s**2 * -np.expm1(-2 * a * time) / (2 * a), rel=1e-12)


# --- what the experiments claim ---


def test_the_sdes_have_their_orders() -> None:
    rows = weak_order.EXPERIMENT.measure(Context(True)).rows
    assert {row["problem"] for row in rows} == {weak_order.LEAST_SQUARES, weak_order.TORUS}
    for row in rows:  # coarse steps: the next order shows
        assert row["flow"][1] == pytest.approx(1, abs=0.2)
        assert row["order1"][1] == pytest.approx(1, abs=0.2)
        assert row["order2"][1] == pytest.approx(2, abs=0.2)
        assert row["order2"][0] < row["sgd_noise"][0] < row["order1"][0] < 0.2 * row["sgd"][0]


def test_a_drift_to_first_order_leaves_the_square_of_the_radius() -> None:
    member = asdict(Member("", 2, 2))
    whole, half = (weak_order.on_torus(member, rho, [64], 9)["truncated"] for rho in (0.2, 0.1))
    assert whole / half == pytest.approx(4, rel=0.15)


def test_expected_norms_fall_with_m_and_stay_below_their_bound() -> None:
    problem = Problem()
    gradients = problem.gradients(problem.start.clone().requires_grad_()).detach()
    whole, squares = gradients.mean(0).square().sum().item(), gradients.square().sum(1).mean().item()
    norms = [variance.enumerated(problem, m) for m in range(1, 9)]
    assert norms == sorted(norms, reverse=True)
    for m, norm in enumerate(norms[:-1], 1):
        pieces = torch.tensor([gradients[list(chosen)].mean(0).square().sum() for chosen in drift.combinations(range(8), m)])
        limit = variance.bound(whole, squares - whole, m, 8)
        assert limit == pytest.approx(pieces.double().mean().sqrt().item(), rel=1e-6)  # torch.tensor: float32
        assert norm < limit
    assert norms[-1] == pytest.approx(variance.bound(whole, squares - whole, 8, 8), rel=1e-12)


def test_norms_of_micro_batches_are_those_of_autograd() -> None:
    torch.manual_seed(0)
    model, images, labels = small_cnn(8, normalization="group"), torch.randn(6, 1, 8, 8), torch.arange(6)
    wanted = []
    for k in (0, 3):
        grads = torch.autograd.grad(F.cross_entropy(model(images[k : k + 3]), labels[k : k + 3]), list(model.parameters()))
        wanted.append(torch.stack([grad.square().sum() for grad in grads]).sum().sqrt())
    torch.testing.assert_close(variance.norms_of(model, images, labels, 3), torch.stack(wanted), rtol=1e-5, atol=1e-6)


def test_the_stored_runs_show_what_the_page_says() -> None:
    stored = [json.loads(path.read_text())["experiments"] for path in (ROOT / "bench" / "results").glob("*/papers.json")]
    found = {name: entry["rows"] for experiments in stored for name, entry in experiments.items()}
    rows = {row["method"]: row for row in found["diffusion"]}
    for name, row in rows.items():
        assert row["order"] == pytest.approx(1.0, abs=0.01)
        assert row["order_rest"] == pytest.approx(2.0, abs=0.02)
        assert row["asymmetry"] > 0.03 if name.startswith("RW-SAM") else row["asymmetry"] < 1e-15
    assert rows["m-SAM, m = 1"]["trace"] > rows["m-SAM, m = 2"]["trace"] > rows["SAM"]["trace"] > 1
    assert (rows["m-SAM, m = 1"]["above_batch"], rows["m-USAM, m = 1"]["above_batch"]) == (12, 19)
    for row in found["weak_order"]:
        assert row["order1"][1] == pytest.approx(1, abs=0.02)
        assert row["order2"][1] == pytest.approx(2, abs=0.03)
        assert 8 < row["sgd_noise"][0] / row["order2"][0] < 49
        if row["truncated"] is not None:
            assert row["truncated"] / row["truncated_half"] == pytest.approx(4, abs=0.3)
    ends = {(row["noise"], row["method"]): row for row in found["variance"] if row.get("epoch") == 10}
    traces = {key: row["variance"][0] for key, row in ends.items()}
    assert traces[0.4, "SGD"] > 2 * traces[0.4, "SAM"] > 2 * traces[0.4, "m-SAM, m = 16"]
    assert 4 * traces[0.0, "SGD"] < traces[0.0, "SAM"] < traces[0.0, "m-SAM, m = 16"]
