"""Neurons whose batch is distributed over ranks."""
