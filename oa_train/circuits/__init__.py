"""Circuits: which components do a task. Names and indices only, no model."""
