"""From measured times to a plan, and from a plan to bound kernels."""
