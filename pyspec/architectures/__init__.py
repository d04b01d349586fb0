"""Architectures: one file a family, with its configuration, the names of its tensors, and its forward as ops."""
