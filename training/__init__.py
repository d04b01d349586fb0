"""Training: small models that pyspec shows itself on, and codebooks of a model's cache."""
