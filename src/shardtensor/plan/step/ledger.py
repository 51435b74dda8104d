"""What a program would hold, compute and move: counted on fake tensors, which have no memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _torch
from ..._torch import probe
from ...comm.counters import Sent
from ...later import dt
from ..tree import GRADIENTS, Places
from . import caches
from .kinds import Work, class_of, copied, fresh, groups_of, inside
from .known import Known
from .ops import leaves
from .replay import Call

# kinds of memory, in the order of tables
KINDS = (
    "parameters", "gradients", "optimizer", "buffers", "inputs", "activations", "communication",
)  # fmt: skip


class Move(NamedTuple):
    """Memory of a tensor that begins, or ends: its signed bytes."""

    number: int
    nbytes: int


class Read(NamedTuple):
    """The tensors that an op reads, and the bytes of its largest argument."""

    numbers: tuple[int, ...]
    nbytes: int


Turn = Move | Read | None
_ADD = torch.ops.aten.add.Tensor
_GATHERS = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}


class Ledger(probe.Watching):
    """Books every tensor that is made and released, and the work of every op.

    Fake tensors only; collectives run as on a rank of a silent world, so that they are counted and
    what they allocate is booked. `work`: of each op.
    `sent`: what FSDP2 sends; the rest is in a `trace`.
    """

    fake: Any
    known: Known
    next: int
    places: Places

    def __init__(self, *, turns: bool = False) -> None:
        super().__init__()
        self.fake = probe.fake_mode()
        caches.modes.add(self.fake)
        self.known = Known(self.fake)
        self.moves: list[tuple[int, int]] = []
        # of every move the ops before it; names of what begins after so many ops
        self.when: list[int] = []
        self.phases: list[tuple[str, int]] = []
        self.work: list[Work] = []
        self.kinds: dict[int, str] = {}
        self.sent: list[Sent] = []
        # of every tensor, of every op and of every message the module that made it
        self.places = Places()
        self.owners: dict[int, str] = {}
        self.workers: list[str] = []
        self.senders: list[str] = []
        self.heard: Sequence[Sent] = ()
        # moves, what each op reads, and None where ranks meet, in order; if wanted
        self.turns: list[Turn] | None = [] if turns else None
        self._met = 0
        self._sending = 0
        self._numbers: dict[int, int] = {}
        self._ends: dict[int, Any] = {}
        self.next = 0
        # of every tensor of backward the node that made it; the operands of a sum of gradients
        self._nodes: dict[int, int] = {}
        self._summed: tuple[int, ...] = ()
        # whether a tensor on the meta device was met, whose end nobody tells
        self._meta = False
        # bytes in host memory: now, and at the most
        self.away = self.most_away = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an op on fake tensors; book what it makes, costs and sends."""
        if func is probe.DEVICE and probe.is_fake(args[0]):
            return args[0].fake_device
        if len(self.heard) != self._met:
            if len(self.heard) > self._met and self.turns is not None:
                self.turns.append(None)
            self._met = len(self.heard)
        call = Call(func, args, kwargs or {})
        op, given = call.op, call.given
        # with a key all are fake
        if call.key is None and given and not op.lifts and not any(map(probe.is_fake, given)):
            # of a mesh's ranks, which are read
            with probe.outside_fake():
                return func(*args, **call.kwargs)
        if op.collective is not None:
            self.senders += [GRADIENTS] * (len(self.heard) - len(self.senders))
            with self._inside_collective():
                out = op.collective(*args, **call.kwargs)
            self.senders += [self.places.here()] * (len(self.heard) - len(self.senders))
            return out
        if op.sends and not self._sending:
            self._note(call)
        out = self.known.run(call)
        if self.turns is not None:
            self.read(func, given)
        made = [out] if isinstance(out, Tensor) else [*leaves(out)]
        kind = "communication" if self._sending else "activations"
        # each is booked
        new = sum([self.book(x, kind) for x in made])
        self._summed = self._sum_of(given) if func is _ADD and new else ()
        if new or op.mutable:
            self.does(self._cost(call, out, made))
        return out

    def read(self, func: Any, given: list[Tensor]) -> None:
        """Note which tensors' memory an op reads."""
        if func in _torch.TOUCH_NOTHING:
            return
        if given and self.turns is not None:
            found = (self._numbers.get(local(x).untyped_storage()._cdata) for x in given)
            read = tuple(n for n in found if n is not None)
            self.turns.append(Read(read, max(map(_bytes, given))))

    def does(self, work: Work) -> None:
        """Enter what the module that runs does."""
        self.work.append(work)
        self.workers.append(self.places.here())

    def _note(self, call: Call) -> None:
        """A gather or scatter of FSDP2's, among the ranks of its group."""
        name = _GATHERS.get(call.func.overloadpacket.__name__)
        if name is not None:
            small, large = sorted(x.numel() * x.element_size() for x in call.given)
            ranks = large // small if small else 1
            peers = _torch.ranks_among(call.args)
            self.sent.append(Sent(name, large - small, ranks - 1, ranks, "fsdp", peers=peers))

    @contextmanager
    def _inside_collective(self) -> Iterator[None]:
        self._sending += 1
        try:
            with self:
                yield
        finally:
            self._sending -= 1

    def _cost(self, call: Call, out: Any, made: list[Tensor]) -> Work:
        if call.entry is not None and call.entry.cost is not None:
            return call.entry.cost
        count = probe.flops_of(call.func.overloadpacket)
        flop = count(*call.args, **call.kwargs, out_val=out) if count is not None else 0
        groups = groups_of(call.func, call.args)
        if groups > 1 and call.func is torch.ops.aten.convolution_backward.default:
            # torch counts the product for weights as if there were no groups
            flop = 2 * flop // (1 + groups)
        every = {id(x): x for x in call.given + made}.values()
        dtype = (call.given or made)[0].dtype
        kind = class_of(call.func, call.args, made)
        besides = inside(call.func, call.args, kind)
        old = {*map(_block, call.given)}
        new, renewed = fresh(kind, besides, (n for at, n in {*map(_block, made)} - old))
        moved = sum(map(_bytes, every))
        cost = Work(flop, moved, dtype, kind, besides, new, copied(kind, call.args), renewed)
        if call.entry is not None:
            call.entry.cost = cost
        return cost

    def book(self, x: Tensor, kind: str) -> bool:
        """Enter a tensor's memory; False where it is known already, or there is none."""
        if probe.is_fake(x):
            device, storage = x.fake_device, x.untyped_storage()  # type: ignore[attr-defined]
        else:
            device, storage = x.device, local(x).untyped_storage()
        if device.type == "meta":
            self._meta = True
            return False
        at = storage._cdata
        if at in self._numbers:
            return False
        nbytes = storage.nbytes()
        number = self._numbers[at] = self.enter(nbytes, kind)
        # it is called when the memory is released
        self._ends[number] = weakref.ref(storage, lambda _: self._released(at, number, nbytes))
        return True

    def enter(self, nbytes: int, kind: str) -> int:
        """Book memory that no tensor has; returns its number."""
        number, self.next = self.next, self.next + 1
        self.kinds[number], self.owners[number] = kind, self.places.here()
        if (node := probe.backward_nr()) is not None:
            self._nodes[number] = node
        self._move(number, nbytes)
        return number

    def _sum_of(self, given: list[Tensor]) -> tuple[int, ...]:
        """The operands where autograd adds up gradients of several nodes."""
        now = probe.backward_nr()
        found = tuple(self._numbers.get(local(x).untyped_storage()._cdata, -1) for x in given)
        others = {self._nodes.get(n, now) for n in found} - {now}
        return found if now is not None and others else ()

    def repeat(self, moves: Sequence[tuple[int, int, int]], work: Sequence[Any]) -> None:
        """Book what was found elsewhere: ops, and (number from 0 on, signed bytes, ops before)."""
        numbers: dict[int, int] = {}
        done = 0
        for number, nbytes, ops in moves:
            self.work += work[done:ops]
            done = max(done, ops)
            if number in numbers:
                self._move(numbers[number], nbytes)
            else:
                numbers[number] = self.enter(nbytes, "activations")
        self.work += work[done:]
        self.workers += [self.places.here()] * len(work)

    def _released(self, at: int, number: int, nbytes: int) -> None:
        del self._ends[number]
        if self._numbers.get(at) == number:
            del self._numbers[at]
            self._move(number, -nbytes)
            if number in self._summed and self.moves[-2] == (self.next - 1, nbytes):
                # of plain tensors the engine adds to the one that nobody else has
                self.moves[-2:] = self.moves[:-3:-1]
                self._summed = ()

    def keeps(self, first: int) -> bool:
        """Whether a tensor of this number or a later one may still be somewhere."""
        return self._meta or any(number >= first for number in self._ends)

    def _move(self, number: int, nbytes: int) -> None:
        self.moves.append((number, nbytes))
        if self.turns is not None:
            self.turns.append(Move(number, nbytes))
        self.when.append(len(self.work))

    def phase(self, name: str) -> None:
        """A part of the step begins."""
        self.phases.append((name, len(self.work)))

    def mark(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Tell what the memory of these tensors is for."""
        for x in tensors:
            if x is not None and x.device.type != "meta":
                self.book(x, kind)
                self.kinds[self._numbers[local(x).untyped_storage()._cdata]] = kind

    def peak(self, start: int = 0) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes by kind at the moment when most were held, after the first `start` moves.

        And bytes by the module that made them, of what is no weight, gradient or optimizer state.
        """
        total, most, at = 0, -1, 0
        for i, (_, nbytes) in enumerate(self.moves):
            total += nbytes
            if i >= start and total > most:
                most, at = total, i
        held, owned = dict.fromkeys(KINDS, 0), dict[str, int]()
        for number, nbytes in self.moves[: at + 1]:
            kind = self.kinds[number]
            held[kind] += nbytes
            if kind in ("activations", "communication"):
                owner = self.owners[number]
                owned[owner] = owned.get(owner, 0) + nbytes
        return held, owned


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _block(x: Tensor) -> tuple[int, int]:
    """The memory of a tensor, and its bytes."""
    storage = x.untyped_storage()
    return storage._cdata, storage.nbytes()


def local(x: Tensor) -> Tensor:
    """The plain tensor that a ShardTensor or DTensor holds here."""
    if isinstance(x, dt.DTensor):
        return x.to_local().detach()
    return getattr(x, "_local", x)
