"""The engine for edges."""
