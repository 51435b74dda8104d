"""What a program would hold, compute and move: counted on fake tensors, which have no memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _torch
from .._torch import probe
from ..comm.counters import Sent
from ..comm.define import KERNELS

# kinds of memory, in the order of tables
KINDS = (
    "parameters", "gradients", "optimizer", "buffers", "inputs", "activations", "communication",
)  # fmt: skip


_GATHERS = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}


class Ledger(TorchDispatchMode):
    """Books every tensor that is made and released, and the work of every op.

    Fake tensors only; collectives run as on a rank of a silent world, so that they are counted and
    what they allocate is booked. `work`: (FLOP, bytes read and written, dtype) of each op. `sent`:
    what FSDP2 sends; the rest is in a `trace`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moves: list[tuple[int, int]] = []
        self.work: list[tuple[int, int, torch.dtype]] = []
        self.kinds: dict[int, str] = {}
        self.sent: list[Sent] = []
        self._sending = 0
        self._numbers: dict[int, int] = {}
        self._next = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an op on fake tensors; book what it makes, costs and sends."""
        kwargs = kwargs or {}
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if given and not any(probe.is_fake(x) for x in given):
            # of a mesh's ranks, which are read
            with probe.outside_fake():
                return func(*args, **kwargs)
        if func in KERNELS:
            with self._inside_collective():
                return KERNELS[func](*args, **kwargs)
        if not self._sending and func.namespace == "c10d":
            self._note(func, given)
        out = func(*args, **kwargs)
        made = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        new = [x for x in made if self.book(x, "communication" if self._sending else "activations")]
        if new or _torch.is_mutable(func):
            self.work.append(self._cost(func, args, kwargs, out, given, made))
        return out

    def _note(self, func: Any, given: list[Tensor]) -> None:
        """A gather or scatter of FSDP2's."""
        name = _GATHERS.get(func.overloadpacket.__name__)
        if name is not None:
            small, large = sorted(x.numel() * x.element_size() for x in given)
            ranks = large // small if small else 1
            self.sent.append(Sent(name, large - small, ranks - 1, ranks, "fsdp"))

    @contextmanager
    def _inside_collective(self) -> Iterator[None]:
        self._sending += 1
        try:
            with self:
                yield
        finally:
            self._sending -= 1

    def _cost(
        self, func: Any, args: Any, kwargs: Any, out: Any, given: list[Tensor], made: list[Tensor]
    ) -> tuple[int, int, torch.dtype]:
        count = probe.FLOPS.get(func.overloadpacket)
        flop = count(*args, **kwargs, out_val=out) if count is not None else 0
        moved = sum(x.numel() * x.element_size() for x in {id(x): x for x in given + made}.values())
        return flop, moved, (given or made)[0].dtype

    def book(self, x: Tensor, kind: str) -> bool:
        """Enter a tensor's memory; False where it is known already, or there is none."""
        if x.device.type == "meta":
            return False
        storage = local(x).untyped_storage()
        at = storage._cdata
        if at in self._numbers:
            return False
        number, nbytes = self._next, storage.nbytes()
        self._next += 1
        self._numbers[at], self.kinds[number] = number, kind
        self.moves.append((number, nbytes))
        weakref.finalize(storage, self._released, at, number, nbytes)
        return True

    def _released(self, at: int, number: int, nbytes: int) -> None:
        if self._numbers.get(at) == number:
            del self._numbers[at]
            self.moves.append((number, -nbytes))

    def mark(self, kind: str, tensors: Iterable[Tensor | None]) -> None:
        """Tell what the memory of these tensors is for."""
        for x in tensors:
            if x is not None and x.device.type != "meta":
                self.book(x, kind)
                self.kinds[self._numbers[local(x).untyped_storage()._cdata]] = kind

    def peak(self, start: int = 0) -> dict[str, int]:
        """Bytes by kind at the moment when most were held, after the first `start` moves."""
        held = dict.fromkeys(KINDS, 0)
        most, total, found = -1, 0, dict(held)
        for i, (number, nbytes) in enumerate(self.moves):
            held[self.kinds[number]] += nbytes
            total += nbytes
            if i >= start and total > most:
                most, found = total, dict(held)
        return found


def local(x: Tensor) -> Tensor:
    """The plain tensor that a ShardTensor or DTensor holds here."""
    if isinstance(x, DTensor):
        return x.to_local().detach()
    return getattr(x, "_local", x)
