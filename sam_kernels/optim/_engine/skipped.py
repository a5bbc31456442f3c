"""Whether the step under way is skipped, and how many were: on the device, where nobody waits for the answer."""

from __future__ import annotations

import torch

from sam_kernels.optim._engine.capturable import is_recording, not_recordable

__all__ = ["SkippedSteps"]

_FOLD_EVERY = 1 << 20  # steps after which the float32 count of skipped steps is added to the whole one


class SkippedSteps:
    """``found_inf`` () float32 is set once a gradient of either pass was not finite; ``skipped`` () float32 counts such steps before the
    last."""

    def __init__(self) -> None:
        self.found_inf = torch.zeros((), dtype=torch.float32, device="cpu")
        self.skipped = torch.zeros((), dtype=torch.float32, device="cpu")
        self._skipped_before = torch.zeros((), dtype=torch.int64, device="cpu")  # float32 counts to 2^24
        self._steps_to_fold = _FOLD_EVERY
        self.is_of_last_step = False  # found_inf

    def begin(self, device: torch.device) -> None:
        """A new step, on ``device``: nothing is known to be wrong with it. Raises RuntimeError where a graph is recorded and no step was
        made there before."""
        if self.found_inf.device != device:
            if is_recording(device):
                raise not_recordable("no step was made before; make an eager one first, as torch asks for")
            self.found_inf, self.skipped, self._skipped_before = (
                each.to(device) for each in (self.found_inf, self.skipped, self._skipped_before)
            )
        self._steps_to_fold -= 1
        if self._steps_to_fold <= 0 and not is_recording(device):
            self._steps_to_fold = _FOLD_EVERY
            self._skipped_before += self.skipped.to(torch.int64)
            self.skipped.zero_()
        self.is_of_last_step = True

    def forget_last_step(self) -> None:
        """``found_inf`` is this step's from now on; where no norm has seen to that in passing."""
        if self.is_of_last_step:
            self.skipped.add_(self.found_inf)
            self.found_inf.zero_()
            self.is_of_last_step = False

    def count(self) -> int:
        """Waits for the device."""
        return int((self._skipped_before + self.skipped.to(torch.int64) + self.found_inf.to(torch.int64)).item())
