"""How the times of kernels are measured, and what is chosen by them."""
