"""Workloads on a device: the models of :mod:`bench.workloads`, one more, and single tensors that no cache holds."""

from __future__ import annotations

from bench.workloads import WORKLOADS, Shape, Workload

__all__ = ["GPU_WORKLOADS"]


def _resnet50() -> list[Shape]:
    """torchvision's ResNet-50: bottlenecks of three convolutions, the first of each stage with a fourth beside them."""

    def conv(out: int, channels: int, kernel: int) -> list[Shape]:
        return [(out, channels, kernel, kernel), (out,), (out,)]

    shapes = conv(64, 3, 7)
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv(width, channels, 1) + conv(width, width, 3) + conv(4 * width, width, 1)
            if block == 0:
                shapes += conv(4 * width, channels, 1)
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


GPU_WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("one_1e8", "1 × 10⁸", ((100_000_000,),)),
        WORKLOADS["gpt2_124m"],
        WORKLOADS["resnet18"],
        Workload("resnet50", "ResNet-50", tuple(_resnet50())),
        WORKLOADS["many_tiny"],
        Workload("one_1e9", "1 × 10⁹", ((1_000_000_000,),)),  # last: it is left out where time or memory is short
    )
}
