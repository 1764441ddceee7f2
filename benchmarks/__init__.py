"""Timings, side by side; see each module for what it measures."""
