"""What a warm step of message passing launches and waits for on CUDA: one rank of n beside plain.

    python benchmarks/launches_graph.py [--ranks 8]
    FOLDER/run python benchmarks/launches_graph.py    (pretended: benchmarks/pretended/README.md)

Counted as by `launches.py`. A silent world sends nothing, so what an edge list needs of others is
found here, once, as if all ranks had its like; then a step runs as it does on many. Nodes lie along
a line, each with an edge to and from the three next on both sides. PyTorch Geometric's layers are
counted where it is installed.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import launches
import torch
from torch import Tensor, nn

import shardtensor as st
from shardtensor import comm
from shardtensor.comm import groups, route
from shardtensor.ops.graph import topology
from shardtensor.rules import rows

NODES, NEAR, WIDTH, LAYERS = 4096, (-3, -2, -1, 1, 2, 3), 32, 4


def edges() -> Tensor:
    """(2, E) on the host: sources and targets."""
    to = torch.arange(NODES).repeat_interleave(len(NEAR))
    return torch.stack([(to + torch.tensor(NEAR).repeat(NODES)) % NODES, to])


# what values decide, by the host's edges ---------------------------------------------------------


def found(index: Tensor, sizes: Sequence[int], group: str, _: int = 1) -> route.Route:
    """`route.find`, as if every rank gave as many rows to each as it gets."""
    distinct, place = torch.unique(index.cpu(), return_inverse=True)
    ends = torch.searchsorted(distinct, torch.tensor([0, *accumulate(sizes)])).diff().tolist()
    mine = torch.arange(len(distinct)) % sizes[groups.rank(group)]
    way = tuple(ends)
    return route.Route(mine.cuda(), way, way, place.cuda(), max(sizes), group)


def asked(index: Tensor, sizes: Sequence[int], counts: Sequence[int], group: str) -> Any:
    """`comm.asked` for the targets of all edges."""
    me, to = groups.rank(group), edges()[1]
    first = sum(sizes[:me])
    inside = (to >= first) & (to < first + sizes[me])
    return (to[inside] - first).cuda(), inside.nonzero()[:, 0].cuda()


def looked_at(at: Tensor, *rest: Any) -> Tensor:
    """`rows.normal` without errors."""
    torch.stack(at.aminmax()).tolist()
    return at.long()


def as_if_values_were_there() -> None:
    """Of a silent world and a pretended GPU, where no index has values that decide."""
    rows.find = topology.find = found
    rows.normal = looked_at
    comm.asked = asked
    comm.counts = lambda n, like, group: (n,) * groups.size(group)


# models ------------------------------------------------------------------------------------------


class Messages(nn.Module):
    """Messages made of both ends of an edge, and gathered at its target by `gather`."""

    def __init__(self, gather: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.edge, self.node = (
            nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(LAYERS)) for _ in range(2)
        )
        self.gather = gather
        self.register_buffer("edge_index", edges())

    def forward(self, x: Tensor) -> Tensor:
        source, to = self.edge_index
        for edge, node in zip(self.edge, self.node, strict=True):
            messages = edge(torch.cat([x[source], x[to]], -1)).relu()
            x = x + node(torch.cat([x, self.gather(x, to, messages)], -1))
        return x


def added(x: Tensor, to: Tensor, messages: Tensor) -> Tensor:
    return torch.zeros_like(x).index_add(0, to, messages)


def scattered(x: Tensor, to: Tensor, messages: Tensor) -> Tensor:
    zeros = messages.new_zeros(len(x), messages.shape[1])
    return zeros.scatter_add_(0, to[:, None].expand_as(messages), messages)


def largest(x: Tensor, to: Tensor, messages: Tensor) -> Tensor:
    return x.scatter_reduce(0, to[:, None].expand_as(messages), messages, "amax")


class OnTopology(nn.Module):
    """The same on a `Topology`, which is made once."""

    def __init__(self) -> None:
        super().__init__()
        self.edge = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(LAYERS))
        self.graph: st.graph.Topology | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.graph is None:
            # on the host, as values decide what it is made of
            self.graph = g = st.graph.Topology(edges(), x)
            g._source, g._rows, g._order = (t.cuda() for t in (g._source, g._rows, g._order))
            if not isinstance(x, st.ShardTensor):
                way = g._route
                g._route = way._replace(rows=way.rows.cuda(), place=way.place.cuda())
        for edge in self.edge:
            ends = torch.cat([self.graph.gather(x), self.graph.gather_targets(x)], -1)
            x = x + self.graph.scatter(edge(ends).relu(), "mean")
        return x


class Layers(nn.Module):
    """Layers of PyTorch Geometric."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(LAYERS))
        self.register_buffer("edge_index", edges())

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, self.edge_index).relu()
        return x


def models() -> dict[str, Callable[[], nn.Module]]:
    every: dict[str, Callable[[], nn.Module]] = {
        "index_add": lambda: Messages(added),
        "scatter_add_": lambda: Messages(scattered),
        "scatter_reduce": lambda: Messages(largest),
        "Topology": OnTopology,
    }
    try:
        from torch_geometric import nn as pyg
    except ImportError:
        return every
    sizes = WIDTH, WIDTH
    return every | {
        "SAGEConv": lambda: Layers(lambda: pyg.SAGEConv(*sizes)),
        "SAGEConv, largest": lambda: Layers(lambda: pyg.SAGEConv(*sizes, aggr="max")),
        "GCNConv, cached": lambda: Layers(lambda: pyg.GCNConv(*sizes, cached=True)),
        "GATConv": lambda: Layers(lambda: pyg.GATConv(*sizes, add_self_loops=False)),
        "TransformerConv": lambda: Layers(lambda: pyg.TransformerConv(*sizes)),
        "EdgeConv": lambda: Layers(lambda: pyg.EdgeConv(nn.Linear(2 * WIDTH, WIDTH))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=8)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if launches.PRETENDED:
        launches.as_pretended()
    as_if_values_were_there()
    head = "kernels", "copies", "syncs", "collectives", "bytes"
    print(f"{'':44}" + "".join(f"{k:>12}" for k in head))
    for name, build in models().items():
        launches.STEPS[name] = build, (NODES, WIDTH), 0, 1
        plain, sharded = launches.small(name, options.ranks, False)
        launches.shown(f"{name}, plain", plain)
        launches.shown(f"{name}, one of {options.ranks}", sharded)


if __name__ == "__main__":
    main()
