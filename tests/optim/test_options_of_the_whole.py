"""An option of the whole optimizer in a parameter group, where nobody reads it, is an error; one of the base's is the base's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sam_kernels
from tests.optim.problem import assert_same_bits, closure_of, make_batch, make_model, weights


@pytest.mark.parametrize("api", ["step", "backward", "first_step"])
@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(("name", "value"), [("max_grad_norm", 1.0), ("master_weights", True), ("check_finite", False)])
def test_an_option_of_the_whole_optimizer_in_a_group_is_refused(name: str, value: Any, is_late: bool, api: str) -> None:
    model = make_model()
    group = {"params": list(model.parameters()), **({} if is_late else {name: value})}
    optimizer = sam_kernels.SAM([group], torch.optim.SGD, lr=0.1)
    closure = closure_of(optimizer, model, make_batch())
    if is_late:
        optimizer.step(closure)
        optimizer.param_groups[0][name] = value
    before = weights(model)
    closure()
    with pytest.raises(ValueError, match=rf"param_groups\[0\]\['{name}'\] .* whole optimizer.*SAM\(\.\.\., {name}={value}\)"):
        getattr(optimizer, api)(*(() if api == "first_step" else (closure,)))
    assert_same_bits(weights(model), before)
    del optimizer.param_groups[0][name]
    optimizer.step(closure)


def test_such_an_option_of_the_bases_is_the_bases() -> None:
    class Clipping(torch.optim.SGD):
        def __init__(self, params: Any, lr: float, max_grad_norm: float) -> None:
            super().__init__(params, lr)
            self.defaults["max_grad_norm"] = max_grad_norm
            for group in self.param_groups:
                group["max_grad_norm"] = max_grad_norm

    model = make_model()
    base = Clipping(model.parameters(), 0.1, 1.0)
    optimizer = sam_kernels.SAM(model.parameters(), base, max_grad_norm=2.0)
    optimizer.step(closure_of(optimizer, model, make_batch()))
    assert (optimizer.param_groups[0]["max_grad_norm"], optimizer.max_grad_norm) == (1.0, 2.0)
