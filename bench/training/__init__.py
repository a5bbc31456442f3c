"""Whole training steps: what SAM costs beside the base optimizer, and how much of a step is the optimizer."""
