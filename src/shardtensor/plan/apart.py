"""A task in parts that do not meet, as `tiled` runs it: see `paged.alone`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

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
from ..paged.alone import KEPT
from ..paged.meeting import Meeting, check_nodes
from ..paged.parts import check_plain, cut_of, spans_of, widened
from ..paged.ranks import replica, state
from ..paged.width import At, hooked, needed
from ..spec import ALONE
from ..tensor import ShardTensor
from ..tensor.redistribute import reduced
from .device import CPU, Device
from .estimate import Task, attention_rates, casts_of
from .step.build import build
from .step.collector import collect
from .step.inputs import inputs_of, same_dims
from .step.kinds import Work
from .step.ledger import Ledger, Move, Turn, local
from .step.turns import EVENTS, alive, left, moved, moved_apart, own, paged
from .trees import called, filled
from .way import Layout

_COPY = torch.ops.aten.copy_.default


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


class _Ran(NamedTuple):
    """outputs: flat; sharded: of them; sources: trained parameters; copied: bytes in and out."""

    inputs: list[Tensor]
    outputs: list[Any]
    sharded: list[ShardTensor]
    sources: list[nn.Parameter]
    copied: int


class _Part(NamedTuple):
    """The turns of a part: forward, then either its end or backward.

    kept: bytes that it has between them; forth: seconds of forward, seconds: of both.
    """

    forward: list[Turn]
    dropped: list[Turn]
    backward: list[Turn]
    kept: int
    forth: float
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
    world = probe.fake_world(1, 3, ledger)
    with (
        drawn, world, chosen, groups.taken_spread(ledger.known.assumed), casts_of(device),
        torch.set_grad_enabled(task.train),
    ):  # fmt: skip
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
        # of a CPU's memory files get what is left
        cached = max(0, int(device.memory) - room) if device.name == CPU else 0

        def better_met(made: Meeting) -> bool:
            if self.task.train:
                return made.bytes <= room + cached
            return made.largest <= room

        halo = needed([self.rows], [self.spans], better_met, self._tried)
        if halo is None:
            return None
        n = len(self.spans)
        # those between the first and the last are alike
        alike = [0, *[n // 2] * (n - 2), n - 1][:n]
        run = self._learnt if self.task.train else self._inferred
        return run(halo[0], alike, room, device)

    def _inferred(self, halo: int, alike: list[int], room: int, device: Device) -> Apart:
        spilled = most = largest = 0
        seconds = 0.0
        for i, count in Counter(alike).items():
            begun, begin = len(self.ledger.work), len(self.ledger.turns or ())
            copied = self._ran(self.model, i, halo, Meeting(0)).copied
            work = self.ledger.work[begun:]
            files = moved(paged(self.ledger, begin), 1, room)
            spilled += count * files.spilled
            most, largest = max(most, files.most), max(largest, *(w.moved for w in work))
            nbytes = 2 * (copied + files.spilled)
            seconds += count * (_seconds(work, device) + 2 * nbytes / device.bandwidth)
        return Apart(halo, largest, spilled, most, seconds)

    def _learnt(self, halo: int, alike: list[int], room: int, device: Device) -> Apart | None:
        """A step: parts run forward, and in backward once more but for those that were kept."""
        begun = len(self.ledger.work)
        parts = {i: self._part(i, halo, device) for i in {*alike}}
        largest = max(w.moved for w in self.ledger.work[begun:])
        if max(p.kept for p in parts.values()) > KEPT * room:
            return None
        events = sum(len(p.forward) + len(p.backward) for p in parts.values())
        few = [*alike[: max(2, EVENTS // events)], alike[-1]] if len(alike) > 3 else alike
        few = few if len(few) < len(alike) else alike
        kept, held = set[int](), 0
        for at, i in enumerate(few):
            if at == len(few) - 1 or held + 3 * parts[i].kept <= room:
                kept.add(at)
                held += parts[i].kept
        again = [at for at in range(len(few)) if at not in kept]
        segments: list[tuple[Any, list[Turn]]] = []
        for at, i in enumerate(few):
            segments.append(((at, at in kept), parts[i].forward))
            if at in again:
                segments.append(((at, False), parts[i].dropped))
        segments += [((at, True), parts[few[at]].backward) for at in sorted(kept)]
        for at in again:
            part = parts[few[at]]
            segments += [((at, True), part.forward), ((at, True), part.backward)]
        files = moved_apart(segments, room)
        share = len(alike) / len(few)
        spilled = int(files.spilled * share)
        seconds = share * (
            sum(parts[i].seconds for i in few) + sum(parts[few[at]].forth for at in again)
        )
        return Apart(halo, largest, spilled, files.most, seconds + 4 * spilled / device.bandwidth)

    def _part(self, at: int, halo: int, device: Device) -> _Part:
        """What a part does in a step."""
        ledger, model = self.ledger, replica(self.model)
        begin, work = len(ledger.turns or ()), len(ledger.work)
        ran = self._ran(model, at, halo, Meeting(0))
        ledger.read(_COPY, [y._local for y in ran.sharded])
        end, forth = len(ledger.turns or ()), ledger.work[work:]
        forward = own(ledger, begin, end)
        ended: list[Turn] = [Move(n, -size) for n, size in alive(forward)]
        self._back(ran)
        copied = ran.copied
        del ran
        seconds = _seconds(forth, device) + 4 * copied / device.bandwidth
        back = _seconds(ledger.work[work + len(forth) :], device)
        backward = own(ledger, end)
        return _Part(forward, ended, backward, left(forward), seconds, seconds + back)

    def _back(self, ran: _Ran) -> None:
        """Backward of what comes to a part's own outputs."""
        pairs: list[tuple[Tensor, Tensor]] = []
        for y in ran.outputs:
            if isinstance(y, Tensor) and y.requires_grad:
                whole = torch.empty(y.shape, dtype=y.dtype)
                self.ledger.mark("buffers", [whole])
                if isinstance(y, ShardTensor):
                    pairs.append((y._local, whole[y._spec.block]))
                else:
                    pairs.append((y, whole))
        results, cotangents = zip(*pairs, strict=True)
        torch.autograd.grad(results, ran.sources, cotangents, allow_unused=True)

    def _tried(self, at: At, halo: tuple[int, ...], back: bool) -> tuple[Any, Meeting]:
        made = Meeting(1)
        ran = self._ran(replica(self.model), at[0], halo[0], made)
        if back and self.task.train:
            ends = [local(y) for y in ran.outputs if isinstance(y, Tensor) and y.requires_grad]
            check_nodes(ends, ran.sources)
            self._back(ran)
        return [cut_of(y) for y in ran.sharded], made

    def _ran(self, model: nn.Module, at: int, halo: int, made: Meeting) -> _Ran:
        """What the model makes of a part. Raises ValueError for what parts may not do."""
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
        outputs = [reduced(y) for y in outputs]
        sharded = [y for y in outputs if isinstance(y, ShardTensor)]
        cut = [*sharded, *(x for x in inputs if isinstance(x, ShardTensor))]
        copied = sum(x._local.numel() * x.element_size() for x in cut)
        sources = [p for p in model.parameters() if p.requires_grad]
        return _Ran(inputs, outputs, sharded, sources, copied)


def _seconds(work: Sequence[Work], device: Device) -> float:
    return sum(device.bound(w)[1] for w in work)
