"""Lenses: predictions read from the residual stream of middle layers."""
