"""Triton kernels, one file per op. Importing this package imports nothing."""
