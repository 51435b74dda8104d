"""Starting up under any launcher: process group, mesh and device from names and sizes."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from math import prod
from numbers import Integral

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .. import _torch, registry
from ..attention.strategy import assume_link
from ..comm.launcher import Place as Place
from ..comm.launcher import first_host as first_host
from ..comm.launcher import place
from ..comm.observers import Hooks, simulated_rank
from ..comm.transport import chosen
from ..observe import failures, network, onlookers
from .rendezvous import agree, fresh, met

Hooks.grouped = onlookers.start


def init(**axes: int) -> tuple[DeviceMesh, torch.device]:
    """Initialise torch.distributed as the launcher says; returns a mesh and this rank's device.

    axes: names and sizes of the mesh's axes, in order; one may be -1, for all ranks that are left.
    Default: those of SHARDTENSOR_MESH ("data=2,domain=4", as `shardtensor run` sets it), else
    domain=-1. GPUs and NCCL where there are GPUs, one for each rank of a host, else CPUs
    and gloo. Without a launcher this process is the only rank. A process group that exists already
    is used, and ranks may call this again, all of them. Raises ValueError where sizes do not make
    up the number of ranks, ranks ask for different ones, or the launcher's variables make no sense,
    and RuntimeError naming the ranks that did not come in time.
    A rank that raises or dies later ends the others within seconds, with its message
    (see `observe.failures`).

        mesh, device = st.init(data=2, domain=-1)
    """
    axes = axes or _asked()
    odd = {k: v for k, v in axes.items() if not isinstance(v, Integral) or v is True}
    if odd:
        raise ValueError(f"mesh axes {odd}: sizes are whole numbers, and one may be -1")
    here = place()
    alone = not dist.is_initialized()
    if alone:
        # before ranks wait for each other
        sizes_of(axes, here.ranks)
        chosen(None)
    gpus = torch.cuda.is_available()
    if alone:
        # of a process group that was destroyed; its store gives the port back
        failures.leave()
        store: dist.Store | None = None
        if here.ranks == 1:
            store = dist.HashStore()
        else:
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = here.address, str(here.port)
            agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            store = fresh(here) if agent else met(here)
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
            _watch(here.ranks)
    n = dist.get_world_size()
    sizes = sizes_of(axes, n)
    device = torch.device("cuda", torch.cuda.current_device()) if gpus else torch.device("cpu")
    if n > 1 and simulated_rank() is None and dist.get_backend() != "fake":
        mine = here._replace(rank=dist.get_rank(), ranks=n)
        agree(mine, _torch.default_store(), f"mesh axes {axes} on {device.type}s", alone)
    return init_device_mesh(device.type, sizes, mesh_dim_names=tuple(axes)), device


def _share_links(first: bool, backend: str) -> None:
    """What the first rank knows of the links, for the choices of all: else ranks would part."""
    store = dist.PrefixStore("shardtensor/links", _torch.default_store())
    if first:
        known = network.saved(backend, dist.get_world_size())
        link = None if known is None else known.network().inner
        store.set("link", "" if link is None else f"{link.latency!r} {link.bandwidth!r}")
    text = store.get("link").decode()
    if text:
        assume_link(*map(float, text.split()))


def _end() -> None:
    for finish in registry.before_end:
        finish()
    failures.leave()
    if dist.is_initialized():
        dist.destroy_process_group()


def _asked() -> dict[str, int]:
    """The mesh that the environment asks for."""
    text = os.environ.get("SHARDTENSOR_MESH", "domain=-1")
    try:
        return {k.strip(): int(n) for k, n in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ValueError(f"SHARDTENSOR_MESH={text!r}: write data=2,domain=4") from None


def domains(device: str, domain: int, ranks: int) -> DeviceMesh:
    """A trainer's mesh: along "domain" ranks share a sample (-1: all), along "data" they do not.

    As after `init` a rank that raises or dies ends the others; the process group is the trainer's.
    """
    sizes = {"data": 1 if domain == -1 else -1, "domain": domain}
    mesh = init_device_mesh(device, sizes_of(sizes, ranks), mesh_dim_names=tuple(sizes))
    if ranks > 1 and simulated_rank() is None and not failures.is_started():
        _watch(ranks)
        atexit.register(failures.leave)
    return mesh


def _watch(ranks: int) -> None:
    failures.start(os.environ.get("LOCAL_WORLD_SIZE") == str(ranks))


def sizes_of(axes: Mapping[str, int], n: int) -> tuple[int, ...]:
    """The sizes of a mesh's axes on n ranks. Raises ValueError where they do not make them up."""
    known = prod(s for s in axes.values() if s != -1)
    open_axes = [name for name, s in axes.items() if s == -1]
    if len(open_axes) > 1 or any(s < 1 and s != -1 for s in axes.values()):
        raise ValueError(f"mesh axes {dict(axes)}: sizes are positive, and one may be -1")
    if n % known or (not open_axes and known != n):
        raise ValueError(f"mesh axes {dict(axes)} do not make up {n} ranks")
    return tuple(n // known if s == -1 else s for s in axes.values())
