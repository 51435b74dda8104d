"""Message passing on a graph whose nodes lie on several ranks.

A `Topology` is made once from the edges and from how the nodes lie. Every edge goes to the rank of
its target node, so messages are summed without communication; the source nodes of other ranks that
its edges need, its halo, are found once, and each travels once in a gather, however many edges it
has. (The halo exchange of consistent graph networks: Barwey et al. 2024, arXiv 2410.01657.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ... import comm
from ...comm import groups
from ...comm.route import Route, arrivals, deliver, fetch, find
from ...errors import UnsupportedOpError
from ...rules.rows import entry_counts
from ...spec import Dim, Spec, whole_dims
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import like, local_of

_REDUCE = {"sum": "sum", "max": "amax", "min": "amin"}


class Topology:
    """The edges of a graph, each on the rank of its target, sorted by target.

    edge_index (2, E), int64: source and target node of every edge, plain and the same on all ranks,
    or sharded. sources, targets: any tensors whose dim 0 are the nodes, sharded there
    as their features will be; targets default to sources. All plain: the graph on one device.

    Raises ValueError for another shape or dtype, IndexError for nodes that do not exist,
    UnsupportedOpError where sources and targets are sharded by different mesh axes.

    Cost of making it: for a sharded edge_index each edge's two nodes travel once; then a halo row's
    index. Memory: some integers for each edge of this rank's targets.

    Features (nodes, ...) and values (edges, ...) are sharded along dim 0 as nodes and edges are;
    what other mesh axes cut, such as an ensemble, stays cut.
    """

    mesh: DeviceMesh | None

    def __init__(self, edge_index: Tensor, sources: Tensor, targets: Tensor | None = None) -> None:
        targets = sources if targets is None else targets
        if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.int64:
            raise ValueError(
                f"edge_index (2, E) of int64, not {tuple(edge_index.shape)} of {edge_index.dtype}"
            )
        self._from, self._to = (_rows(x) for x in (sources, targets))
        found = [x for x in (sources, targets, edge_index) if isinstance(x, ShardTensor)]
        if len({x._spec.mesh for x in found}) > 1:
            raise UnsupportedOpError("a graph on different meshes: distribute all on one")
        axes = self._from.axes or self._to.axes
        if found and not (axes and self._from.axes == self._to.axes):
            raise UnsupportedOpError(
                f"sources sharded by mesh axes {self._from.axes}, targets by {self._to.axes}; "
                "shard both along dim 0 by the same"
            )
        self.mesh = found[0]._spec.mesh if found else None
        self._group = comm.group(self.mesh, axes) if self.mesh is not None else "self"
        me = comm.rank(self._group)
        if isinstance(edge_index, ShardTensor):
            edge_index = self._dealt(edge_index)
        self._check(edge_index)
        first, last = self._to.spans[me]
        if isinstance(edge_index, ShardTensor):
            source, rows, order = self._sent(edge_index)
        else:
            mine = (edge_index[1] >= first) & (edge_index[1] < last)
            order = mine.nonzero()[:, 0]
            source, rows = edge_index[0][mine], edge_index[1][mine] - first
        by = rows.argsort(stable=True)
        self._source, self._rows, self._order = source[by], rows[by], order[by]
        sizes = comm.counts(len(rows), rows, self._group)
        self._edges = Dim(edge_index.shape[1], axes, sizes if axes else ())
        self._route = find(self._source, self._from.sizes or (self._from.size,), self._group)
        self._halos: Dim | None = None
        self._made: dict[int, list[Topology]] = {}

    def _check(self, edge_index: Tensor) -> None:
        local = local_of(edge_index)
        bad = 0
        for nodes, rows in zip(local, (self._from, self._to), strict=True):
            bad += int(((nodes < 0) | (nodes >= rows.size)).any())
        if any(comm.counts(bad, local, self._group)):
            raise IndexError(
                f"edge_index names nodes outside 0..{self._from.size - 1} (sources) or "
                f"0..{self._to.size - 1} (targets)"
            )

    def _dealt(self, edge_index: ShardTensor) -> ShardTensor:
        """The edges sharded along dim 1, by the mesh axes that shard the nodes."""
        edges = edge_index._spec.dims[1]
        if edges.axes != self._to.axes:
            edges = Dim(edges.size, self._to.axes, _even(edges.size, len(self._to.sizes)))
        return like(edge_index, Spec(edge_index._spec.mesh, (Dim(2), edges)))

    def _sent(self, edge_index: ShardTensor) -> tuple[Tensor, Tensor, Tensor]:
        """(source, local target, number) of the edges that belong here."""
        spec, edges = edge_index._spec, edge_index._spec.dims[1]
        source, target = edge_index._local
        entries = entry_counts(Spec(spec.mesh, (edges,)), edges.axes)
        rows, numbers = comm.asked(target.contiguous(), self._to.sizes, entries, self._group)
        return comm.take(source.contiguous(), numbers, entries, self._group), rows, numbers

    # edges ----------------------------------------------------------------------------------------

    @property
    def edge_index(self) -> Tensor:
        """(2, E): the edges in the topology's order, for models that index with them.

        Sharded along dim 1 as edges are: what a model sums at their targets stays where it is.
        Nothing is sent.
        """
        to = self._rows + self._to.spans[comm.rank(self._group)][0]
        local = torch.stack([self._source, to])
        return local if self.mesh is None else wrap(local, Spec(self.mesh, (Dim(2), self._edges)))

    @property
    def order(self) -> Tensor:
        """(E,): the number that each edge had in edge_index; sharded as edges are."""
        return self._wrapped(self._order, self._edges)

    def edges(self, values: Tensor) -> Tensor:
        """Values (E, ...) of the edges in edge_index's order, plain or sharded, brought to them."""
        return values[self.order]

    def original(self, values: Tensor) -> Tensor:
        """Values (E, ...) of the edges, in the order of edge_index.

        Each is sent to the rank that has its place in even shards of all; its gradient comes back.
        """
        if self.mesh is None:
            return torch.zeros_like(values).index_add(0, self._order, values)
        local, rest = self._local(values, self._edges)
        rows = Dim(self._edges.size, self._edges.axes, _even(self._edges.size, self._n))
        route = find(self._order, rows.sizes, self._group)
        mine = rows.sizes[comm.rank(self._group)]
        return wrap(deliver(local, route, mine), Spec(self.mesh, (rows, *rest)))

    # messages -------------------------------------------------------------------------------------

    def gather(self, x: Tensor) -> Tensor:
        """(E, ...): the row of each edge's source, of x (sources, ...).

        One message to each rank that needs some; each row of a halo once. Its adjoint likewise.
        """
        local, rest = self._local(x, self._from)
        return self._wrapped(fetch(local, self._route), self._edges, rest)

    def halo(self, x: Tensor) -> Tensor:
        """Of x (sources, ...) the rows that this rank's edges name, its own among them, each once.

        In order of their numbers; sharded along dim 0, as many as each rank needs. As `gather`
        sends; `local` has the edges that start there.
        """
        local, rest = self._local(x, self._from)
        return self._wrapped(arrivals(local, self._route), self._near, rest)

    @property
    def _near(self) -> Dim:
        """The rows of the halos; at first one small message to learn how many they are."""
        # no cached_property, which has one lock for all simulated ranks
        if self._halos is None:
            n = sum(self._route.gets)
            sizes = comm.counts(n, self._rows, self._group) if self.mesh is not None else ()
            self._halos = Dim(sum(sizes), self._to.axes, sizes) if sizes else Dim(n)
        return self._halos

    def gather_targets(self, x: Tensor) -> Tensor:
        """(E, ...): the row of each edge's target, of x (targets, ...). Sends nothing."""
        local, rest = self._local(x, self._to)
        return self._wrapped(local.index_select(0, self._rows), self._edges, rest)

    def scatter(self, messages: Tensor, reduce: str = "sum") -> Tensor:
        """(targets, ...): the messages (E, ...) of each target's edges, reduced. Sends nothing.

        reduce: "sum", "mean", "max" or "min"; 0 for a target without edges. Raises ValueError for
        another, and for messages of another number of edges.
        """
        if reduce not in ("mean", *_REDUCE):
            raise ValueError(f"reduce is {reduce!r}; one of mean, {', '.join(_REDUCE)}")
        local, rest = self._local(messages, self._edges)
        n = self._to.sizes[comm.rank(self._group)] if self._to.axes else self._to.size
        out = local.new_zeros([n, *local.shape[1:]])
        if reduce in ("sum", "mean"):
            out = out.index_add(0, self._rows, local)
        else:
            at = self._rows.view(-1, *[1] * (local.ndim - 1)).expand_as(local)
            out = out.scatter_reduce(0, at, local, _REDUCE[reduce], include_self=False)
        if reduce == "mean":
            # bincount would wait for a GPU, to learn the largest
            ones = torch.ones_like(self._rows)
            degree = self._rows.new_zeros(n).index_add_(0, self._rows, ones).clamp_(min=1)
            out = out / degree.view(-1, *[1] * (out.ndim - 1)).to(out.dtype)
        return self._wrapped(out, self._to, rest)

    # parts ----------------------------------------------------------------------------------------

    def parts(self, number: int) -> list[Topology]:
        """So many topologies, each with a run of every rank's targets and the edges to these.

        Their sources are the rows of `halo`: a part's `gather` sends nothing. Runs have about as
        many edges each. The first call takes one small message.
        """
        if number not in self._made:
            self._made[number] = self._parted(number)
        return self._made[number]

    def _parted(self, number: int) -> list[Topology]:
        edges, rows = len(self._rows), self._rows
        mine = self._to.sizes[comm.rank(self._group)] if self._to.axes else self._to.size
        # a rank without edges shares out its targets by their number
        nth = [(edges or mine) * i // number for i in range(1, number)]
        ends = rows[nth] if edges else rows.new_tensor(nth, dtype=torch.int64)
        cuts = torch.stack([ends, torch.searchsorted(rows, ends)])
        first, last = cuts.new_zeros(2, 1), cuts.new_tensor([[mine], [edges]])
        sizes = torch.cat([first, cuts, last], 1).diff()  # (2, number)
        every = comm.gather(sizes[None], 0, [1] * self._n, self._group).tolist()
        me, near, at = comm.rank(self._group), self._near, 0
        place = self._route.place
        assert place is not None
        found = []
        for i in range(number):
            to, of = (self._cut([t[k][i] for t in every]) for k in (0, 1))
            span = slice(at, at := at + every[me][1][i])
            part = object.__new__(Topology)
            part.mesh, part._group, part._halos, part._made = self.mesh, self._group, None, {}
            part._from, part._to, part._edges = near, to, of
            base, before = (d.spans[me if d.axes else 0][0] for d in (near, of))
            part._rows = rows[span] - int(sizes[0, :i].sum())
            part._source = place[span] + base
            part._order = torch.arange(before, before + len(part._rows), device=rows.device)
            part._route = _here(place[span], sum(self._route.gets))
            found.append(part)
        return found

    def _cut(self, sizes: list[int]) -> Dim:
        axes = self._to.axes
        return Dim(sum(sizes), axes, sizes if axes else ())

    @property
    def _n(self) -> int:
        return comm.size(self._group)

    def _local(self, x: Tensor, rows: Dim) -> tuple[Tensor, tuple[Dim, ...]]:
        """(this rank's rows of x, its other dims), which the axes that cut nodes do not cut."""
        if x.ndim < 1 or x.shape[0] != rows.size:
            raise ValueError(f"{tuple(x.shape)} for {rows.size} rows")
        rest = whole_dims(x.shape[1:])
        if self.mesh is None:
            return x, rest
        if isinstance(x, ShardTensor):
            rest = tuple(d.whole if set(d.axes) & set(rows.axes) else d for d in x._spec.dims[1:])
        return like(x, Spec(self.mesh, (rows, *rest)))._local, rest

    def _wrapped(self, local: Tensor, rows: Dim, rest: Any = ()) -> Tensor:
        return local if self.mesh is None else wrap(local, Spec(self.mesh, (rows, *rest)))


def _here(place: Tensor, rows: int) -> Route:
    """The route to rows that this rank has."""
    distinct, at = torch.unique(place, return_inverse=True)
    return Route(distinct, (len(distinct),), (len(distinct),), at, rows, groups.ALONE)


def _rows(x: Tensor) -> Dim:
    return x._spec.dims[0] if isinstance(x, ShardTensor) else Dim(len(x))


def _even(size: int, n: int) -> tuple[int, ...]:
    """Sizes that differ by one at most."""
    return tuple(size // n + (r < size % n) for r in range(n))
