"""Parts of gradients in one backward, and the messages that make them whole.

Ranks have addends of the gradient of a parameter that meets shards whole: an all-reduce adds these
up. Of one that is cut like shards each rank has the gradient of its own rows: an all-gather brings
the others'.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import comm
from ..comm import wire
from ..comm.gathers import gathered
from ..cuts import Cut
from .checksum import LENGTH, Heads

# a plain tuple, of which C knows the hash
WHOLE: Any = ()


class Place(NamedTuple):
    """A parameter of a bucket, and how its rows are cut where it is used; whole without sizes."""

    number: int
    dim: int = 0
    sizes: Cut = WHOLE

    def of(self, x: Tensor, group: str) -> Tensor:
        """What is used of the parameter here."""
        if not self.sizes:
            return x
        me = comm.rank(group)
        return x.narrow(self.dim, self.sizes.offsets[me], self.sizes[me])

    def whole(self, part: Tensor, group: str) -> Tensor:
        """The whole gradient from every rank's part, at once and differentiably."""
        if self.sizes:
            return comm.gather(part, self.dim, self.sizes, group)
        return comm.reduce(part, group)


class Ranks:
    """Whom gradients are summed and averaged over, and what is under way to them.

    domain: ranks that share samples, whose parts are added up. data: those that have the same part
    of other samples, over which gradients are averaged. everyone: both.
    """

    def __init__(self, domain: str, data: str, everyone: str) -> None:
        self.domain, self.data, self.everyone = domain, data, everyone
        self.copies = comm.size(data)
        self.sent: list[Message] = []
        known = comm.knows_values(everyone)
        self.heads = Heads(comm.size(everyone), known)
        self.mean_heads = Heads(self.copies, known)
        self.buckets = 0

    def send(self, flat: Tensor, lengths: list[int], task: int) -> Message:
        """Begin to sum a vector in place."""
        for message in [m for m in self.sent if m.task != task]:
            # of a backward that broke off, on all ranks at the same place
            message.wait()
        on_wire = torch.view_as_real(flat).view(-1) if flat.is_complex() else flat
        work = None
        if comm.size(self.everyone) > 1:
            work = wire.start_all_reduce(on_wire, "sum", self.everyone, lengths)
        message = Message(self, flat, work, task)
        self.sent.append(message)
        return message


class Message:
    """A vector of gradients that is being summed."""

    def __init__(
        self, ranks: Ranks, flat: Tensor, work: Callable[[], Any] | None, task: int
    ) -> None:
        self.ranks, self.flat, self.work, self.task = ranks, flat, work, task
        self.under_way = True
        # what its head says
        self.key: Any = None
        self.shapes: list[Any] = []

    def wait(self) -> None:
        """End the sum, and average."""
        if not self.under_way:
            return
        self.under_way = False
        self.ranks.sent.remove(self)
        if self.work is not None:
            self.work()
        if self.key is not None:
            self.ranks.heads.read(self.key, self.flat[-LENGTH:], self.shapes)
        if self.ranks.copies > 1:
            self.flat.div_(self.ranks.copies)


class Pass:
    """The parts of a bucket in one backward."""

    def __init__(self, batch: Any, expected: set[Place], task: int) -> None:
        self.ranks, self.number = batch.ranks, batch.number
        self.expected, self.task = expected, task
        self.parts: dict[Place, Tensor] = {}
        # what brings it, if it is not there yet
        self.taken: dict[Place, tuple[Message | None, Tensor | None]] = {}

    def add(
        self, places: Sequence[Place], parts: Sequence[Tensor | None], owned: bool = False
    ) -> None:
        """Take parts; None: there is none. owned: nobody else has what the one part is in."""
        for place, part in zip(places, parts, strict=True):
            if part is not None:
                self.parts[place] = part
        self.expected.difference_update(places)
        if not self.expected:
            self.send(owned)

    def send(self, owned: bool = False) -> None:
        """Begin to sum what is there, and gather it."""
        parts, self.parts = dict(sorted(self.parts.items())), {}
        rows = {p: g for p, g in parts.items() if p.sizes}
        addends = {p: g for p, g in parts.items() if not p.sizes} if rows else parts
        if addends:
            self._sum(addends, owned and len(parts) == 1)
        if rows:
            dims, sizes = [p.dim for p in rows], [p.sizes for p in rows]
            parts.clear()
            wholes = gathered(list(rows.values()), dims, sizes, self.ranks.domain)
            self.taken.update({p: (None, whole) for p, whole in zip(rows, wholes, strict=True)})

    def _sum(self, parts: dict[Place, Tensor], in_place: bool) -> None:
        shapes = [p.shape for p in parts.values()]
        vectors = [p.reshape(-1) for p in parts.values()]
        key = None
        if self.ranks.copies > 1:
            # the others' samples may have taken another way
            key = (self.number, *(p.number for p in parts))
            self.ranks.heads.begin()
            vectors.append(self.ranks.heads.of(key, vectors[0]))
        lengths = [v.numel() for v in vectors]
        flat = vectors[0] if in_place and key is None else torch.cat(vectors)
        message = self.ranks.send(flat, lengths, self.task)
        message.key, message.shapes = key, shapes
        at = 0
        for place, shape, n in zip(parts, shapes, lengths, strict=False):
            self.taken[place] = message, flat[at : at + n].view(shape)
            at += n

    def take(self, places: Sequence[Place]) -> list[Tensor | None]:
        """The whole gradients; None where no rank had a part."""
        wholes = list[Tensor | None]()
        for place in places:
            if place in self.parts:
                # parts on other devices are still to come
                self.send()
            message, whole = self.taken.pop(place, (None, None))
            if message is not None and message.under_way:
                message.wait()
            # where it came, but a tensor of its own: no view, whose versions are those of all
            wholes.append(None if whole is None else whole.data)
        return wholes
