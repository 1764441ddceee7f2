"""Learned ablations and sparse circuit masks for Hugging Face transformers."""

__version__ = "0.1.0"
