"""Checkpoints: where models come from. GGUF files, folders with safetensors, live models; tokenizers and templates."""

from pyspec.checkpoints.load import from_transformers, load
