"""Replacements of ablated units: zeros, means, learned constants, values of other runs."""
