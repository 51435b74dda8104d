"""What `graph.cut` found, kept in a file for each rank; only what was made of the same is read."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ... import comm
from ...comm.route import Route
from ...spec import Dim
from ..points import Partition
from .topology import Topology

FORMAT = 2
Edge = tuple[str, str]


class Marks(NamedTuple):
    """What a graph is made of: the cuts that were given, the edges, the numbers of nodes."""

    cuts: Mapping[str, Dim]
    edges: Mapping[Edge, Tensor]
    nodes: Mapping[str, Any]

    def told(self) -> dict[str, Any]:
        """The same as plain numbers; edges as their digests."""
        return {
            "format": FORMAT,
            "cuts": {k: list(d.sizes) for k, d in self.cuts.items()},
            "nodes": {k: n if isinstance(n, int) else len(n) for k, n in self.nodes.items()},
            "edges": {"\n".join(k): _sum(e) for k, e in self.edges.items()},
        }


def _sum(edge_index: Tensor) -> list[int | str]:
    """(number of edges, a digest of all their nodes in their order)."""
    # of contiguous memory, which a view of other strides is not
    rows = edge_index.contiguous().cpu().numpy().tobytes()
    return [edge_index.shape[1], hashlib.blake2b(rows, digest_size=16).hexdigest()]


def _file(folder: str | Path, group: str) -> Path:
    return Path(folder) / f"graph-{comm.rank(group)}-of-{comm.size(group)}.pt"


def read(
    folder: str | Path, marks: Marks, mesh: DeviceMesh, axes: tuple[int, ...], group: str
) -> tuple[dict[str, Partition], dict[Edge, Topology]] | None:
    """(nodes, edges) as they were written; None on all ranks where one has no file of the same."""
    path, kept = _file(folder, group), None
    try:
        kept = torch.load(path, map_location=mesh.device_type, weights_only=True)
    except Exception:
        # none, or damaged, which may raise anything: as if there were none
        kept = None
    kept = kept if isinstance(kept, dict) and kept.get("marks") == marks.told() else None
    like = next(iter(marks.edges.values()))
    if not all(comm.counts(int(kept is not None), like, group)) or kept is None:
        return None
    device = like.device
    nodes = {
        k: Partition(mesh, axes, t["order"].to(device), t["inverse"].to(device), tuple(t["sizes"]))
        for k, t in kept["nodes"].items()
    }
    edges = {}
    for name, t in kept["edges"].items():
        a, b = name.split("\n")
        dims = [Dim(len(nodes[k].order), axes, nodes[k].sizes) for k in (a, b)]
        edges[a, b] = _topology(t, mesh, group, *dims)
    return nodes, edges


def _topology(t: dict[str, Any], mesh: DeviceMesh, group: str, of: Dim, to: Dim) -> Topology:
    made = object.__new__(Topology)
    made.mesh, made._group, made._halos, made._made = mesh, group, None, {}
    made._from, made._to = of, to
    made._edges = Dim(sum(t["sizes"]), to.axes, t["sizes"])
    made._source, made._rows, made._order = t["source"], t["rows"], t["order"]
    counts = tuple(t["gives"]), tuple(t["gets"])
    made._route = Route(t["route"], *counts, t["place"], max(of.sizes), group)
    return made


def write(
    folder: str | Path,
    marks: Marks,
    nodes: Mapping[str, Partition],
    edges: Mapping[Edge, Topology],
    group: str,
) -> None:
    """This rank's file, which appears when it is whole. OSError on all ranks where one cannot."""
    path = _file(folder, group)
    error: Exception | None = None
    kept = {
        "marks": marks.told(),
        "nodes": {
            k: {"order": p.order, "inverse": p.inverse, "sizes": list(p.sizes)}
            for k, p in nodes.items()
        },
        "edges": {
            "\n".join(k): {
                "source": t._source, "rows": t._rows, "order": t._order,
                "sizes": list(t._edges.sizes), "route": t._route.rows, "place": t._route.place,
                "gives": list(t._route.gives), "gets": list(t._route.gets),
            }
            for k, t in edges.items()
        },
    }  # fmt: skip
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(kept, file)
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise
    except (OSError, RuntimeError) as e:
        # the latter where torch's writer found the disk full
        error = e
    like = next(iter(marks.edges.values()))
    failed = comm.counts(int(error is not None), like, group)
    if any(failed):
        raise OSError(f"graph.cut: {path} cannot be written on rank {failed.index(1)}") from error
