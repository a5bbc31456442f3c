"""Backends: modules with identical functions. They never import each other, ``functional`` or ``reference``."""
