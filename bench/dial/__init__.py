"""The dial: what cheaper variants of SAM cost, and what share of its gain they keep, on tasks of seconds."""
