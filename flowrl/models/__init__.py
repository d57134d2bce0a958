"""Base models are thin adapters over diffusers pipelines, whose weights are loaded and checked."""
