"""Base models: thin adapters over diffusers pipelines, and LoRA."""
