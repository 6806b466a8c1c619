"""Measure how long kernels take, choose among them by these times, and cache the times."""
