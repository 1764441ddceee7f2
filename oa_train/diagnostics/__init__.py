"""Checks of the family table, slow references, and the memory that a training takes."""
