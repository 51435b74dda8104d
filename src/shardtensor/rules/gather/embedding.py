"""Embedding: sharded indices look up a table, whole on every rank or cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _torch, comm
from ..._torch.probe import is_fake
from ...dispatch.fallback import fall_back
from ...dispatch.writes import check_writable
from ...errors import UnsupportedOpError
from ...registry import rule, takes_plain
from ...spec import Dim
from ...tensor import ShardTensor, wrap
from ...tensor.apart import of_rows
from ...tensor.redistribute import local_of, reduced
from .. import labels
from ..agreed import agreed
from ..empty import cut
from ..pointwise import function_rule


@function_rule("embedding_bag")
def embedding_bag(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As one op: the composite would choose a kernel without a gradient."""
    return fall_back(func, args, kwargs)


@rule("embedding")
def embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> ShardTensor:
    """Rows of weight (V, C) for each index.

    A weight sharded along other mesh axes than the indices stays so: its columns are columns of the
    result; of its rows each rank looks up its own, and one all-reduce adds up the results. What the
    same mesh axis cuts is gathered.
    """
    # the indices choose first
    p = labels.plan("v c, ... -> ... c", weight, indices, order=(1, 0))
    parted = p.varying != p.dims["c"].axes
    if parted and (sparse or (scale_grad_by_freq and _torch.is_tracing())):
        raise UnsupportedOpError(
            f"embedding with indices on {p.spec(p.terms[1])}: sparse gradients, and compiled ones "
            "with scale_grad_by_freq, need all indices on one rank; set both to False"
        )
    w, i = p.fit((weight, indices))
    if parted and scale_grad_by_freq:
        w, scale_grad_by_freq = _scaled(p, w, i), False
    same = not p.spec(p.terms[1]).varying
    if not p.summed:
        rest = (padding_idx, scale_grad_by_freq, sparse)
        return p.result(of_rows(weight, same, _looked_up, w, i, *rest))
    rows = p.spec(("v",))
    ((first, last),) = rows.spans
    mine = (i >= first) & (i < last)
    # an index that no rank has is passed on, so that torch complains
    others = (i >= 0) & (i < rows.shape[0]) & ~mine
    own = padding_idx - first if first <= padding_idx < last else -1
    at = torch.where(others, 0, i - first)
    if not w.shape[0]:
        w, at = w.new_zeros(1, w.shape[1]) + w.sum(), torch.where(others, 0, -1)
    found = of_rows(weight, same, _looked_up, w, at, own)
    return p.result(torch.where(mine.unsqueeze(-1), found, 0))


def _scaled(p: labels.Plan, weight: Tensor, indices: Tensor) -> Tensor:
    """Rows whose gradients are divided by how often all ranks together look them up."""
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return weight
    rows, own = p.spec(("v",)), p.spec(p.terms[1])
    at = indices.flatten().clamp(0, max(0, rows.shape[0] - 1)).long()
    times = weight.new_zeros(rows.shape[0], dtype=torch.int64)
    times = times.scatter_add(0, at, torch.ones_like(at))
    if own.varying:
        times = comm.reduce(times, comm.group(own.mesh, own.varying))
    ((first, last),) = rows.spans
    share = times[first:last, None].clamp(min=1)
    found = weight.view_as(weight)
    found.register_hook(lambda g: g / share)
    return found


def _looked_up(weight: Tensor, indices: Tensor, *rest: Any) -> Tensor:
    """torch.embedding; where no index is there, of one: torch's second derivative needs some."""
    if indices.numel() or not weight.shape[0]:
        return torch.embedding(weight, indices, *rest)
    shape = (*indices.shape, weight.shape[1])
    one = indices.new_zeros([max(1, n) for n in indices.shape])
    return cut(torch.embedding(weight, one, *rest), shape)


@rule("embedding_renorm_")
@takes_plain
def embedding_renorm_(
    weight: Tensor, indices: Tensor, max_norm: float, norm_type: float = 2.0
) -> Tensor:
    """Scales down in place the rows that any rank looks up, if they are longer than max_norm."""
    known = weight._spec if isinstance(weight, ShardTensor) else None
    if isinstance(weight, ShardTensor):
        check_writable(weight, "embedding_renorm_")
        if weight._spec.dims[1].axes:
            raise UnsupportedOpError(
                f"embedding with max_norm, of a table on {known}, which cuts its rows; "
                "redistribute it to Replicate or to Shard(0)"
            )
    local, place = local_of(weight), local_of(indices)
    # the last flag: some rank looks up a row that is not there
    n = weight.shape[0]
    used = torch.zeros(n + 1, dtype=torch.bool, device=local.device)
    used[torch.where((place < 0) | (place >= n), n, place).flatten()] = True
    if isinstance(indices, ShardTensor) and indices._spec.varying:
        used = comm.reduce(used, comm.group(indices._spec.mesh, indices._spec.varying), "max")
    if used.device.type == "cpu" and not is_fake(used) and used[-1]:
        raise IndexError("index out of range in self")
    first = 0 if known is None else known.offset[0]
    own = used[first : first + local.shape[0]].nonzero().flatten()
    torch.embedding_renorm_(local, own, max_norm, norm_type)
    return weight


@rule("one_hot")
def one_hot(input: ShardTensor, num_classes: int = -1) -> ShardTensor:
    """Of sharded indices; of one that is out of range all ranks learn."""
    x = reduced(input)
    if num_classes == -1:
        if not x.numel():
            raise RuntimeError("Can not infer total number of classes from empty tensor.")
        num_classes = int(x.max()) + 1
    spec = x._spec
    run = lambda: torch.nn.functional.one_hot(x._local, num_classes)  # noqa: E731
    if x.device.type == "cpu":
        why = "Class values must be non-negative and smaller than num_classes, on {0} other ranks."
        local = agreed(run, spec, spec.varying, RuntimeError, why)
    else:
        local = run()
    return wrap(local, spec.insert(x.ndim, Dim(num_classes)))
