"""Neurons whose batch is spread over ranks."""
