"""Compiled local programs, guarded by the Python state that they read."""
