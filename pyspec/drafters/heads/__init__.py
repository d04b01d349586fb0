"""Trained draft heads: small models that guess from the target's own residual stream."""
