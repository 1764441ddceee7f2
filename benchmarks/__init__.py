"""Benchmarks; each module's docstring lists its measurements."""
