"""Gradients of replicated tensors wait for one another, to be summed in few messages.

As many conditions, scales and shifts meet shards in a model, as many sums of a few hundred bytes
would backward wait for. Here they are sent when backward has nothing else to run, all that there
are. The engine runs nodes by their numbers: `Start` takes this rank's part of a gradient at its
place, `Wait` gives the sum, and has a lower number than any other node. So what is sent together
follows from what depends on what in the graph, which is the same on all ranks.

Large ones wait only for those of the same tensor, to which they are added before they are sent:
their `Wait` comes where the node that made the tensor would.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from threading import local
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor

from .. import _torch, later
from .sums import Identity, is_there, of_given, reduce_op

# bytes of the gradients of one call up to which they wait, and of all that do
SMALL, MOST = 2**16, 2**22
# calls of one backward that wait for others
CALLS = 1024

_here = local()


def begin() -> None:
    """Let gradients of what this thread computes from now on wait for one another."""
    if not getattr(_here, "begun", False):
        # numbers up to CALLS are those of `Wait`; 0 is that of parameters, which come last
        _torch.skip_numbers(CALLS + 1)
        _here.begun, _here.leaves, _here.fsdp = True, False, 0
        _here.order = Order()


def forget() -> None:
    """Begin anew, in another world."""
    _here.begun = False


def begin_model(fsdp: bool) -> None:
    """As `begin`, for a model of which no op sums gradients of parameters by itself.

    fsdp: whether FSDP2 does. Else those of leaves wait, too: no hook waits for these.
    """
    begin()
    used = later.fsdp_classes()
    if used:
        # when memory is freed differs from rank to rank
        gc.collect()
    _here.leaves = not fsdp
    _here.fsdp = -1 if fsdp or (used and _torch.has_composable_modules()) else len(used)


def vary(xs: Sequence[Tensor], group: str) -> Sequence[Tensor] | None:
    """As `sums.vary`, of tensors of one dtype; None where their gradients do not wait.

    Alike on all ranks. Small ones do not where FSDP2 is used: its modules free their weights once
    the gradient of what they were called with is there, when no part of their backward may be left.
    """
    if not getattr(_here, "begun", False):
        return None
    leaves, size, sources = False, 0, []
    for x in xs:
        leaf = x.is_leaf
        leaves = leaves or leaf
        size += x.numel() * x.element_size()
        sources.append((x if leaf else x.grad_fn, x.output_nr))
    small = size <= SMALL and len(later.fsdp_classes()) == _here.fsdp
    if (leaves and not (small and _here.leaves)) or (not small and len(xs) > 1):
        return None
    if _torch.is_tracing() or _torch.transforming():
        return None
    if _here.order.ended:
        _here.order = Order()
    call = Call(group, None if small else _torch.number_of(xs[0].grad_fn), _here.order)
    held = Wait.apply(call, *xs)
    call.wait = ref(held[0].grad_fn)
    call.sources = sources
    return Start.apply(call, *held)


class Order:
    """Whether what some calls led to has a graph of gradients: then none of them waits any more.

    Where a view is gone that was written to, torch puts what wrote into such a graph twice, as a
    node and within that of the write, which has to run first, as its number says.
    """

    def __init__(self) -> None:
        # whether there is one, and whether a backward that makes none came after
        self.kept = self.ended = False


class Call:
    """What the two nodes of one call know of each other in the backward that runs.

    number: of `Wait`, which sends its own message; None: with others, when nothing else is left.
    """

    def __init__(self, group: str, number: int | None, order: Order) -> None:
        self.group, self.number, self.order = group, number, order
        self.wait: Any = None
        # where the gradients go
        self.sources: list[tuple[Any, int]] = []
        # the number of the backward, and there the message and where in it
        self.task = -1
        self.place: tuple[Backward, Message, list[int | None]] | None = None


class Message:
    """Parts of gradients that are sent together, then their sums.

    Parts of one tensor are added up before, and their sum is the first one's. They are sent in the
    order of their nodes, last ones first: which of two nodes of one number runs first differs from
    rank to rank, and so does which part comes first of those that follow from them.
    """

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        # the number of the `Start` of each
        self.numbers: list[int] = []
        # the tensors are kept, so that their ids are theirs
        self.known: dict[Any, tuple[int, Any]] = {}
        self.sums: list[Tensor] | None = None

    def add(self, source: tuple[Any, int], part: Tensor, number: int) -> int | None:
        """Take a part; where its sum will be, None if in the place of another."""
        key = id(source[0]), source[1]
        if key in self.known:
            at, _ = self.known[key]
            self.parts[at] = self.parts[at] + part
            if number > self.numbers[at]:
                self.numbers[at] = number
            return None
        at = len(self.parts)
        self.known[key] = at, source[0]
        self.parts.append(part)
        self.numbers.append(number)
        return at

    def send(self, group: str) -> None:
        """Sum the parts over the ranks."""
        numbers, parts, self.parts = self.numbers, self.parts, []
        if numbers == sorted(numbers, reverse=True):
            self.sums = reduce_op(parts, "sum", group)
            return
        order = sorted(range(len(parts)), key=numbers.__getitem__, reverse=True)
        sums = reduce_op([parts[i] for i in order], "sum", group)
        found = dict(zip(order, sums, strict=True))
        self.sums = [found[i] for i in range(len(parts))]


class Backward:
    """What waits in one backward. Its calls hold it, and so the graph; nothing else does."""

    def __init__(self) -> None:
        self.waiting: dict[Any, Message] = {}
        # of one tensor each
        self.alone: dict[Any, Message] = {}
        self.bytes = self.calls = 0

    def add(
        self, call: Call, parts: Sequence[Tensor | None], there: Sequence[Tensor], number: int
    ) -> tuple[Message, list[int | None]]:
        """The message of some parts, and where in it their sums will be."""
        if call.number is not None:
            message = self.alone.setdefault(_source(call), Message())
        else:
            key = call.group, there[0].dtype, there[0].device
            message = self.waiting.setdefault(key, Message())
            for g in there:
                self.bytes += g.nbytes
        places = list[int | None]()
        for source, part in zip(call.sources, parts, strict=True):
            places.append(None if part is None else message.add(source, part, number))
        return message, places

    def send(self, call: Call | None = None) -> None:
        """Sum all that waits, in the order of the last node of each message.

        call: one whose message is sent by itself, or with those of the same node's other results.
        """
        if call is not None and call.number is not None:
            node = id(call.sources[0][0])
            sent = {key: self.alone[key] for key in list(self.alone) if key[1] == node}
            for key in sent:
                del self.alone[key]
        else:
            sent, self.waiting, self.bytes = self.waiting, {}, 0
        for (group, *_), message in sorted(sent.items(), key=_last, reverse=True):
            message.send(group)


def _last(sent: tuple[tuple[Any, ...], Message]) -> int:
    return max(sent[1].numbers)


def _source(call: Call) -> tuple[Any, ...]:
    tensor, number = call.sources[0]
    return call.group, id(tensor), number


# by torch's number of the backward pass
_running: WeakValueDictionary[int, Backward] = WeakValueDictionary()


class Wait(Identity):
    """The identity; backward gives the sums of the parts that `Start` took."""

    @staticmethod
    def backward(ctx: Any, *parts: Tensor | None) -> tuple[Any, ...]:
        call: Call = ctx.about
        if torch.is_grad_enabled():
            # a gradient of this gradient is wanted: `Start` summed it
            return None, *parts
        if call.place is None or call.task != _torch.graph_task():
            # `Start` ran in a backward that ended between the two, or has given none
            return None, *of_given(reduce_op, parts, "sum", call.group)
        running, message, places = call.place
        call.place = None
        if message.sums is None:
            running.send(call)
        assert message.sums is not None
        # a loop: a comprehension is a call of Python
        sums, found = message.sums, list[Tensor | None]()
        for i in places:
            found.append(None if i is None else sums[i])
        return None, *found


class Start(Identity):
    """The identity; backward hands in this rank's part of the gradients."""

    @staticmethod
    def backward(ctx: Any, *parts: Tensor | None) -> tuple[Any, ...]:
        call: Call = ctx.about
        wait = call.wait()
        if torch.is_grad_enabled():
            call.order.kept = True
            return None, *of_given(reduce_op, parts, "sum", call.group)
        if call.order.kept:
            call.order.ended, call.place = True, None
            if wait is not None:
                # which has another if it waited before
                _torch.run_after(wait, _torch.number_of(ctx))
            return None, *parts
        there: list[Any] = list(filter(is_there, parts))
        if not there:
            call.place = None
            return None, *parts
        call.task = _torch.graph_task()
        running = _running.get(call.task)
        if running is None:
            running = _running[call.task] = Backward()
        call.place = running, *running.add(call, parts, there, _torch.number_of(ctx))
        number = call.number
        if number is None and running.calls < CALLS:
            # later ones come after all that the sums of this one lead to; no two have one number:
            # which of these is first differs from rank to rank
            number = CALLS - running.calls
            running.calls += 1
        if number is None:
            running.send()
        elif wait is not None:
            _torch.run_after(wait, number)
        if running.bytes > MOST:
            running.send()
        return None, *parts
