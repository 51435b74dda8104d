"""Random programs: chains of ops on randomly sharded tensors, for hypothesis."""

# imported for the steps that they register
from . import moves, steps  # noqa: F401
from .draw import programs

__all__ = ["programs"]
