"""Batch norms around neurons: masked, fused into a neuron, synchronized."""
