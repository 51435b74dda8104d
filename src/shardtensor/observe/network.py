"""Links between ranks: a model of their time, and what `doctor` measured and kept of them."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import ceil, log2
from pathlib import Path

from ..comm.counters import Sent

NODE = 8


@dataclass(frozen=True)
class Link:
    """Time of a message between two ranks: latency (s) and bandwidth (bytes/s, each way)."""

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Network:
    """Links within a node of so many ranks, and between nodes.

    A collective among ranks of one node takes the inner link, else the outer one: ranks 0 to
    node - 1 are the first node, and so on.
    """

    inner: Link
    outer: Link
    node: int = NODE
    # by collective, where each was measured; seconds that a rank waits at each for the slowest
    links: Mapping[str, Link] | None = None
    wait: float = 0.0

    def seconds(self, sent: Sent) -> float:
        """One collective: its rounds' latencies, and its bytes through this rank's link.

        Reductions and gathers go up and down a tree, other messages leave together.
        """
        if self.links is not None:
            kind = sent.collective if sent.collective in self.links else _LIKE.get(sent.collective)
            link = self.links[kind or "exchange"]
            return self.wait + link.latency + sent.bytes / link.bandwidth
        nodes = {rank // self.node for rank in sent.peers}
        within = len(nodes) == 1 if nodes else sent.ranks <= self.node
        link = self.inner if within else self.outer
        rounds = _TRIPS.get(sent.collective, 0) * ceil(log2(max(1, sent.ranks)))
        rounds = min(rounds or 1, sent.messages)
        return rounds * link.latency + sent.bytes / link.bandwidth


# measured as
_LIKE = {"gather": "all_gather", "reduce_scatter": "all_to_all", "swap": "all_to_all"}
# along a tree, up and down or only down
_TRIPS = {"all_reduce": 2, "all_gather": 1, "broadcast": 1}
# datasheets: NVLink 4 (H100, H200) 450 GB/s each way; NDR InfiniBand 400 Gb/s for each GPU.
# Latencies include the launch of a kernel
NVLINK = Link(10e-6, 450e9)
INFINIBAND = Link(20e-6, 50e9)
DGX_H100 = Network(NVLINK, INFINIBAND)


@dataclass(frozen=True)
class Measured:
    """Collectives of a backend among ranks of these hosts.

    seconds: by collective, for each size in bytes of a rank's tensor, the median of the slowest
    rank. links: latency (s) and bandwidth (bytes/s of what a rank sends) by collective.
    """

    host: str
    backend: str
    ranks: int
    seconds: dict[str, dict[int, float]]
    links: dict[str, Link]
    # seconds that a rank which computes in between waits at each for the slowest
    wait: float = 0.0

    def network(self) -> Network:
        """Of neighbours' exchanges, for `rehearse` and `plan`."""
        link = self.links["exchange"]
        return Network(link, link, max(NODE, self.ranks), self.links, self.wait)


def folder() -> Path:
    """Where measurements are kept: SHARDTENSOR_HOME, else the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return Path(os.environ.get("SHARDTENSOR_HOME", cache / "shardtensor"))


def save(found: Measured) -> Path:
    """Keep a measurement for `saved`, by this rank alone; returns the file."""
    path = _file(found.host, found.backend, found.ranks)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(found), indent=1))
    return path


def saved(backend: str, ranks: int) -> Measured | None:
    """What was measured on this host for as many ranks; None if nothing was. Sends nothing."""
    path = _file(socket.gethostname(), backend, ranks)
    return parsed(path.read_text()) if path.is_file() else None


def parsed(text: str) -> Measured:
    """From the text of a file of `save`."""
    found = json.loads(text)
    found["links"] = {k: Link(**v) for k, v in found["links"].items()}
    found["seconds"] = {k: {int(n): t for n, t in v.items()} for k, v in found["seconds"].items()}
    return Measured(**found)


def _file(host: str, backend: str, ranks: int) -> Path:
    return folder() / f"links-{host}-{backend.replace(':', '_').replace(',', '_')}-{ranks}.json"
