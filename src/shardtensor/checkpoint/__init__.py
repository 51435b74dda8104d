"""Checkpoints of ShardTensors and all beside them, from any number of ranks to any other."""

from .files import Randomness, Saving, finish, latest, load, save, save_async

__all__ = ["Randomness", "Saving", "finish", "latest", "load", "save", "save_async"]
