"""The kernels: each file registers its own."""
