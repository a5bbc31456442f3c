"""Importance sampling of single elements against uniform sampling: Unified SAM on ridge regression, at the steps that theory gives."""
