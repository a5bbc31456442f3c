"""Gradient norms per sample: whole passes against a plain forward and backward pass, Opacus and ``torch.func``."""
