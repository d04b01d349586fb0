"""Benchmarks that come with the package: pyspec bench."""
