"""A layer of a graph by parts of its targets, on all ranks at once.

Messages are many times the nodes, and they are what does not fit. All ranks take a part of their
own targets at the same time; the sources that edges name come once, before. Each part is a
checkpoint: what it makes of its edges is gone when it is done, and made again in backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ... import comm
from ...spec import Dim
from ...tensor import ShardTensor
from .topology import Topology


def chunked(
    layer: Callable[..., Any],
    topology: Topology,
    sources: Tensor,
    targets: Tensor,
    *edges: Tensor,
    chunks: int,
    keep: bool = False,
) -> Any:
    """layer(topology, sources, targets, *edges), computed in so many chunks of targets.

    layer: a function or module of a topology, sources (n, ...), targets (m, ...) and any values of
    edges (E, ...) in the topology's order; it gives a tensor, or a tuple of tensors, of a row for
    each target or each edge, and what it gives of a target depends on the edges of that target
    alone. It is given a topology of the chunk's edges, for which `sources` are those that this
    rank's edges name. keep: without checkpoints, as in inference.

    Every rank takes about 1 / chunks of its own edges at a time. Each halo row travels once, and
    its gradient once back; making the chunks takes one small message.
    Raises ValueError for less than one chunk, and for a result of other rows.
    """
    if chunks < 1:
        raise ValueError(f"chunked: chunks is {chunks}; at least one")
    parts = topology.parts(chunks)
    near = topology.halo(sources)
    given = [_split(topology, targets, topology._to, [p._to for p in parts])]
    given += [_split(topology, e, topology._edges, [p._edges for p in parts]) for e in edges]
    found = []
    for part, *values in zip(parts, *given, strict=True):
        if keep or not torch.is_grad_enabled():
            found.append(layer(part, near, *values))
        else:
            found.append(checkpoint(layer, part, near, *values, use_reentrant=False))
    if isinstance(found[0], tuple):
        return tuple(_joined(topology, parts, list(x)) for x in zip(*found, strict=True))
    return _joined(topology, parts, found)


def _split(topology: Topology, x: Tensor, rows: Dim, dims: list[Dim]) -> list[Tensor]:
    local, rest = topology._local(x, rows)
    me = comm.rank(topology._group)
    sizes = [d.sizes[me] if d.axes else d.size for d in dims]
    return [topology._wrapped(p, d, rest) for p, d in zip(local.split(sizes), dims, strict=True)]


def _joined(topology: Topology, parts: list[Topology], found: list[Tensor]) -> Tensor:
    ways = [(topology._to, [p._to for p in parts]), (topology._edges, [p._edges for p in parts])]
    for fits in (_lies, _long):
        for rows, dims in ways:
            if all(map(fits, found, dims)):
                pairs = [topology._local(x, d) for x, d in zip(found, dims, strict=True)]
                return topology._wrapped(torch.cat([x for x, _ in pairs]), rows, pairs[0][1])
    raise ValueError(
        f"chunked: the layer gave {tuple(found[0].shape)} of a chunk of {parts[0]._to.size} "
        f"targets and {parts[0]._edges.size} edges: a row for each target, or for each edge"
    )


def _lies(x: Tensor, rows: Dim) -> bool:
    return isinstance(x, ShardTensor) and x.ndim > 0 and x._spec.dims[0] == rows


def _long(x: Tensor, rows: Dim) -> bool:
    return x.ndim > 0 and x.shape[0] == rows.size
