"""N ranks as threads of one process: try 16 ranks on a laptop, without a launcher.

One thread runs at a time and hands over where it waits for others. So simulated ranks are
deterministic, each has its own random state, and ranks that can never meet raise, not hang.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .. import _torch, cache
from ..caller import call_of_user, described, op_of
from ..comm import counters, flights, groups, observers
from ..comm.mismatch import Record, difference, position
from ..comm.transport import chosen
from ..errors import DivergenceError, RankError
from .own import held, random_states, switches, take_up
from .seen import seen

T = TypeVar("T")
# what torch.distributed is to a process is one world's
_one_at_a_time = threading.RLock()
# of worlds, one after the other
_numbers = count()


class Turns:
    """Whose turn it is: one rank runs until it waits or ends."""

    def __init__(self, world_size: int) -> None:
        self.go = [threading.Event() for _ in range(world_size)]
        self.waiting: dict[int, tuple[Callable[[], bool], Record]] = {}
        self.threads: dict[int, int] = {}
        # what ranks raised that was caught outside of a guard
        self.left: dict[int, str] = {}
        self.ended: set[int] = set()
        self.errors: dict[int, BaseException] = {}
        self.arrived: dict[str, dict[int, Any]] = {}
        self.done: set[str] = set()
        self.stuck: RankError | None = None
        # with which ranks mark the leaves that they accumulate gradients in
        self.number = next(_numbers)
        # ranks that wait for the world to be taken up again, and who waits for them
        self.outside: set[int] = set()
        self.back = threading.Event()

    def order(self, rank: int) -> Iterable[int]:
        """All ranks, those first that are to run first after this one has stopped."""
        n = len(self.go)
        return ((rank + step) % n for step in range(1, n + 1))

    def next_after(self, rank: int) -> None:
        """Give the turn to the next rank that can run."""
        if self.errors and self.stuck is None:
            r, error = next(iter(self.errors.items()))
            self.stuck = RankError(f"rank {r} raised {described(error)}")
        for r in self.order(rank):
            if r in self.ended:
                continue
            if r not in self.waiting or self.waiting[r][0]() or self.stuck:
                self.go[r].set()
                return
        if self.ended | self.outside == set(range(len(self.go))):
            self.back.set()
        else:
            waits = {r: self.placed(r, w) for r, (_, w) in sorted(self.waiting.items())}
            what = ", ".join(f"rank {r} in {position(w)}" for r, w in waits.items())
            gone = "".join(f"; rank {r} raised {text}" for r, text in sorted(self.left.items()))
            returned = sorted(self.ended - set(self.left))
            gone += f"; ranks {returned} have returned" if returned else ""
            self.stuck = DivergenceError(f"ranks wait for each other for ever: {what}{gone}")
            self.next_after(rank)

    def placed(self, rank: int, record: Record) -> Record:
        """What a rank that waits brings, with the op and the user's line that its thread is in."""
        frame = sys._current_frames().get(self.threads[rank])
        line, called = call_of_user(frame)
        return {"at": line, **record, "op": record.get("op") or op_of(frame) or called}

    def wait(self, rank: int, ready: Callable[[], bool], what: Record) -> None:
        """Let other ranks run until ready()."""
        own = held()
        self.waiting[rank] = (ready, what)
        self.next_after(rank)
        self.go[rank].wait()
        self.go[rank].clear()
        del self.waiting[rank]
        take_up(own)
        if not ready():
            assert self.stuck is not None
            raise type(self.stuck)(*self.stuck.args)

    def leave(self) -> None:
        """Wait until all ranks do, and the world is taken up again."""
        me = counters.simulated_rank()
        assert me is not None
        self.outside.add(me)
        self.wait(me, lambda: me not in self.outside, {"collective": "what is outside"})

    def pause(self) -> None:
        """Let another rank go first."""
        me = counters.simulated_rank()
        assert me is not None
        self.wait(me, lambda: True, {"collective": "a wait"})

    def join(self, key: str, size: int, rank: int, collective: Any, data: Any) -> None:
        """Meet the other members of a group; the last to come does the work."""
        me = counters.simulated_rank()
        assert me is not None
        # those of the library say what they bring, torch's own do not
        record = observers.thread.__dict__.pop("facts", None)
        record = record or {"collective": _called() or type(collective).__name__}
        here = self.arrived.setdefault(key, {})
        here[rank] = (data, me, record)
        if len(here) < size:
            self.wait(me, lambda: key in self.done, record)
            return
        met = [here[r] for r in range(size)]
        records = {member: brought for _, member, brought in met}
        if difference(records):
            placed = {r: self.placed(r, x) for r, x in records.items()}
            parted = difference(placed) or difference(records)
            self.stuck = DivergenceError(parted)
            raise DivergenceError(parted)
        self.work(collective, [data for data, _, _ in met])
        # those that wait in this call still have the table, and the buffers in it
        here.clear()
        del self.arrived[key]
        self.done.add(key)

    def work(self, collective: Any, datas: list[Any]) -> None:
        """Move what the ranks of a group brought, unseen by modes of the one that does it."""
        with _torch.outside_modes():
            collective.work(datas)


def _called() -> str:
    """The function of torch.distributed that is running in this thread."""
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.endswith("distributed_c10d.py"):
        frame = frame.f_back  # type: ignore[assignment]
    return "" if frame is None else frame.f_code.co_name


def simulate(
    world_size: int, fn: Callable[..., T], *args: Any, transport: str | None = None
) -> list[T]:
    """Run fn(*args) on `world_size` ranks, threads of this process; returns what each returned.

    Inside fn, torch.distributed is initialised, as under torchrun: make a mesh with
    `init_device_mesh("cpu", ...)`. Raises RankError from the first exception of a rank, and
    DivergenceError, which is one and names every rank, where ranks wait for each other for ever or
    come to a collective with another one, another dtype or other sizes.
    Ranks share what fn closes over and args: a model is to be made inside fn, or copied there; one
    in which gradients of two ranks would add up raises ValueError. ShardTensors that all ranks
    return in the same place can be read afterwards (`full_tensor`, `item`, `numpy`).
    transport: "strict" treats buffers as NCCL does, and raises TransportError where they are used
    carelessly; default: SHARDTENSOR_TRANSPORT, else "plain".
    """
    world = World(world_size, fn, args, Turns(world_size), transport)
    world.go_on()
    seen(world.results)
    return world.results


class World:
    """Simulated ranks, which run where `go_on` is called: all until they end, or leave together."""

    def __init__(
        self,
        world_size: int,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        turns: Turns,
        transport: str | None = None,
    ) -> None:
        self.transport = chosen(transport)
        self.turns = turns
        self.results: list[Any] = [None] * world_size
        self.store = dist.HashStore()
        self.random, self.switches = random_states(), switches()
        ranks = range(world_size)
        self.threads = [
            threading.Thread(target=self._run, args=(r, fn, args), daemon=True) for r in ranks
        ]
        self.begun = False

    @property
    def ended(self) -> bool:
        """Whether no rank is left that could go on."""
        return len(self.turns.ended) == len(self.threads)

    def go_on(self) -> None:
        """Run all ranks until they end or leave; raises what `simulate` does, once they ended."""
        if counters.simulated_rank() is not None:
            raise RuntimeError("simulate inside simulate: call the function itself, on these ranks")
        with _one_at_a_time:
            self._go_on()

    def _go_on(self) -> None:
        turns, before, hook = self.turns, held(), sys.excepthook
        # a mesh of an earlier world may equal one of this
        cache.clear()
        turns.outside.clear()
        turns.back.clear()
        with _torch.threaded_world(turns.join), _torch.shared_dual_level():
            if not self.begun:
                self.begun = True
                for t in self.threads:
                    t.start()
            turns.go[next(r for r in range(len(turns.go)) if r not in turns.ended)].set()
            try:
                turns.back.wait()
            except BaseException:
                # Ctrl-C: no rank may run on beside what this process does next
                self._end()
                raise
            finally:
                if self.ended:
                    for t in self.threads:
                        t.join()
                    groups.forget(turns.number)
                cache.clear()
                take_up(before)
                # init_process_group puts "[rank0]" before every later traceback of this process
                sys.excepthook = hook
        if self.ended:
            self._raise()

    def _end(self) -> None:
        """End all ranks: the others where they wait, the one that runs where it is."""
        turns, told = self.turns, set[int]()
        turns.stuck = RankError("interrupted")
        while any(t.is_alive() for t in self.threads) and not turns.back.wait(0.05):
            for thread in {t for r, t in turns.threads.items() if r not in turns.waiting} - told:
                told.add(thread)
                error = ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)

    def _run(self, rank: int, fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """What the thread of a rank does."""
        turns = self.turns
        turns.go[rank].wait()
        turns.go[rank].clear()
        observers.thread.rank = rank
        observers.thread.left = turns.left
        observers.thread.world = turns.number
        observers.thread.transport = self.transport
        observers.thread.pause = turns.pause
        turns.threads[rank] = threading.get_ident()
        # what `parametrize.cached` keeps of a weight is of one rank
        take_up((self.random, (0, {}), self.switches))
        try:
            with torch.autograd.set_multithreading_enabled(False):
                world_size = len(self.threads)
                dist.init_process_group(
                    "threaded", rank=rank, world_size=world_size, store=self.store
                )
                self.results[rank] = fn(*args)
                flights.all_waited_for()
                if dist.is_initialized():
                    dist.destroy_process_group()
        except BaseException as e:
            if not isinstance(e, RankError) or not turns.errors:
                turns.errors.setdefault(rank, e)
        finally:
            turns.ended.add(rank)
            turns.next_after(rank)

    def _raise(self) -> None:
        """What the first rank raised that raised something of its own."""
        errors = self.turns.errors
        if not errors:
            return
        rank, error = min(errors.items(), key=lambda e: isinstance(e[1], RankError))
        kind = DivergenceError if isinstance(error, DivergenceError) else RankError
        # those of ranks name lines themselves
        text = f"{type(error).__name__}: {error}"
        text = text if isinstance(error, RankError) else described(error)
        raise kind(f"rank {rank}: {text}") from error
