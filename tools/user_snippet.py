"""A user's program, checked by ``mypy --strict``: the package is typed, and the overloads of its optimizers resolve.

``make lint`` checks it against the sources, ``make check-wheel`` checks and runs it against an installed wheel.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import sam_kernels
from sam_kernels import functional
from sam_kernels.schedules import Interval

torch.manual_seed(0)
inputs, labels = torch.randn(32, 8), torch.randint(0, 3, (32,))
model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
optimizer = sam_kernels.SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)


def loss_of(inputs: Tensor, labels: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(inputs), labels)
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return loss


def closure() -> Tensor:
    return loss_of(inputs, labels)


before = [param.detach().clone() for param in model.parameters()]
first = optimizer.step(closure)
assert_type(first, Tensor)
assert_type(optimizer.step(loss_of, batch=(inputs, labels), micro_batches=4), Tensor)
assert_type(optimizer.step([closure, closure]), Tensor)
closure()
optimizer.first_step()
closure()
optimizer.second_step()
assert_type(optimizer.skipped_steps, int)

every_other = sam_kernels.ASAM(model.parameters(), torch.optim.AdamW, rho=Interval(0.5, every=2), lr=1e-3)
assert_type(every_other.step(closure), Tensor)
assert_type(functional.grad_norm(list(model.parameters())), Tensor)
if TYPE_CHECKING:  # names are imported on use, and a wrong one is an error all the same: mypy --strict warns of an unused comment
    wrong = sam_kernels.Sam  # type: ignore[attr-defined]
assert optimizer.skipped_steps == 0
assert all(bool((param != old).any()) for param, old in zip(model.parameters(), before, strict=True))
print("one step of each kind: the loss was", round(first.item(), 3))
