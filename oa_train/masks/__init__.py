"""Distributions over masks and penalties on them; nothing here knows a model."""
