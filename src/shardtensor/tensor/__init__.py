"""The tensor itself: a global view over shards, how it is made, cut anew and laid out in memory."""

# imported for what it registers
from . import copies as _copies  # noqa: F401
from .shard_tensor import ShardTensor, wrap

__all__ = ["ShardTensor", "wrap"]
