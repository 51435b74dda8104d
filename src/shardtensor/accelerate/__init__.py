"""Accelerate: `from shardtensor.accelerate import Accelerator`, with `domain=` and `shard=`."""

from .accelerator import Accelerator

__all__ = ["Accelerator"]
