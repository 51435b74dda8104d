"""Optimizers whose steps torch does not have for parameters in shards: refused before the step."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer

from .._torch.kernels import MASKED_DTENSORS
from ..errors import UnsupportedOpError
from ..later import dt

# by name: transformers has an Adafactor, too
_NOT = {
    "Adafactor": "torch's norms of their rows and columns are wrong numbers; take AdamW",
    "Rprop": "torch before 2.15 cannot write to theirs by a mask; take AdamW",
}
_FUSED = ("SGD", "Adagrad")


def check_sharded(optimizer: Optimizer) -> None:
    """Raise UnsupportedOpError where torch has no right step for weights in shards."""
    names = {c.__name__ for c in type(optimizer).__mro__}
    for group in optimizer.param_groups:
        sharded = [p for p in group["params"] if _is_sharded(p)]
        if not sharded:
            continue
        found = sorted(names & set(_NOT))
        why = _NOT[found[0]] if found else None
        if found == ["Rprop"] and MASKED_DTENSORS:
            lists = "torch has no foreach kernel for them; give foreach=False"
            why = lists if group.get("foreach") else None
        if group.get("fused") and names & set(_FUSED):
            why = "torch has no fused kernel for them; give fused=False"
        if "LBFGS" in names and not all(map(_is_even, sharded)):
            why = "torch makes one vector of them only where all shards are even; take AdamW"
        if why is not None:
            raise UnsupportedOpError(
                f"{type(optimizer).__name__} over parameters in shards (fsdp, tensor_parallel): "
                f"{why}, or leave the weights whole"
            )


def _is_sharded(p: Any) -> bool:
    return isinstance(p, dt.DTensor) and any(not x.is_replicate() for x in p.placements)


def _is_even(p: Any) -> bool:
    for dim, size in enumerate(p.shape):
        cut = [p.device_mesh.size(a) for a, x in enumerate(p.placements) if x.is_shard(dim)]
        if size % math.prod(cut):
            return False
    return True
