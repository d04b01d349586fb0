"""Training of the small models that pyspec shows itself on."""
