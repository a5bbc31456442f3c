"""The options of every method, the same for all who take part: those of the authors' code."""

__all__ = ["ALPHA", "KAPPA", "LMBDA", "LOOK_ALPHA", "LOOK_EVERY", "SIGMA", "THETA"]

THETA = 0.9  # VaSSO
SIGMA, LMBDA = 1.0, 0.6  # F-SAM
ALPHA = 0.4  # GSAM
KAPPA = 0.9  # WSAM, decoupled
LOOK_EVERY, LOOK_ALPHA = 5, 0.7  # LookSAM
