"""Steps of Reweighted SAM over a step of SAM, and how well each kind of norms ranks the samples."""
