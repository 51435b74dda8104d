# mypy: disable-error-code="attr-defined, union-attr, assignment, misc"
"""Private torch APIs of worlds of ranks: threads as ranks, the store, the end of the program."""

from __future__ import annotations

import functools
import itertools
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.utils import _python_dispatch

# torch 2.13 renamed all_gather_into_tensor
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# of the collectives of simulated worlds
_numbers = itertools.count()


@contextmanager
def threaded_world(join: Callable[[str, int, int, Any, Any], Any]) -> Iterator[None]:
    """torch.distributed with one world per thread, whose groups rendezvous through `join`.

    join(name of the collective, group size, rank, collective, data) must run collective.work(list
    of every rank's data) once and then return on every rank. May be left, and entered again, while
    no thread is in a collective.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    class Collective:
        def __init__(self, size: int, collective: Any, pg: Any) -> None:
            self.size, self.collective, self.key = size, collective, next(_numbers)
            if type(collective) is threaded.AllToAllBase:
                self.collective = AllToAll()

        def join(self, rank: int, data: Any) -> Any:
            join(str(self.key), self.size, rank, self.collective, data)
            return threaded.ret_work(data)

    kept, threads = threaded.Collective, torch.autograd.is_multithreading_enabled()
    threaded.Collective = Collective
    # the stock creator blocks in a store until all ranks come; here ranks run one at a time
    dist.Backend.register_backend(
        "threaded",
        lambda store, rank, size, timeout: threaded.ProcessLocalGroup(rank, size),
        devices=["cpu"],
    )
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    world = threaded._install_threaded_pg()
    if not hasattr(world, "comms"):
        # torch 2.11 asks for it, but its threaded world lacks it
        world.comms = []
        # and what its first fake mode makes ends with the thread that it was made in
        with FakeTensorMode():
            pass
    try:
        yield
    finally:
        threaded._uninstall_threaded_pg()
        # torch 2.11 leaves it off in the caller's thread
        torch.autograd.set_multithreading_enabled(threads)
        threaded.ProcessLocalGroup.reset()
        threaded.Collective = kept
        torch._C._distributed_c10d._set_thread_isolation_mode(False)


class AllToAll:
    """all_to_all_single of simulated ranks; torch's own copies between all pairs, nothing, too."""

    @torch.no_grad()
    def work(self, datas: list[Any]) -> None:
        n = len(datas)
        gives = [list(sizes) if sizes else [x.shape[0] // n] * n for _, x, _, sizes in datas]
        starts = [list(itertools.accumulate(g, initial=0)) for g in gives]
        for to, (received, *_) in enumerate(datas):
            at = 0
            for source, (_, send, *_) in enumerate(datas):
                k, start = gives[source][to], starts[source][to]
                if k:
                    received.detach()[at : at + k].copy_(send.detach()[start : start + k])
                at += k


def default_store() -> Any:
    """The key-value store by which the ranks of this program met."""
    return dist.distributed_c10d._get_default_store()


def at_uncaught(call: Callable[[BaseException], None]) -> None:
    """Run call(error) when an exception is about to end the program, before it is printed."""
    before = sys.excepthook

    def hook(kind: Any, error: BaseException, at: Any) -> None:
        # an interactive session goes on
        if not hasattr(sys, "ps1"):
            call(error)
        before(kind, error, at)

    sys.excepthook = hook


@contextmanager
def silent_world(rank: int, ranks: int) -> Iterator[None]:
    """torch.distributed as one rank of many, alone: collectives return at once and move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # torch would put this rank's number before each line of the program's last error
    hook = sys.excepthook
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    sys.excepthook = hook
    try:
        yield
    finally:
        dist.destroy_process_group()


def group_of(ranks: list[int]) -> Any:
    """A process group of these ranks, made by them alone.

    Where init_process_group was given a device, torch splits the world's communicator, to which all
    ranks would have to come; so the group gets a communicator of its own.
    """
    everyone = dist.group.WORLD
    bound = everyone.bound_device_id
    if bound is not None:
        everyone.bound_device_id = None
    try:
        return dist.new_group(ranks, use_local_synchronization=True)
    finally:
        if bound is not None:
            everyone.bound_device_id = bound


class Middle(DeviceMesh):
    """Three ranks along each axis, of which the middle one is here, and there are no others."""


def middle_mesh(device: str, axes: int, names: tuple[str, ...]) -> DeviceMesh:
    """Such a mesh, which needs no process group."""
    with _python_dispatch._disable_current_modes(), torch.device("cpu"):
        ranks = torch.arange(3**axes).view((3,) * axes)
        return Middle(device, ranks, mesh_dim_names=names, _init_backend=False, _rank=3**axes // 2)


# the process group of all ranks, None where there is none, or none any longer; no function of
# Python: each message asks
default_group: Callable[[], Any] = functools.partial(
    operator.attrgetter("_world.default_pg"), dist.distributed_c10d
)


def is_silent(group: Any) -> bool:
    """Whether the group is one of a `silent_world`."""
    return bool(dist.get_backend(group) == "fake")


def group_key(group: Any) -> str:
    """The ranks of a group (None: of all) and its name, alike on all of them: "0,1/name"."""
    group = dist.group.WORLD if group is None else group
    ranks = sorted(dist.get_process_group_ranks(group))
    return f"{','.join(map(str, ranks))}/{group.group_name}"


def collectives() -> dict[str, int]:
    """For each group of this rank (see `group_key`): how many collectives this rank has come to."""
    found: dict[str, int] = {}
    for group in list(dist.distributed_c10d._world.pg_names):
        # while another thread makes or destroys it, it is not known
        with suppress(RuntimeError, ValueError, KeyError):
            found[group_key(group)] = group._get_sequence_number_for_group()
    return found


def cuda_runs() -> bool:
    """Whether this process uses a GPU: then it waits for ranks wherever it waits for the device."""
    return torch.cuda.is_initialized()


def ranks_among(args: Any) -> tuple[int, ...]:
    """All ranks of the group among the arguments of one of c10d's ops; none where there is none."""
    for a in args:
        if isinstance(a, torch.ScriptObject):
            with suppress(RuntimeError, TypeError, ValueError):
                return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(a)))
    return ()
