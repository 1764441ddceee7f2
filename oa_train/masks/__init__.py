"""Distributions over masks, and penalties on them; nothing here depends on a model."""
