"""A task without gradients in parts that do not meet, as `tiled` runs it: see `paged.alone`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .. import cache
from .._torch import probe
from ..attention import assume
from ..comm import groups, observers
from ..containers import leaves
from ..observe.network import Network
from ..observe.trace import trace
from ..paged.alone import hooked, needed
from ..paged.meeting import Meeting
from ..paged.parts import Cut, check_plain, cut_of, spans_of, widened
from ..paged.ranks import replica, state
from ..spec import ALONE
from ..tensor import ShardTensor
from .build import build
from .collector import collect
from .device import Device
from .estimate import Task, attention_rates
from .inputs import inputs_of, same_dims
from .ledger import Ledger
from .trees import called, filled
from .turns import moved, paged
from .way import Layout


class Apart(NamedTuple):
    """halo: rows of the input that a part has beside its own.

    largest: bytes of the largest op's arguments and results; spilled: moved to files, most: there
    at once; seconds: of all parts.
    """

    halo: int
    largest: int
    spilled: int
    most: int
    seconds: float


def apart(
    task: Task, dim: int, parts: int, room: int, device: Device, network: Network
) -> Apart | None:
    """What the parts need in `room` bytes; None where they have to meet.

    They have to where `tiled` finds it so, and where the model cannot be planned like this, which
    a plan of parts that meet tells.
    """
    cache.clear()
    collect()
    ledger = Ledger(turns=True)
    chosen = assume(attention_rates(device, network, 3))
    drawn = torch.random.fork_rng(devices=[])
    with drawn, probe.fake_world(1, 3, ledger), chosen, groups.taken_spread(), torch.no_grad():
        observers.thread.alone = True
        try:
            return _Parts(task, dim, parts, ledger).found(room, device)
        except Exception:
            return None
        finally:
            observers.thread.alone = False
            cache.clear()
            groups.forget()


class _Parts:
    """The parts of a task: each is the middle one of three ranks."""

    def __init__(self, task: Task, dim: int, parts: int, ledger: Ledger) -> None:
        self.task, self.dim, self.ledger = task, dim, ledger
        self.rows = task.shapes[0][dim]
        self.spans = spans_of(self.rows, parts)
        with probe.outside_fake():
            self.mesh: DeviceMesh = init_device_mesh("cpu", (3,), mesh_dim_names=(ALONE,))
        self.model = build(task.make, ledger).train(task.train)
        ledger.mark("buffers", self.model.buffers())
        ledger.mark("parameters", self.model.parameters())

    def found(self, room: int, device: Device) -> Apart | None:
        if hooked(self.model):
            return None
        halo = needed(
            [self.rows], [self.spans], lambda made: made.largest <= room,
            lambda at, halo, _: self._tried(at, halo),
        )  # fmt: skip
        if halo is None:
            return None
        n = len(self.spans)
        # those between the first and the last are alike
        times = {0: 1, n - 1: 1} if n < 3 else {0: 1, n // 2: n - 2, n - 1: 1}
        spilled = most = largest = 0
        seconds = 0.0
        for i, count in times.items():
            begun, begin = len(self.ledger.work), len(self.ledger.turns or ())
            copied = self._ran(self.model, i, halo[0], Meeting(0))[1]
            work = self.ledger.work[begun:]
            files = moved(paged(self.ledger, begin), 1, room)
            spilled += count * files.spilled
            most, largest = max(most, files.most), max(largest, *(w.moved for w in work))
            nbytes = 2 * (copied + files.spilled)
            seconds += count * (
                sum(device.bound(w)[1] for w in work) + 2 * nbytes / device.bandwidth
            )
        return Apart(halo[0], largest, spilled, most, seconds)

    def _tried(
        self, at: tuple[int, ...], halo: tuple[int, ...]
    ) -> tuple[list[dict[int, Cut]], Meeting]:
        made = Meeting(1)
        return self._ran(replica(self.model), at[0], halo[0], made)[0], made

    def _ran(
        self, model: nn.Module, at: int, halo: int, made: Meeting
    ) -> tuple[list[dict[int, Cut]], int]:
        """(how the sharded outputs of a part are cut, bytes that are copied into and out of it).

        Raises ValueError for what parts may not do.
        """
        sizes = widened(self.spans[at], halo, self.rows)
        layout = Layout(1, (self.dim,), (3,), sizes=(sizes,))
        inputs = inputs_of(self.task, layout, self.mesh, self.ledger.known, same_dims)
        # what is not cut is the caller's own
        for x in inputs:
            self.ledger.mark("inputs" if isinstance(x, ShardTensor) else "buffers", [x])
        before = [state(x) for x in inputs]
        args, kwargs = called(model, filled(self.task.form, inputs))
        with trace() as t, made:
            outputs = [y for _, y in leaves(model(*args, **kwargs))]
        if t.sent or [state(x) for x in inputs] != before:
            raise ValueError("parts that need others, or write to rows that others have")
        if any(isinstance(b, ShardTensor) for b in model.buffers()):
            raise ValueError("a buffer of rows that other parts have, too")
        for y in outputs:
            if not isinstance(y, Tensor):
                check_plain(y)
        sharded = [x for x in (*inputs, *outputs) if isinstance(x, ShardTensor)]
        nbytes = sum(x._local.numel() * x.element_size() for x in sharded)
        return [cut_of(y) for y in outputs if isinstance(y, ShardTensor)], nbytes
