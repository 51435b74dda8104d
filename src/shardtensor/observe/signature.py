"""What an op's operands are, in few words and numbers, so that ranks can compare them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _pytree as pytree

from .. import cache
from ..later import dt
from ..tensor import ShardTensor

_SHOWN = (Tensor, int, float, complex, str, slice)


def operands(tree: Any, unread: Tensor | None = None) -> dict[str, Any]:
    """Of a tree of arguments: what they are (text), their ranks, values of those that are whole.

    values: for each plain or replicated tensor its dtype and shape, the sum of magnitudes and a
    weighted sum; None for `unread`, whose values do not matter.
    """
    leaves = pytree.tree_leaves(tree, is_leaf=lambda x: isinstance(x, ShardTensor))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    meshes = [x._spec.mesh for x in tensors if isinstance(x, ShardTensor)]
    mesh = next((x for x in (*meshes, *leaves) if isinstance(x, DeviceMesh)), None)
    whole = [x for x in tensors if is_whole(x) and not isinstance(x, dt.DTensor)]
    return {
        "what": ", ".join(map(_name, (x for x in leaves if isinstance(x, _SHOWN)))) or "nothing",
        "ranks": [] if mesh is None else mesh.mesh.flatten().tolist(),
        "values": [
            None if x is unread else _value(x._local if isinstance(x, ShardTensor) else x)
            for x in whole
            if x.layout is torch.strided and x.device.type != "meta"
        ],
    }


def is_whole(x: Any) -> bool:
    """Whether every rank holds all of it: what is no ShardTensor, or a replicated one."""
    return not (isinstance(x, ShardTensor) and (x._spec.varying or x._spec.partial))


def is_one_value(x: Tensor) -> bool:
    """Whether all elements are the same, as in a tensor that only stands for its shape."""
    flat = x.detach().reshape(-1)
    return bool(len(flat) == 0 or ((flat == flat[0]) | (flat != flat)).all())


def _name(x: Any) -> str:
    if isinstance(x, float):
        # ranks may have computed it, each for itself
        return f"{x:.6g}"
    if not isinstance(x, Tensor):
        return repr(x)
    dtype = str(x.dtype).removeprefix("torch.")
    leaf = " that requires grad" if x.is_leaf and x.requires_grad else ""
    return f"{dtype} {x._spec if isinstance(x, ShardTensor) else list(x.shape)}{leaf}"


def _value(x: Tensor) -> tuple[str, float, float]:
    return cache.of_tensor(x, "operands", lambda: _summed(x))


@torch.no_grad()
def _summed(x: Tensor) -> tuple[str, float, float]:
    kind = f"{x.dtype} {list(x.shape)}"
    x = x.detach()
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    v = x.reshape(-1).to(torch.float64).nan_to_num(1.5, 2.5, -2.5)
    # weights without order, so that a permutation shows
    weights = torch.arange(len(v), device=v.device, dtype=torch.float64).mul_(0.7548776662).frac_()
    return kind, v.abs().sum().item(), (v * weights).sum().item()
