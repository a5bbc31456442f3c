"""Optimizers."""

from typing import Any


class SAM:  # placeholder until the next commit
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...


USAM = UnifiedSAM = SAM
