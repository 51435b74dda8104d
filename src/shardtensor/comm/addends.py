"""A replicated value as addends, and the cotangents of addends as one replicated value.

Each is the other's adjoint. After `alike` a cotangent counts once, not once for each rank that
holds it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .define import define, run
from .groups import rank


def _addend(x: Tensor, group: str) -> Tensor:
    return x.clone() if rank(group) == 0 else torch.zeros_like(x)


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.group = inputs[1]


addend_op: Any = define(
    "addend(Tensor x, str group) -> Tensor",
    _addend,
    lambda x, group: torch.empty_like(x),
    _keep_group,
    lambda ctx, g: (run(alike_op, g, ctx.group), None),
)
alike_op: Any = define(
    "alike(Tensor x, str group) -> Tensor",
    lambda x, group: x.clone(),
    lambda x, group: torch.empty_like(x),
    _keep_group,
    lambda ctx, g: (run(addend_op, g, ctx.group), None),
)
