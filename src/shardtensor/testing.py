"""Hold an op or a model against its single-device run: for tests, yours and the library's."""

from .plan.check.check import assert_parallel
from .ranks.simulate import simulate
from .ranks.testing import (
    On,
    cuts,
    full,
    hold,
    hold_all,
    make_mesh,
    replicated,
    same,
    shard,
    tensors,
)
from .ranks.workers import run_workers

__all__ = [
    "On", "assert_parallel", "cuts", "full", "hold", "hold_all", "make_mesh", "replicated",
    "run_workers", "same", "shard", "simulate", "tensors",
]  # fmt: skip
