"""Compile the C++ and CUDA sources and cache the libraries."""
