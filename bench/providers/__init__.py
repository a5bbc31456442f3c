"""Who takes part in the comparison of whole steps."""

from bench.providers import compiled, davda54, lean, ours, packages
from bench.providers.base import BASES, RHO, Base, Closure, MicroBatchStepper, Provider, Stepper
from bench.providers.ours import REFERENCE

__all__ = ["BASES", "FASTEST", "PROVIDERS", "REFERENCE", "RHO", "Base", "Closure", "MicroBatchStepper", "Provider", "Stepper"]

PROVIDERS: dict[str, Provider] = {
    provider.name: provider for module in (ours, davda54, packages, lean, compiled) for provider in module.PROVIDERS
}
# Each peer with the fastest base that torch has, and this package's fallback. torch.compile takes minutes to start.
FASTEST = tuple(name for name in PROVIDERS if name.endswith("/fused") or name.startswith("sam_kernels/"))
