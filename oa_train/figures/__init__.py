"""Figures of results: arrays in, matplotlib figures out. Nothing here reads files or depends on models."""
