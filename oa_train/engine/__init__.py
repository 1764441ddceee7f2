"""Running a frozen model while parts of it are read or replaced."""
