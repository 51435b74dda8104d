"""A graph of several kinds of nodes, cut over a mesh as the grid is.

An encoder maps a grid to the nodes of a hidden mesh, a processor links these, a decoder maps them
back. The grid is cut as its data are; hidden nodes go to the rank that has most of their
neighbours, edges to that of their target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ... import comm
from ...spec import Dim, Spec
from ...tensor import ShardTensor, wrap
from ..points import Partition
from . import files
from .topology import Topology

Edge = tuple[str, str]


class Graph:
    """What `cut` found: where nodes and edges lie, and how their values get there.

    nodes: of each kind a `points.Partition`. edges: of each pair of kinds its `Topology`, in the
    numbers that shards have; `.edges(values)` brings values (E, ...) in the order of the given edge
    list to it, once: each travels to the rank of its edge.
    """

    nodes: dict[str, Partition]
    edges: dict[Edge, Topology]

    def __init__(self, nodes: dict[str, Partition], edges: dict[Edge, Topology]) -> None:
        self.nodes, self.edges = nodes, edges

    def shard(self, kind: str, x: Tensor) -> ShardTensor:
        """Values (N, ...) of a kind of nodes, sharded along dim 0; plain ones send nothing."""
        return self.nodes[kind].shard(x)

    def restore(self, kind: str, x: Tensor) -> ShardTensor:
        """What `shard` made, or anything (N, ...) like it, in the order of the given numbers."""
        return self.nodes[kind].restore(x)

    def place(
        self,
        model: nn.Module,
        nodes: Mapping[str, str | Sequence[str]],
        edges: Mapping[Edge, str | Sequence[str]],
    ) -> None:
        """Buffers of an unmodified model, by the kind that they have values of, become shards.

        Names as in the model's state_dict. nodes: buffers (N, ...). edges: buffers (E, ...), and
        edge lists (2, E) of int64, in the order of the edge list given to `cut`. What the model
        computes from them follows. Raises ValueError for a name that is no buffer or has other
        rows, and where nodes or edges are numbered anew while a parameter has a row for each of
        them: number them so before the model is made (`follow`).
        """
        named: dict[Any, str | Sequence[str]] = {**nodes, **edges}
        buffers = dict(model.named_buffers(remove_duplicate=False))
        made = {}
        for kind, names in named.items():
            for name in (names,) if isinstance(names, str) else names:
                if name not in buffers:
                    raise ValueError(f"place: {name!r} is no buffer; buffers: {sorted(buffers)}")
                made[name] = self._placed(kind, name, buffers[name])
            self._check_parameters(kind, model)
        for name, x in made.items():
            path, _, key = name.rpartition(".")
            model.get_submodule(path)._buffers[key] = x

    def _placed(self, kind: Any, name: str, x: Tensor) -> ShardTensor:
        if isinstance(kind, str):
            return self.nodes[kind].shard(x)
        topology = self.edges[kind]
        size = topology._edges.size
        if x.dtype == torch.int64 and tuple(x.shape) == (2, size):
            return self._renumbered(kind, name, x)
        if not x.ndim or x.shape[0] != size:
            raise ValueError(f"place: {name!r} of shape {tuple(x.shape)} for {size} edges {kind}")
        found = topology.edges(x)
        assert isinstance(found, ShardTensor)
        return found

    def _renumbered(self, kind: Edge, name: str, x: Tensor) -> ShardTensor:
        """An edge list, in which nodes of one kind may be numbered after those of the other."""
        topology = self.edges[kind]
        index: Any = topology.edge_index
        given = torch.stack(
            [self.nodes[k].order[i] for k, i in zip(kind, index._local, strict=True)]
        )
        off = x[:, topology._order] - given
        own = off[:, :1] if len(topology._order) else off.new_zeros(2, 1)
        same = bool((off == own).all())
        told = torch.cat([own[:, 0], own.new_tensor([same, len(topology._order) > 0])])
        n = comm.size(topology._group)
        every = comm.gather(told[None], 0, [1] * n, topology._group).tolist()
        shifts = {tuple(row[:2]) for row in every if row[3]}
        if len(shifts) > 1 or not all(row[2] for row in every):
            raise ValueError(
                f"place: {name!r} is another edge list than that of {kind} in graph.cut"
            )
        shift = shifts.pop() if shifts else (0, 0)
        return wrap(index._local + index._local.new_tensor(shift)[:, None], index._spec)

    def _check_parameters(self, kind: Any, model: nn.Module) -> None:
        by = self.nodes[kind] if isinstance(kind, str) else self.edges[kind]
        if in_order(by):
            return
        n = len(by.order) if isinstance(by, Partition) else by._edges.size
        for name, p in model.named_parameters():
            if p.ndim and p.shape[0] == n:
                raise ValueError(
                    f"place: {kind!r} is numbered anew, and the parameter {name!r} has {n} rows: "
                    "number nodes by st.graph.follow, and sort edges by target, before the model "
                    "is made"
                )


def in_order(by: Partition | Topology) -> bool:
    """Whether nodes or edges lie in the order of the given numbers."""
    if isinstance(by, Partition):
        return bool((by.order == torch.arange(len(by.order), device=by.order.device)).all())
    order, first = by._order, by._edges.spans[comm.rank(by._group) if by._edges.axes else 0][0]
    bad = int((order != torch.arange(first, first + len(order), device=order.device)).any())
    return not any(comm.counts(bad, order, by._group))


def follow(edge_index: Tensor, targets: int) -> Tensor:
    """The order (targets,) of nodes along the numbers of their sources, as plain numbers.

    A hidden mesh numbered so follows its grid, for any number of ranks: where the grid's numbers
    run along a curve or row by row, shards of both are beside each other. edge_index (2, E): from
    the grid to the nodes. By the mean of the sources' numbers; nodes without edges come last. Each
    rank computes it from the whole list; nothing is sent.
    """
    source, target = edge_index
    count = torch.zeros(targets, dtype=torch.float64, device=target.device)
    total = count.index_add(0, target, source.double())
    count = count.index_add(0, target, torch.ones_like(target, dtype=torch.float64))
    return torch.where(count > 0, total / count, torch.inf).argsort(stable=True)


def cut(
    nodes: Mapping[str, Tensor | int],
    edges: Mapping[Edge, Tensor],
    *,
    folder: str | Path | None = None,
) -> Graph:
    """The nodes of all kinds and the edges between them, cut over a mesh.

    nodes: of each kind either a ShardTensor whose dim 0 are its nodes, cut as their values will be
    (one at least), or their number: these are cut by their neighbours, each node to the rank that
    has most of them. edges: (from, to) -> an edge list (2, E) of int64, plain and the same on all
    ranks.
    folder: where what was found is kept, a file for each rank: read where it was made of the same
    edges for the same cut, else made anew and written. All ranks must reach the folder's files that
    they wrote.

    Each rank reads all edge lists: O(E log E) work and some integers an edge, once; then, for each
    edge list, it sends an index for each row of its halo. Raises ValueError for kinds that no edge
    joins to one that is cut and for edge lists of another shape or of unknown kinds, IndexError for
    nodes that do not exist.
    """
    mesh, known = _checked(nodes, edges)
    axes = next(iter(known.values())).axes
    group = comm.group(mesh, axes)
    device = next(iter(edges.values())).device
    marks = files.Marks(known, edges, nodes)
    found = files.read(folder, marks, mesh, axes, group) if folder is not None else None
    if found is not None:
        return Graph(*found)
    as_given = torch.arange(max(d.size for d in known.values()), device=device)
    parts = {
        k: Partition(mesh, axes, as_given[: d.size], as_given[: d.size], tuple(d.sizes))
        for k, d in known.items()
    }
    while len(parts) < len(nodes):
        new = _next(parts, nodes, edges)
        parts[new] = _by_neighbours(new, _number(nodes[new]), parts, edges)
    made = {}
    for (a, b), e in edges.items():
        numbers = torch.stack([parts[a].inverse[e[0]], parts[b].inverse[e[1]]])
        made[a, b] = Topology(numbers, *(_of(parts[k]) for k in (a, b)))
    if folder is not None:
        files.write(folder, marks, parts, made, group)
    return Graph(parts, made)


def _checked(
    nodes: Mapping[str, Tensor | int], edges: Mapping[Edge, Tensor]
) -> tuple[DeviceMesh, dict[str, Dim]]:
    """The mesh, and how the kinds of nodes lie that are cut already; raises what `cut` raises."""
    given = {k: x._spec for k, x in nodes.items() if isinstance(x, ShardTensor)}
    if not given or any(not s.dims[0].axes for s in given.values()):
        raise ValueError(
            "graph.cut: one kind of nodes at least is a ShardTensor sharded along dim 0"
        )
    for (a, b), e in edges.items():
        if a not in nodes or b not in nodes:
            raise ValueError(f"graph.cut: edges {(a, b)} of nodes {sorted(nodes)}")
        if isinstance(e, ShardTensor) or e.ndim != 2 or e.shape[0] != 2 or e.dtype != torch.int64:
            raise ValueError(f"graph.cut: edges {(a, b)}: a plain edge list (2, E) of int64")
        for kind, at in ((a, e[0]), (b, e[1])):
            n = _number(nodes[kind])
            if len(at) and not 0 <= int(at.min()) <= int(at.max()) < n:
                raise IndexError(
                    f"graph.cut: edges {(a, b)} name nodes {kind!r} outside 0..{n - 1}"
                )
    if len({(s.mesh, s.dims[0].axes) for s in given.values()}) > 1:
        raise ValueError("graph.cut: all kinds of nodes on one mesh, cut by the same axes")
    if not edges:
        raise ValueError("graph.cut: no edges")
    return next(iter(given.values())).mesh, {k: s.dims[0] for k, s in given.items()}


def _number(nodes: Tensor | int) -> int:
    return nodes if isinstance(nodes, int) else len(nodes)


def _of(part: Partition) -> ShardTensor:
    """A tensor that has nothing but its rows, which lie as a partition."""
    rows = Dim(len(part.order), part.axes, part.sizes)
    spec = Spec(part.mesh, (rows, Dim(0)))
    return wrap(part.order.new_empty(tuple(spec.local_shape)), spec)


def _next(
    parts: Mapping[str, Partition], nodes: Mapping[str, Any], edges: Mapping[Edge, Tensor]
) -> str:
    """The kind of nodes that most edges join to kinds that are cut."""
    joined: dict[str, int] = {}
    for (a, b), e in edges.items():
        for new, old in ((a, b), (b, a)):
            if new not in parts and old in parts:
                joined[new] = joined.get(new, 0) + e.shape[1]
    if not joined:
        left = sorted(set(nodes) - set(parts))
        raise ValueError(f"graph.cut: no edges join {left} to nodes that are cut")
    return max(joined, key=lambda k: joined[k])


def _by_neighbours(
    kind: str, n: int, parts: Mapping[str, Partition], edges: Mapping[Edge, Tensor]
) -> Partition:
    """Each node to the rank of most of its neighbours; without any, to that of the node before."""
    some = next(iter(parts.values()))
    ranks = len(some.sizes)
    votes = []
    for (a, b), e in edges.items():
        for at, (new, old) in enumerate(((a, b), (b, a))):
            if new == kind and old in parts:
                ends = torch.tensor(parts[old].sizes, device=e.device).cumsum(0)
                owner = torch.bucketize(parts[old].inverse[e[1 - at]], ends, right=True)
                votes.append(e[at] * ranks + owner)
    pairs, counts = torch.cat(votes).unique(return_counts=True)
    node, owner = pairs // ranks, pairs % ranks
    # of as many votes the first rank: the last to be written has the most
    by = (counts * ranks + ranks - 1 - owner).argsort(stable=True)
    wanted = torch.full((n,), -1, dtype=torch.int64, device=pairs.device)
    for_each = torch.zeros(n, dtype=torch.int64, device=pairs.device)
    for_each = for_each.scatter_reduce(0, node[by], torch.arange(len(by), device=by.device), "amax")
    wanted[node] = owner[by][for_each[node]]
    wanted = _filled(wanted)
    order = wanted.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(n, device=order.device)
    sizes = torch.bincount(wanted, minlength=ranks).tolist()
    return Partition(some.mesh, some.axes, order, inverse, tuple(sizes))


def _filled(wanted: Tensor) -> Tensor:
    """-1 replaced by what stands before it, at the start by rank 0."""
    at = torch.arange(len(wanted), device=wanted.device)
    last = torch.where(wanted >= 0, at, 0).cummax(0).values if len(wanted) else at
    return wanted[last].clamp(min=0)
