"""Circuits: the components that do a task. Names and indices only; no model is needed."""
