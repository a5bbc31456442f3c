"""m-SAM over ranks, and SAM on the batch of all ranks, against the same step on one process. Two processes make all the runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sam_kernels import CRSAM, GCSAM, GSAM, RSAM, RWSAM, S2SAM, SAM, SAMSPS, LookSAM, MomentumSAM, VaSSO
from sam_kernels.schedules import AdaptivePolicy, Radius
from tests.distributed.problem import RANKS, Run, assert_alike, on_one_process, on_one_rank
from tests.helpers.ranks import on_ranks, one_at_a_time

pytestmark = one_at_a_time


class FollowsTheLoss(Radius):
    """ρ = 0.1 times the loss."""

    def radius(self, info: Any) -> Any:
        return 0.1 * info.loss


def chooses_steps(params: Any, base: Any, **options: Any) -> Any:
    """Every run has a policy of its own. The fourth step rests, by far: no rounding of a norm decides."""
    return SAM(params, base, rho=AdaptivePolicy(0.3, decay=0.5, c=lambda t: 100.0 if t % 2 else -100.0), **options)


PLAIN_SGD: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.1}
RHO = {"rho": 0.3}
# What a rank uses in its micro-batches: left only early and only on rank 0, right only in the last one of rank 1.
UNEVEN = (("left", ""), ("", "right"))
RUNS = {
    "one-batch": Run(more=RHO),
    "micro-batches": Run(more=RHO, k=2),
    "closures": Run(more={**RHO, "lambd": 0.3}, k=3, as_list=True),
    "adamw-adaptive-clipped": Run(
        base=torch.optim.AdamW, options={"lr": 0.01}, more={"rho": 0.5, "adaptive": True, "eta": 0.01, "max_grad_norm": 0.4}, k=2
    ),
    "base-not-fused": Run(base=torch.optim.RMSprop, options={"lr": 0.01}, more=RHO, k=2),
    "bucket-view": Run(more=RHO, k=3, ddp={"gradient_as_bucket_view": True}),
    "unused": Run(more=RHO, options=PLAIN_SGD, k=2, branches=UNEVEN, ddp={"find_unused_parameters": True}),
    "unused-bucket-view": Run(
        more=RHO, options=PLAIN_SGD, k=2, branches=UNEVEN, ddp={"find_unused_parameters": True, "gradient_as_bucket_view": True}
    ),
    "zeroed-late": Run(more=RHO, k=2, zero_late=True),
    "scaled": Run(more=RHO, k=2, scales=True),
    "no-radius": Run(more={"rho": lambda t: 0.3 * (t % 2)}, k=2),
    "rsam": Run(make=RSAM, more={**RHO, "sigma": 0.1}, k=2),
    "gcsam": Run(make=GCSAM, more=RHO, k=2),
    "rwsam": Run(make=RWSAM, more={**RHO, "beta": 2.0}, k=2),
    "rwsam-directions": Run(make=RWSAM, more={**RHO, "beta": 2.0, "norms": "finite_difference"}),
}
TOGETHER = {**RHO, "beta": 2.0, "local_ascent": False}  # the samples of all ranks
AVERAGED = {
    "sam": Run(more=RHO, averaged=True),
    "gsam": Run(make=GSAM, more=RHO, averaged=True),
    "crsam": Run(make=CRSAM, more={**RHO, "gamma": 0.3}, averaged=True),
    "vasso": Run(make=VaSSO, more=RHO, averaged=True),
    "looksam": Run(make=LookSAM, more={**RHO, "k": 2}, averaged=True),
    "momentum": Run(make=MomentumSAM, more=RHO, averaged=True),
    "stale": Run(make=S2SAM, more=RHO, averaged=True),
    "polyak": Run(make=SAMSPS, options={}, more={"rho": 0.05, "gamma_b": 10.0}, averaged=True),
    "radius": Run(more={"rho": FollowsTheLoss()}, averaged=True),
    "policy": Run(make=chooses_steps, more={}, averaged=True),
    "rwsam": Run(make=RWSAM, more=TOGETHER, averaged=True),
    "rwsam-of-2": Run(make=RWSAM, more={**TOGETHER, "micro_batch": 2}, averaged=True, ddp={"find_unused_parameters": True}),
    "rwsam-standardised": Run(make=RWSAM, more={**TOGETHER, "beta": -1.5, "beta_scale": "std", "norm_cap": 1.1}, averaged=True),
    "rwsam-drawn": Run(make=RWSAM, more={**TOGETHER, "sampling": "draw", "draws": 3}, averaged=True),
    "rwsam-directions": Run(make=RWSAM, more={**TOGETHER, "norms": "finite_difference"}, averaged=True),
}


def _all(rank: int) -> dict[str, Any]:
    return {name: on_one_rank(rank, run) for name, run in {**RUNS, **{f"averaged-{name}": run for name, run in AVERAGED.items()}}.items()}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(_all, tmp_path_factory.mktemp("ddp"), ranks=RANKS)


@pytest.mark.parametrize("name", RUNS)
def test_a_local_ascent_is_m_sam_over_the_micro_batches_of_all_ranks(found: list[dict[str, Any]], name: str) -> None:
    assert_alike(found[0][name]["weights"], on_one_process(RUNS[name]))


@pytest.mark.parametrize("name", AVERAGED)
def test_an_averaged_ascent_is_sam_on_the_batch_of_all_ranks(found: list[dict[str, Any]], name: str) -> None:
    assert_alike(found[0][f"averaged-{name}"]["weights"], on_one_process(AVERAGED[name]))


def test_a_local_ascent_is_another_one(found: list[dict[str, Any]]) -> None:
    """So that the two tests above cannot both hold for a step that mistakes one for the other."""
    local, averaged = (found[0][name]["weights"][-1][0] for name in ("one-batch", "averaged-sam"))
    assert (local - averaged).abs().max() > 1e-3


def test_replicas_are_equal_bit_for_bit_and_skip_nothing(found: list[dict[str, Any]]) -> None:
    for name, run in found[0].items():
        assert run["skipped"] == found[1][name]["skipped"] == 0, name
        for step, (left, right) in enumerate(zip(run["weights"], found[1][name]["weights"], strict=True)):
            assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True)), (name, step)


def test_a_step_with_a_local_ascent_reduces_gradients_once(found: list[dict[str, Any]]) -> None:
    for rank in range(RANKS):
        for name in RUNS:
            assert found[rank][name]["reduced"] == [1] * 4, (rank, name)  # the model is one bucket
        assert found[rank]["averaged-sam"]["reduced"] == [2] * 4
        assert found[rank]["averaged-rwsam"]["reduced"] == [2] * 4
        assert found[rank]["averaged-looksam"]["reduced"] == [2, 1] * 2
        assert found[rank]["averaged-policy"]["reduced"] == [2, 2, 2, 1]
