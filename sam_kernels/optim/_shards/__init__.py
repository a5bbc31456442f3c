"""Parameters that are DTensors: the rank's own part of each, and sums over the ranks of their meshes."""
