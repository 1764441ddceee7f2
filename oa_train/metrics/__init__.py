"""Measures of behaviour, from logits and token ids alone."""
