"""Running a frozen model with parts of it read or replaced."""
