"""The papers' experiments, small: Unified SAM (arXiv 2503.02225), convergence (arXiv 2401.08060), m-sharpness (arXiv 2509.18001)."""
