"""Embedding: sharded indices look up a table, whole on every rank or cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import comm
from ..dispatch.fallback import fall_back
from ..dispatch.writes import check_writable
from ..errors import UnsupportedOpError
from ..registry import rule, takes_plain
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from ..tensor.redistribute import fit, reduced
from .agreed import agreed
from .pointwise import function_rule


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
    result; of its rows each rank looks up its own, and one all-reduce adds up the results. Else it
    is gathered.
    """
    spec = indices._spec if isinstance(indices, ShardTensor) else None
    if spec is None:
        assert isinstance(weight, ShardTensor)
        spec = Spec(weight._spec.mesh, tuple(Dim(n) for n in indices.shape))
    rows, columns = _kept(weight, spec)
    apart = spec.varying or rows.axes
    if apart and (scale_grad_by_freq or sparse):
        raise UnsupportedOpError(
            f"embedding with indices on {spec}: scale_grad_by_freq and sparse gradients need all "
            "indices on one rank; set both to False"
        )
    varying = tuple(sorted((*spec.varying, *rows.axes, *columns.axes)))
    w, i = fit(spec.mesh, varying, (weight, (rows, columns)), (indices, spec.dims))
    assert w is not None and i is not None
    out = spec.with_dims([*spec.dims, columns])
    if not rows.axes:
        return wrap(torch.embedding(w, i, padding_idx, scale_grad_by_freq, sparse), out)
    assert isinstance(weight, ShardTensor)
    first = rows.offsets[weight._spec.index[0]]
    mine = (i >= first) & (i < first + w.shape[0])
    # an index that no rank has is passed on, so that torch complains
    others = (i >= 0) & (i < rows.size) & ~mine
    own = padding_idx - first if first <= padding_idx < first + w.shape[0] else -1
    if w.shape[0]:
        found = torch.embedding(w, torch.where(others, 0, i - first), own)
    else:
        found = w.new_zeros(*i.shape, w.shape[1]) + w.sum()
    found = torch.where(mine.unsqueeze(-1), found, 0)
    return wrap(comm.reduce(found, comm.group(spec.mesh, rows.axes)), out)


def _kept(weight: Tensor, indices: Spec) -> tuple[Dim, Dim]:
    """How the weight may stay: sharded along axes that do not shard the indices."""
    known = weight._spec if isinstance(weight, ShardTensor) else None
    if known is None or not set(known.varying).isdisjoint(indices.varying) or known.partial:
        return Dim(weight.shape[0]), Dim(weight.shape[1])
    return known.dims[0], known.dims[1]


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
    rows = Dim(weight.shape[0]) if known is None else known.dims[0]
    local = weight._local if isinstance(weight, ShardTensor) else weight
    place = indices._local if isinstance(indices, ShardTensor) else indices
    used = torch.zeros(rows.size, dtype=torch.bool, device=local.device)
    used[place.flatten()] = True
    if isinstance(indices, ShardTensor) and indices._spec.varying:
        used = comm.reduce(used, comm.group(indices._spec.mesh, indices._spec.varying), "max")
    first = rows.offsets[known.index[0]] if known is not None and rows.axes else 0
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
    return wrap(local, spec.with_dims([*spec.dims, Dim(num_classes)]))
