"""Worker processes over gloo (or NCCL), started once and used for many tests."""

from __future__ import annotations

import atexit
import gc
import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

T = TypeVar("T")
TIMEOUT = 120.0
# every process group that a run leaves behind has a thread that wakes up 100 times a second
RUNS = 40
_pools: dict[int, Pool] = {}


def _context(backend: str) -> Any:
    """Where processes come from: forks of one that did no more than import the library.

    The import takes seconds. A GPU that was looked for before a fork is lost in it.
    """
    if backend != "gloo" or "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["shardtensor"])
    return context


class Pool:
    """`world_size` processes with torch.distributed initialised, which run functions on demand."""

    def __init__(self, world_size: int, backend: str = "gloo") -> None:
        context = _context(backend)
        self.folder = tempfile.TemporaryDirectory(prefix="shardtensor-")
        store = os.path.join(self.folder.name, "store")
        self.ends: list[Connection] = []
        self.runs = 0
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work,
                args=(theirs, store, rank, world_size, backend, dict(os.environ)),
                daemon=True,
            )
            process.start()
            theirs.close()
            self.ends.append(ours)
            self.processes.append(process)

    def run(self, fn: Callable[..., T], *args: Any, timeout: float = TIMEOUT) -> list[T]:
        """fn(*args) on every rank; fn must be importable by name.

        Raises RuntimeError with a rank's traceback when one raises or dies, or when they do not
        end within `timeout` seconds; the pool is closed then.
        """
        self.runs += 1
        for end in self.ends:
            end.send((fn, args))
        results: dict[int, Any] = {}
        while len(results) < len(self.ends):
            pending = [e for r, e in enumerate(self.ends) if r not in results]
            ready: list[Any] = wait(pending, timeout)
            if not ready:
                self.close()
                raise RuntimeError(f"ranks {self._missing(results)} did not end in {timeout} s")
            for end in ready:
                rank = self.ends.index(end)
                try:
                    good, value = end.recv()
                except EOFError:
                    good, value = False, "the process died"
                if not good:
                    self.close()
                    raise RuntimeError(f"rank {rank}: {value}")
                results[rank] = value
        return [results[r] for r in range(len(self.ends))]

    def _missing(self, results: dict[int, Any]) -> list[int]:
        return [r for r in range(len(self.ends)) if r not in results]

    def close(self) -> None:
        """End the processes."""
        for p in self.processes:
            p.kill()
        for p in self.processes:
            p.join()
        self.folder.cleanup()
        for n, pool in list(_pools.items()):
            if pool is self:
                del _pools[n]


def _work(
    end: Connection,
    store: str,
    rank: int,
    world_size: int,
    backend: str,
    environment: dict[str, str],
) -> None:
    """A worker's life: run each function that comes, send back its result or traceback."""
    import torch
    import torch.distributed as dist

    from ..comm.flights import all_waited_for

    # what was there before the fork need not be gone through for garbage
    gc.freeze()
    # a fork has the environment of the first pool
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    while True:
        try:
            fn, args = end.recv()
        except EOFError:
            return
        try:
            result = fn(*args)
            all_waited_for()
            end.send((True, result))
        except BaseException:
            end.send((False, traceback.format_exc()))


def run_workers(world_size: int, fn: Callable[..., T], *args: Any) -> list[T]:
    """fn(*args) on every rank of a pool of gloo processes that lives until this process ends."""
    pool = _pools.get(world_size)
    if pool is None or pool.runs >= RUNS:
        for other in list(_pools.values()):
            other.close()
        pool = _pools[world_size] = Pool(world_size)
    return pool.run(fn, *args)


@atexit.register
def _close_all() -> None:
    for pool in list(_pools.values()):
        pool.close()
