"""Moving bytes over a process group: any dtype, any sizes, on gloo and NCCL alike.

Of an exchange each rank names the ranks that it gives something or gets something from. Among few
ranks it is one all-to-all, among many a message to each that is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
import torch.distributed as dist

from .. import _torch
from . import groups, pack, transport
from .counters import Sent, finish, sending
from .observers import looked_at, simulated_rank
from .parcels import Parcels, parcels
from .reducible import reducible
from .to_all import plan

# CPU: bytes to all others up to which one exchange is faster than gloo's own collectives (measured
# on 2 to 4 ranks: a third to a half of their time up to 256 KiB)
DIRECT = 2**20
# ranks up to which one all-to-all with mostly empty parts is faster than messages by themselves
FEW = 8
# groups whose ranks have met in a collective
_met: WeakSet[dist.ProcessGroup] = WeakSet()
# dtypes of which torch adds tensors up
ADDED = transport.REDUCED | {torch.bool, torch.int16, torch.complex64, torch.complex128}
_COMBINE: dict[str, Any] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
    "product": torch.mul,
}


def exchange(
    sends: Mapping[int, Sequence[torch.Tensor]],
    shapes: Mapping[int, Sequence[Sequence[int]]],
    like: torch.Tensor,
    group: str,
    label: str,
    *,
    few: bool = True,
) -> dict[int, list[torch.Tensor]]:
    """Send sends[r] to rank r and return what each rank of `shapes` sent here, in shapes[r].

    Ranks that are not named get and give nothing. few: whether every rank gets something of few
    ranks only; all say the same.
    """
    return start_exchange(sends, shapes, like, group, label, few=few, wait=True)()


def start_exchange(
    sends: Mapping[int, Sequence[torch.Tensor]], shapes: Mapping[int, Sequence[Sequence[int]]],
    like: torch.Tensor, group: str, label: str, *, few: bool = True, wait: bool = False,
    **facts: Any,
) -> Callable[[], dict[int, list[torch.Tensor]]]:  # fmt: skip
    """`exchange` that may still be under way: calling what it returns gives what arrived.

    facts: what ranks must agree on beside the dtype; default: how much each gives each.
    """
    parts, numels = list[torch.Tensor](), {}
    for r in sorted(sends):
        parts += sends[r]
        numels[r] = sum(map(torch.Tensor.numel, sends[r]))
    p = parcels(numels, shapes, like.element_size(), few)
    came = start_parcels(parts, p, like, group, label, wait=wait, **facts)

    def arrived() -> dict[int, list[torch.Tensor]]:
        every, found, at = came(), {}, 0
        for r in p.gets:
            found[r] = every[at : at + len(shapes[r])]
            at += len(shapes[r])
        return found

    return arrived


def start_parcels(
    parts: list[torch.Tensor], p: Parcels, like: torch.Tensor, group: str, label: str, *,
    wait: bool = False, **facts: Any,
) -> Callable[[], list[torch.Tensor]]:  # fmt: skip
    """`start_exchange` of parts, rank by rank, as do those that calling what it returns gives."""
    send = pack.joined(parts, like)
    received = like.new_empty(p.length)
    if not facts and looked_at():
        facts = transport.sparse_facts(p.gives, p.gets, group)
    post = partial(_post, received, send, p.gives, p.gets, group, label, p.few, wait)
    works, entry = sending(post, label, p.nbytes, p.messages, group, dtype=like.dtype, **facts)

    def arrived() -> list[torch.Tensor]:
        if works:
            _end(works, entry, group, label)
        found = []
        for at, end, shape in p.places:
            found.append(received[at:end].view(shape))
        return found

    return arrived


def start_all_to_all(
    received: torch.Tensor,
    send: torch.Tensor,
    gets: list[int],
    gives: list[int],
    group: str,
    label: str,
    among: Sequence[int] = (),
    **facts: Any,
) -> Callable[[], Any]:
    """A vector in parts, one for every rank, and what they all give this one, in order.

    gets, gives: the bytes from and to every rank; what this one gives itself is not sent. among:
    the ranks of the group that these are, ascending, when none gives itself anything; the others
    meet in parts of their own. facts: as in `start_exchange`. Calling what is returned ends it.
    """
    n, me, silent = groups.facts[group]
    whole = not among or len(among) == n
    to_some: dict[int, int] = {} if whole else dict(zip(among, gives, strict=True))
    of_some: dict[int, int] = {} if whole else dict(zip(among, gets, strict=True))
    facts = facts or dict(gives=gives, gets=gets)
    if not whole:
        facts = transport.sparse_facts(to_some, of_some, group)
    own = gives[me] if whole else 0
    nbytes = send.numel() * send.element_size() - own
    messages = len(gives) - gives.count(0) - (own > 0)
    post: Callable[[], list[Any]]
    if not whole:
        post = partial(_post, received, send, to_some, of_some, group, label, True, False)
    elif silent:
        post = partial(transport.nothing_arrives, received)
    else:
        post = partial(transport.all_to_all, received, send, gets, gives, group, label)
    works, entry = sending(post, label, nbytes, messages, group, dtype=send.dtype, **facts)
    return lambda: _end(works, entry, group, label)


def _end(works: list[Any], entry: Sent | None, group: str, label: str) -> None:
    """Wait for what was started; who looks at a hang reads group and label from this frame."""
    for work in works:
        finish(work, entry)


def _post(
    received: torch.Tensor,
    send: torch.Tensor,
    gives: dict[int, int],
    gets: dict[int, int],
    group: str,
    label: str,
    few: bool,
    wait: bool,
) -> list[Any]:
    """Start what brings bytes from and to these ranks; on every rank of the group."""
    n, _, silent = groups.facts[group]
    if silent:
        return transport.nothing_arrives(received)
    to = groups.resolve(group)
    together = not few or n <= FEW or simulated_rank() is not None
    if together or (_connects(received) and to not in _met):
        # NCCL connects all ranks in a first collective, which some may have nothing to send in
        _met.add(to)
        every = range(n)
        return transport.all_to_all(
            received, send, [gets.get(r, 0) for r in every], [gives.get(r, 0) for r in every],
            group, label, wait=wait,
        )  # fmt: skip
    works = transport.messages(received, send, gets, gives, group, label)
    if not wait:
        return works
    for work in works:
        finish(work)
    return []


def _connects(x: torch.Tensor) -> bool:
    """Whether ranks are connected by a collective of all of them."""
    return x.is_cuda or transport.is_strict()


def all_gather(
    local: torch.Tensor, shapes: Sequence[Sequence[int]], group: str
) -> list[torch.Tensor]:
    """Every rank's tensor, whose shapes are known, on every rank; padded where they differ."""
    n = len(shapes)
    lengths = [prod(s) for s in shapes]
    most, flat = max(lengths), local.reshape(-1)
    if direct(flat, most, n):
        rows = _start_to_all(flat, lengths, group, "all_gather", lengths=lengths)()
    else:
        padded = all_gather_rows(flat, lengths, most, group)
        rows = [row[:length] for row, length in zip(padded, lengths, strict=True)]
    return [row.view(tuple(s)) for row, s in zip(rows, shapes, strict=True)]


def all_gather_rows(
    flat: torch.Tensor, lengths: Sequence[int], most: int, group: str
) -> torch.Tensor:
    """Every rank's vector, at most so long, as a row; those of shorter ones end in anything."""
    n = len(lengths)
    if flat.numel() < most:
        flat = torch.cat([flat, flat.new_zeros(most - flat.numel())])
    received = flat.new_empty(n * most)
    item = flat.element_size()
    rows = received.view(n, most)
    post: Callable[[], Any] = partial(transport.all_gather, received, flat, group)
    if groups.facts[group].silent:
        # as if the others had the same
        post = partial(rows.copy_, flat)
    sending(
        post, "all_gather", item * most * (n - 1), n - 1, group, dtype=flat.dtype, lengths=lengths
    )
    return rows


def all_gather_numbers(
    mine: Sequence[int], device: torch.device | str, group: str
) -> list[list[int]]:
    """Every rank's numbers, as many of each, on every rank; in a silent world those of this one."""
    found: list[list[int]] = all_gather_table(mine, device, group).tolist()
    return found


def all_gather_table(mine: Sequence[int], device: torch.device | str, group: str) -> Any:
    """`all_gather_numbers` as a numpy array (ranks, numbers)."""
    n = groups.facts[group].size
    own = np.broadcast_to(np.array(mine, dtype=np.int64), (n, len(mine)))
    if n == 1:
        return own
    local = torch.tensor(mine, dtype=torch.int64, device=device)
    if direct(local, len(mine), n):
        rows = torch.stack(all_gather(local, [local.shape] * n, group))
    else:
        rows = all_gather_rows(local, [len(mine)] * n, len(mine), group)
    if groups.facts[group].silent:
        # it is sent all the same
        return own
    return np.array(rows.tolist()) if _torch.transforming() else rows.cpu().numpy()


def all_reduce(xs: Sequence[torch.Tensor], op: str, group: str) -> list[torch.Tensor]:
    """Elementwise reduction over the ranks, of tensors of one dtype in one message."""
    n = groups.facts[group].size
    if n == 1:
        return [x.clone() for x in xs]
    x = xs[0]
    if len(xs) == 1 and x.dtype in transport.REDUCED and direct(x, x.numel(), n):
        return [_combined(x, op, group, n)]
    if len(xs) > 1:
        total = torch.cat([x.reshape(-1) for x in xs])
    else:
        # no view of another tensor, which torch would not let be written to
        total = xs[0].clone(memory_format=torch.contiguous_format)
    lengths = [x.numel() for x in xs]
    start_all_reduce(total.view(-1), op, group, lengths)()
    if len(xs) == 1:
        return [total]
    parts = total.split(lengths)
    return [p.view(x.shape) for p, x in zip(parts, xs, strict=True)]


def agreed_number(number: torch.Tensor, device: torch.device, group: str) -> torch.Tensor:
    """The largest of every rank's number, given on the host; no device is waited for, if can be."""
    if device.type == "cpu" or not groups.meets_on_host(group):
        return all_reduce([number.to(device)], "max", group)[0]
    with transport.on_host():
        return all_reduce([number], "max", group)[0]


def _combined(x: torch.Tensor, op: str, group: str, n: int) -> torch.Tensor:
    """`all_reduce` of what every rank sends to every other."""
    flat, shape = x.reshape(-1), x.shape
    lengths = [flat.numel()]
    found = _start_to_all(flat, lengths * n, group, "all_reduce", lengths=lengths, by=op)()
    if op != "sum" and groups.facts[group].silent:
        # as if the others had the same
        return x.clone(memory_format=torch.contiguous_format)
    # in the order of the ranks, so that all get the same bits
    first, second, *others = found
    total = _COMBINE[op](first.view(shape), second.view(shape))
    for other in others:
        _COMBINE[op](total, other.view(shape), out=total)
    return total


def start_all_reduce(
    flat: torch.Tensor, op: str, group: str, lengths: Sequence[int]
) -> Callable[[], Any]:
    """Begin to reduce a vector in place; calling what is returned ends it.

    lengths: of the tensors that the vector is made of, on which ranks must agree.
    """
    n = groups.facts[group].size
    on_wire, op, back = reducible(flat, op)
    if direct(on_wire, on_wire.numel(), n):
        arrived = _start_to_all(
            on_wire, [on_wire.numel()] * n, group, "all_reduce", lengths=lengths, by=op
        )

        def combine() -> None:
            # in the order of the ranks, so that all get the same bits
            total, *others, last = arrived()
            if op != "sum" and groups.facts[group].silent:
                # as if the others had the same
                back(on_wire)
                return
            for i, other in enumerate(others):
                total = _COMBINE[op](total, other, out=total if i else None)
            back(_COMBINE[op](total, last, out=on_wire))

        return combine
    # a ring all-reduce sends each byte twice but for this rank's own part
    nbytes = 2 * on_wire.numel() * on_wire.element_size() * (n - 1) // n
    post = partial(transport.all_reduce, on_wire, op, group)
    works, entry = sending(
        list if groups.facts[group].silent else post,
        "all_reduce", nbytes, 2 * (n - 1), group, dtype=flat.dtype, lengths=lengths, by=op,
    )  # fmt: skip

    def ended() -> None:
        _end(works, entry, group, "all_reduce")
        back(on_wire)

    return ended


def of_all(flat: torch.Tensor, group: str) -> list[torch.Tensor]:
    """Every rank's vector, all as long as this one, on every rank."""
    n, length, label = groups.facts[group].size, flat.numel(), "all_gather"
    lengths = [length] * n
    if direct(flat, length, n):
        return _start_to_all(flat, lengths, group, label, lengths=lengths)()
    return list(all_gather_rows(flat, lengths, length, group).unbind())


def addends(flat: torch.Tensor, group: str) -> list[torch.Tensor]:
    """Vectors whose sum is that of every rank's vector, which may be written to.

    They are those of all ranks, in their order, where each rank sends to all others; else one.
    """
    n, lengths = groups.facts[group].size, [flat.numel()]
    if direct(flat, flat.numel(), n):
        return _start_to_all(flat, lengths * n, group, "all_reduce", lengths=lengths, by="sum")()
    start_all_reduce(flat, "sum", group, lengths)()
    return [flat]


def direct(x: torch.Tensor, most: int, n: int) -> bool:
    """Whether every rank sends all it has to every other; alike on all ranks."""
    few = n <= 8 and (n - 1) * most * x.element_size() <= DIRECT
    return few and x.device.type == "cpu" and not transport.is_strict()


def _start_to_all(
    flat: torch.Tensor, of: Sequence[int], group: str, label: str, **facts: Any
) -> Callable[[], list[torch.Tensor]]:
    """Every rank's vector, of so many elements, on every rank, in one round that may be under way.

    facts: as in `start_exchange`.
    """
    p = plan(tuple(of), flat.element_size(), group)
    n = len(p.gives)
    received = flat.new_empty(p.length)
    send = flat if n == 2 else flat.repeat(n - 1)
    if p.silent:
        post: Any = partial(transport.nothing_arrives, received)
    else:
        post = partial(transport.all_to_all, received, send, p.gets, p.gives, group, label)
    works, entry = sending(post, label, p.nbytes, p.messages, group, dtype=flat.dtype, **facts)

    def every() -> list[torch.Tensor]:
        if works:
            _end(works, entry, group, label)
        # no views of one op, which autograd would let nobody write to
        found = list(received.unsafe_split_with_sizes(p.others))
        found.insert(p.me, flat)
        return found

    return every


def broadcast(flat: torch.Tensor, group: str, source: int = 0) -> None:
    """A vector's values from one rank of the group to all."""
    n = groups.facts[group].size
    first = groups.facts[group].rank == source
    nbytes = flat.numel() * flat.element_size() * (n - 1) if first else 0
    sending(
        list if groups.facts[group].silent else partial(transport.broadcast, flat, group, source),
        "broadcast", nbytes, (n - 1) * first, group, dtype=flat.dtype, lengths=[flat.numel()],
    )  # fmt: skip
