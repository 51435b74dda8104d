"""The tensor itself: a global view over shards, how it is made, cut anew and laid out in memory."""

from .shard_tensor import ShardTensor, wrap

__all__ = ["ShardTensor", "wrap"]
