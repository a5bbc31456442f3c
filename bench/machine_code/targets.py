"""Processors that code is made for, and how many threads of a kernel one of their multiprocessors holds."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TARGETS", "Target", "reason_missing"]


@dataclass(frozen=True)
class Target:
    """A processor as the compiler and the scheduler know it. "Multiprocessor" is NVIDIA's word for AMD's compute unit."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    threads: int  # most a multiprocessor holds
    registers: int  # of a multiprocessor, in 32 bits
    register_unit: int  # a thread's registers are rounded up to a multiple of it
    shared: int  # bytes of a multiprocessor
    reserved_shared: int  # bytes of each block that the driver takes

    def resident_threads(self, registers: int, shared: int, threads: int) -> int:
        """Threads of a kernel that are resident at once. threads: of one block."""
        rounded = -(-max(registers, 1) // self.register_unit) * self.register_unit
        warps = self.registers // (rounded * self.warp_size)
        blocks = min(self.threads // threads, warps // (threads // self.warp_size), self.shared // max(shared + self.reserved_shared, 1))
        return min(blocks, 32) * threads


def _nvidia(name: str, arch: int, shared: int) -> Target:
    return Target(name, "cuda", arch, 32, 2048, 65536, 8, shared * 1024, 1024)


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD Instinct MI300 Instruction Set Architecture: four
# units, each of 512 registers for every one of 64 lanes and of at most 8 wavefronts.
TARGETS = {
    target.name: target
    for target in (
        _nvidia("sm_80", 80, 164),
        _nvidia("sm_90", 90, 228),
        _nvidia("sm_100", 100, 228),
        Target("gfx942", "hip", "gfx942", 64, 2048, 4 * 512 * 64, 8, 64 * 1024, 0),
    )
}


def reason_missing(name: str) -> str | None:
    """None where this Triton can compile for a target, otherwise why not (until 3.5 it needs ROCm's linker for AMD)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    target = TARGETS[name]
    try:
        make_backend(GPUTarget(target.backend, target.arch, target.warp_size)).hash()
    except Exception as error:  # whatever its tools raise
        return str(error)
    return None
