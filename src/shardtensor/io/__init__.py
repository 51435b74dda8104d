"""Reading samples: each rank only what it holds."""

from .sharded import read_sharded
from .well import WellFile, write_well

__all__ = ["WellFile", "read_sharded", "write_well"]
