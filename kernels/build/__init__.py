"""Compile the C++ and CUDA sources and keep what was built."""
