"""``train --peer``: the plain loop takes the steps of SAM, in the same tables."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from sam_kernels.cli import main
from sam_kernels.cli.train.model import small_cnn
from sam_kernels.cli.train.optimizers import PEER, Settings, build, options_of
from sam_kernels.cli.train.peer import PlainSAM

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_the_steps_are_those_of_sam(base: str) -> None:
    """In float64, buffers included: ten steps grow a difference of 2^-53 by much less than 10^5. Without a radius they differ."""
    torch.manual_seed(0)
    start = small_cnn(8).double()
    settings = Settings(base, 0.05 if base == "sgd" else 2e-3, 5e-4, None, 0.5)
    images, labels = torch.randn(10, 32, 1, 8, 8, dtype=torch.float64), torch.randint(10, (10, 32))
    ended = {}
    for name, rho in ((PEER, None), ("sam", None), ("without", 0.0)):
        model = copy.deepcopy(start)
        optimizer = build("sam" if name == "without" else name, model, settings, 0)
        plain = PlainSAM(optimizer, model, options_of(name, settings)["rho"]) if name == PEER else None
        if rho is not None:
            optimizer.param_groups[0]["rho"] = rho
        for batch, targets in zip(images, labels, strict=True):

            def gradient(batch: torch.Tensor = batch, targets: torch.Tensor = targets, model: nn.Module = model) -> torch.Tensor:
                model.zero_grad()
                loss = nn.functional.cross_entropy(model(batch), targets)
                loss.backward()
                return loss.detach()

            (plain or optimizer).step(gradient)
        ended[name] = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    torch.testing.assert_close(ended[PEER], ended["sam"], rtol=1e-10, atol=1e-12)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(ended["without"], ended["sam"], rtol=1e-3, atol=1e-3)
    assert not torch.equal(ended[PEER]["1.running_mean"], start.state_dict()["1.running_mean"])


def test_the_peer_stands_behind_sam_in_the_tables(tmp_path: Path) -> None:
    arguments = ["train", "--data", "digits", "--epochs", "1", "--optimizers", "sam,sgd", "--peer", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["summary"]
    assert [row["optimizer"] for row in rows] == ["sam", PEER, "sgd"]
    assert rows[1]["options"] == rows[0]["options"] == {"rho": 0.3}
    assert rows[1]["train_loss"]["mean"] == pytest.approx(rows[0]["train_loss"]["mean"], rel=1e-3)
    assert rows[1]["rest_seconds"] > 0


def test_the_peer_needs_sam(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["train", "--optimizers", "sgd,usam", "--peer", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "--optimizers leaves out" in result.output
