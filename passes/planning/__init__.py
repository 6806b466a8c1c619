"""Passes that measure kernels and layers, choose a plan from the times, and write the plan into the graph."""
