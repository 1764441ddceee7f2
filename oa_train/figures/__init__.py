"""Figures of results: arrays and estimates in, matplotlib figures out. Nothing here reads files or uses models."""
