"""Transformers: `from shardtensor.transformers import Trainer`, with `domain=` and `shard=`."""

from .trainer import Trainer

__all__ = ["Trainer"]
