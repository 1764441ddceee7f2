"""Frozen Hugging Face models: loading them, naming their parts, attaching functions to them."""
