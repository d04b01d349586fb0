"""Sampling: warped distributions, and noise that is keyed by seed and position."""
