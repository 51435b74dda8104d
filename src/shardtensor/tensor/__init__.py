"""The tensor itself: a global view over shards, how it is made, cut anew and laid out in memory."""

from .shard_tensor import ShardTensor, refuse_transforms, wrap

__all__ = ["ShardTensor", "refuse_transforms", "wrap"]
