"""Validation of the operations of gradient norms per sample."""
