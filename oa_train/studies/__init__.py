"""Studies: questions asked of trained circuits and of models."""
