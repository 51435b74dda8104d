"""What ran and what was sent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .comm import count


class Trace:
    """The ops and collectives of this rank inside a `trace()` block."""

    def __init__(self) -> None:
        self.record = count.Record(count.simulated_rank())

    @property
    def ops(self) -> list[tuple[str, str]]:
        """(op, rule) of every call on a ShardTensor, in order."""
        return self.record.ops

    @property
    def sent(self) -> list[count.Sent]:
        """Every collective: its name, bytes and messages sent to other ranks, op and seconds."""
        return self.record.sent

    @property
    def gathered(self) -> list[tuple[str, int]]:
        """(op, bytes of its operands) of every call that had no rule and gathered them."""
        return self.record.gathered

    @property
    def bytes(self) -> int:
        """Bytes that this rank sent to other ranks."""
        return sum(s.bytes for s in self.sent)

    @property
    def messages(self) -> int:
        """Messages that this rank sent to other ranks."""
        return sum(s.messages for s in self.sent)

    def table(self) -> str:
        """A line per op and collective: calls, messages, bytes, milliseconds."""
        rows: dict[tuple[str, str], list[float]] = {}
        for s in self.sent:
            row = rows.setdefault((s.op or "backward", s.collective), [0, 0, 0, 0.0])
            for i, v in enumerate((1, s.messages, s.bytes, 1e3 * s.seconds)):
                row[i] += v
        lines = [
            f"{'op':24} {'collective':12} {'calls':>6} {'messages':>9} {'bytes':>12} {'ms':>9}"
        ]
        lines += [
            f"{op:24} {name:12} {c:6.0f} {m:9.0f} {b:12.0f} {t:9.2f}"
            for (op, name), (c, m, b, t) in rows.items()
        ]
        return "\n".join(lines)


@contextmanager
def trace() -> Iterator[Trace]:
    """Record the ops and collectives of this rank. Outside of it nothing is recorded."""
    t = Trace()
    count.records.append(t.record)
    try:
        yield t
    finally:
        count.records.remove(t.record)
