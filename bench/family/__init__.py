"""Whole steps of the family of SAM against the same methods written in Python."""
