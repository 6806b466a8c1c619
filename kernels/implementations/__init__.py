"""Implementations of the neuron op; each module registers its kernels on import."""
