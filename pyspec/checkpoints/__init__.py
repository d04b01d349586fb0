"""Checkpoints: where models come from. GGUF files, folders with safetensors, live models; tokenizers and templates."""
