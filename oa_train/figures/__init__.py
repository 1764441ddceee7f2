"""Pictures of results: arrays in, matplotlib figures out. Nothing here reads files or knows models."""
