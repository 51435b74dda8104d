"""Halos and rings of local tensors."""
