"""Capture of modules as FX graphs over all time steps."""
