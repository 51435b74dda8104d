"""Starting up under any launcher: process group, mesh and device from names and sizes."""

from __future__ import annotations

import atexit
import os
import re
import time
from collections.abc import Mapping
from datetime import timedelta
from math import prod
from typing import NamedTuple
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from . import _torch, checkpoint, doctor, watch
from .attention.strategy import assume_link


class Place(NamedTuple):
    """Where this process stands: what its launcher says."""

    launcher: str
    rank: int
    ranks: int
    local_rank: int
    address: str
    port: int


# launcher: (rank, number of ranks, rank on this host), by environment variables
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}


def place(env: Mapping[str, str] | None = None) -> Place:
    """This process's place, from torchrun's, MPI's or Slurm's environment; alone without any.

    The first rank's address and port are MASTER_ADDR and MASTER_PORT. Under Slurm they default to
    the job's first host and a port made of the job's number, under MPI to this host if there is
    only one.
    Raises RuntimeError where they are needed and unknown.
    """
    env = os.environ if env is None else env
    for name, (rank, ranks, local) in _LAUNCHERS.items():
        # a shell inside a Slurm job has SLURM_NTASKS, too, but only its tasks a step
        if rank in env and ranks in env and (name != "Slurm" or "SLURM_STEP_ID" in env):
            n = int(env[ranks])
            address, port = _meeting_point(name, n, env)
            return Place(name, int(env[rank]), n, int(env.get(local, 0)), address, port)
    return Place("none", 0, 1, 0, "localhost", 0)


def _meeting_point(launcher: str, ranks: int, env: Mapping[str, str]) -> tuple[str, int]:
    address, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if launcher == "Slurm":
        address = address or first_host(env.get("SLURM_STEP_NODELIST", "localhost"))
        port = port or str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000)
    elif launcher in ("Open MPI", "MPI"):
        here = env.get("OMPI_COMM_WORLD_LOCAL_SIZE", env.get("MPI_LOCALNRANKS"))
        if here is not None and int(here) == ranks:
            address, port = address or "localhost", port or "29500"
    if ranks > 1 and not (address and port):
        raise RuntimeError(
            f"{launcher} with {ranks} ranks, but no address where to meet: set MASTER_ADDR to the "
            "first rank's host and MASTER_PORT to a free port on every rank"
        )
    return address or "localhost", int(port or 0)


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts, such as "gpu[03-05,9],login1"."""
    found = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\])?([^,]*)", nodes)
    assert found is not None
    return found[1] + (found[2] or "") + found[3]


def init(**axes: int) -> tuple[DeviceMesh, torch.device]:
    """Initialise torch.distributed as the launcher says; returns a mesh and this rank's device.

    axes: names and sizes of the mesh's axes, in order; one may be -1, for all ranks that are left.
    Default: domain=-1. GPUs and NCCL where there are GPUs, one for each rank of a host, else CPUs
    and gloo. Without a launcher this process is the only rank. A process group that exists already
    is used. Raises ValueError where sizes do not make up the number of ranks.
    A rank that raises or dies later ends the others within seconds, with its message (see `watch`).

        mesh, device = st.init(data=2, domain=-1)
    """
    axes = axes or {"domain": -1}
    here = place()
    gpus = torch.cuda.is_available()
    if not dist.is_initialized():
        # of a process group that was destroyed; its store gives the port back
        watch.leave()
        store: dist.Store | None = None
        if here.ranks == 1:
            store = dist.HashStore()
        else:
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = here.address, str(here.port)
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                store = _fresh(here)
        if gpus:
            torch.cuda.set_device(here.local_rank % torch.cuda.device_count())
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            store=store, rank=here.rank, world_size=here.ranks,
        )  # fmt: skip
        atexit.unregister(_end)
        atexit.register(_end)
        if here.ranks > 1:
            _share_links(here.rank == 0, "nccl" if gpus else "gloo")
            watch.start(os.environ.get("LOCAL_WORLD_SIZE") == str(here.ranks))
    n = dist.get_world_size()
    sizes = _sizes(axes, n)
    device = torch.device("cuda", torch.cuda.current_device()) if gpus else torch.device("cpu")
    return init_device_mesh(device.type, sizes, mesh_dim_names=tuple(axes)), device


def _share_links(first: bool, backend: str) -> None:
    """What the first rank knows of the links, for the choices of all: else ranks would part."""
    store = dist.PrefixStore("shardtensor/links", _torch.default_store())
    if first:
        known = doctor.saved(backend, dist.get_world_size())
        link = None if known is None else known.network().inner
        store.set("link", "" if link is None else f"{link.latency!r} {link.bandwidth!r}")
    text = store.get("link").decode()
    if text:
        assume_link(*map(float, text.split()))


def _fresh(here: Place) -> dist.Store:
    """A part of torchrun's store that no earlier attempt has written to, the same on all ranks.

    torchrun keeps one store when it starts all ranks again (torch 2.13). Ranks would meet at the
    addresses of dead ones: they hang, or are refused. How often this host's ranks were started says
    nothing of other hosts', so the first rank names the part and answers whoever asks now.
    """
    limit = timedelta(minutes=5)
    store = dist.TCPStore(here.address, here.port, is_master=False, timeout=limit)
    meet = dist.PrefixStore("shardtensor/init", store)
    if here.rank:
        mine = uuid4().hex
        meet.set(f"asks/{here.rank}", mine)
        meet.wait([f"name/{mine}"], limit)
        name = meet.get(f"name/{mine}").decode()
        meet.add(f"known/{name}", 1)
        return dist.PrefixStore(name, store)
    name, answered, end = uuid4().hex, set[str](), time.monotonic() + limit.total_seconds()
    while meet.add(f"known/{name}", 0) < here.ranks - 1:
        for r in range(1, here.ranks):
            # what a rank of an earlier attempt asked is answered, too: nobody hears it
            asked = meet.get(f"asks/{r}").decode() if meet.check([f"asks/{r}"]) else ""
            if asked and asked not in answered:
                answered.add(asked)
                meet.set(f"name/{asked}", name)
        if time.monotonic() > end:
            raise RuntimeError(f"{here.ranks} ranks were started, but not all came within {limit}")
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def _end() -> None:
    checkpoint.finish()
    watch.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def _sizes(axes: Mapping[str, int], n: int) -> tuple[int, ...]:
    known = prod(s for s in axes.values() if s != -1)
    open_axes = [name for name, s in axes.items() if s == -1]
    if len(open_axes) > 1 or any(s < 1 and s != -1 for s in axes.values()):
        raise ValueError(f"mesh axes {dict(axes)}: sizes are positive, and one may be -1")
    if n % known or (not open_axes and known != n):
        raise ValueError(f"mesh axes {dict(axes)} do not make up {n} ranks")
    return tuple(n // known if s == -1 else s for s in axes.values())
