"""Adapters leave: as stock LoRA, LoKr, GGUF, or merged into the base model's files."""
