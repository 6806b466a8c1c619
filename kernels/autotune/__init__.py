"""Measure kernels on this machine and choose between them."""
