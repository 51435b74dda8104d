"""What this installation and these links are: facts, likely mistakes, measured collectives."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .. import comm
from ..comm import wire
from ..observe.network import Link, Measured
from ..observe.trace import trace

# bytes of a rank's tensor
SIZES = (1 << 10, 1 << 14, 1 << 18, 1 << 20, 1 << 22)
LIBRARIES = ("numpy", "zarr", "h5py", "xarray", "pyvista", "natten", "torch-harmonics", "rich")
VARIABLES = ("OMP_NUM_THREADS", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL", "SHARDTENSOR_")


def facts() -> dict[str, Any]:
    """Versions, backends, devices and environment of this process. Sends nothing."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "shardtensor": _version("shardtensor"),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "host": socket.gethostname(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "backends": {
            "gloo": dist.is_gloo_available(),
            "nccl": dist.is_nccl_available(),
            "mpi": dist.is_mpi_available(),
        },
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "environment": {
            k: v for k, v in sorted(os.environ.items()) if k in VARIABLES or k.startswith(PREFIXES)
        },
    }


def suspects(ranks: int = 2) -> list[str]:
    """What will slow down or stop so many ranks on this host, each with what to do.

    This process looks by itself; nothing is sent.
    """
    found = []
    known = facts()
    threads = int(os.environ.get("OMP_NUM_THREADS", known["cores"]))
    if not known["devices"] and ranks * threads > known["cores"] and ranks <= known["cores"]:
        found.append(
            f"{ranks} ranks x {threads} threads on {known['cores']} cores: set OMP_NUM_THREADS="
            f"{max(1, known['cores'] // ranks)}"
        )
    if ranks > known["cores"] and not known["devices"]:
        found.append(f"{ranks} ranks share {known['cores']} cores: times mean little")
    if torch.version.cuda and not known["devices"]:
        found.append("torch is a CUDA build, but there is no GPU: is the driver loaded?")
    if known["devices"] and not known["backends"]["nccl"]:
        found.append("there are GPUs, but this torch has no NCCL: take a CUDA build of torch")
    try:
        socket.getaddrinfo(known["host"], None)
    except OSError:
        found.append(
            f"the host's name {known['host']} has no address: gloo will not start; add it to "
            "/etc/hosts or set GLOO_SOCKET_IFNAME"
        )
    if (
        Path("/dev/shm").exists()
        and shutil.disk_usage("/dev/shm").free < 2**30
        and known["devices"]
    ):
        found.append("/dev/shm has less than 1 GiB: NCCL and loaders need more (docker --shm-size)")
    if (os.environ.get("MASTER_ADDR") is None) != (os.environ.get("MASTER_PORT") is None):
        found.append("one of MASTER_ADDR and MASTER_PORT is set, not both")
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure(mesh: DeviceMesh, sizes: tuple[int, ...] = SIZES, repeats: int = 15) -> Measured:
    """Time each collective among all ranks of a mesh; called on all of them.

    sizes: bytes of the messages. Raises ValueError for a mesh of one rank.
    """
    name = comm.group(mesh, tuple(range(mesh.ndim)))
    n, me = comm.size(name), comm.rank(name)
    if n == 1:
        raise ValueError("one rank has no links: start more, or give --ranks 2")
    device = torch.device(mesh.device_type)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    seconds: dict[str, dict[int, float]] = {k: {} for k in _collectives(n, me, name)}
    sent: dict[str, dict[int, float]] = {k: {} for k in seconds}
    for nbytes in sizes:
        x = torch.zeros(nbytes // 4, device=device)
        for kind, run in _collectives(n, me, name).items():
            run(x)
            with trace() as t:
                run(x)
            took = median(_timed(run, x, name) for _ in range(repeats))
            mine = torch.tensor([took, max(1, t.bytes)], dtype=torch.float64, device=device)
            most = wire.all_reduce([mine], "max", name)[0].tolist()
            seconds[kind][nbytes], sent[kind][nbytes] = most
    links = {k: _fitted(seconds[k], sent[k]) for k in seconds}
    backend = "nccl" if device.type == "cuda" else "gloo"
    wait = 0.0 if device.type == "cuda" else _wait(links["all_reduce"].latency, name)
    return Measured(socket.gethostname(), backend, n, seconds, links, wait)


def _wait(latency: float, name: str, turns: int = 60) -> float:
    """Seconds beyond its latency of a collective before which every rank computes."""
    a, small = torch.ones(256, 256), torch.zeros(1)

    def work() -> None:
        for _ in range(3):
            a @ a

    def alone() -> float:
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    computing = median(alone() for _ in range(turns))
    wire.all_reduce([small], "sum", name)
    begin = time.perf_counter()
    for _ in range(turns):
        work()
        wire.all_reduce([small], "sum", name)
    took = (time.perf_counter() - begin) / turns
    mine = torch.tensor([took - computing - latency], dtype=torch.float64)
    return max(0.0, float(wire.all_reduce([mine], "max", name)[0]))


def _collectives(n: int, me: int, name: str) -> dict[str, Callable[[torch.Tensor], Any]]:
    """What the library calls, each on a rank's tensor."""

    def exchange(x: torch.Tensor) -> Any:
        """A rank's tensor to each of its neighbours, as halos go."""
        near = [r for r in (me - 1, me + 1) if 0 <= r < n]
        return wire.exchange(
            {r: [x] for r in near}, {r: [x.shape] for r in near}, x, name, "exchange"
        )

    def all_to_all(x: torch.Tensor) -> Any:
        parts = {r: [p] for r, p in enumerate(x.tensor_split(n))}
        shapes = {r: [parts[me][0].shape] for r in parts}
        return wire.exchange(parts, shapes, x, name, "all_to_all", few=False)

    return {
        "exchange": exchange,
        "all_to_all": all_to_all,
        "all_gather": lambda x: wire.all_gather(x, [x.shape] * n, name),
        "all_reduce": lambda x: wire.all_reduce([x], "sum", name),
        "broadcast": lambda x: wire.broadcast(x, name),
    }


def _timed(run: Callable[[torch.Tensor], Any], x: torch.Tensor, name: str) -> float:
    wire.all_gather_numbers([0], x.device, name)
    _finish(x.device)
    begin = time.perf_counter()
    run(x)
    _finish(x.device)
    return time.perf_counter() - begin


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fitted(seconds: dict[int, float], sent: dict[int, float]) -> Link:
    """Latency: the shortest time. Bandwidth: of what the largest message takes beyond that."""
    small, large = min(seconds), max(seconds)
    latency = min(seconds.values())
    took = max(seconds[large] - latency, 1e-9)
    return Link(latency, max(sent[large] - sent[small], 1) / took)
