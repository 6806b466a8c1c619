"""Batch norms next to neurons: masked, fused with a neuron, synchronized over ranks."""
