"""Checks of the family table, slow reference implementations, and estimates of training memory."""
