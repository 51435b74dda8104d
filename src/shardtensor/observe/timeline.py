"""When each rank ran what, and who waited for whom: as numbers, Chrome trace events, a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..comm.counters import Call, Sent

MIB = 2**20


@dataclass
class Part:
    """One rank's. offset: by how much its clock is ahead (s); memory: (s, bytes) over time."""

    rank: int
    offset: float
    begin: float
    end: float
    calls: list[Call]
    sent: list[Sent]
    memory: list[tuple[float, int]]


class Timeline:
    """The parts of some ranks."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = sorted(parts, key=lambda p: p.rank)

    def late(self) -> dict[int, list[float]]:
        """For each rank and collective: seconds from its coming to when the last rank came.

        The n-th collective of a group is the same one on all its ranks. Of collectives that run
        while the rank computes it is a bound: it need not have waited.
        """
        came: dict[tuple[Any, int], dict[int, float]] = {}
        keys: dict[int, list[tuple[Any, int]]] = {}
        for p in self.parts:
            seen: dict[Any, int] = {}
            for s in p.sent:
                seen[s.peers] = number = seen.get(s.peers, -1) + 1
                came.setdefault((s.peers, number), {})[p.rank] = s.begin - p.offset
                keys.setdefault(p.rank, []).append((s.peers, number))
        return {
            p.rank: [max(came[k].values()) - came[k][p.rank] for k in keys.get(p.rank, [])]
            for p in self.parts
        }

    def waits(self, by: str = "rank") -> dict[Any, float]:
        """Seconds spent waiting for later ranks, by "rank", or by "op" or "line" over all ranks."""
        if by not in ("rank", "op", "line"):
            raise ValueError(f'by is {by!r}; one of "rank", "op", "line"')
        late, found = self.late(), dict[Any, float]()
        for p in self.parts:
            if by == "rank":
                found[p.rank] = 0.0
            for s, wait in zip(p.sent, late[p.rank], strict=True):
                key = p.rank if by == "rank" else (s.op or "-") if by == "op" else (s.line or "?")
                # no longer than it was in the call
                found[key] = found.get(key, 0.0) + min(wait, s.seconds)
        return found

    def table(self) -> str:
        """A line for each rank: seconds, in collectives, waiting for later ranks; MB sent; peak.

        The clock is that of its collectives: the host's, the device's, or some of each.
        """
        lines = [
            f"{'rank':>4} {'s':>9} {'in collectives':>15} {'waiting':>9} {'MB sent':>9} "
            f"{'peak MiB':>9} clock"
        ]
        waits = self.waits()
        for p in self.parts:
            peak = f"{max((b for _, b in p.memory), default=0) / MIB:9.1f}" if p.memory else "-"
            clocks = "+".join(sorted({s.clock for s in p.sent})) or "host"
            lines.append(
                f"{p.rank:4} {p.end - p.begin:9.3f} {sum(s.seconds for s in p.sent):15.3f} "
                f"{waits[p.rank]:9.3f} {sum(s.bytes for s in p.sent) / 1e6:9.2f} {peak:>9} "
                f"{clocks}"
            )
        return "\n".join(lines)

    def events(self) -> list[dict[str, Any]]:
        """Trace events: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU

        A process for each rank; ops on one thread, collectives on others, so that events of one
        do not overlap; memory as a counter.
        """
        start = min(p.begin - p.offset for p in self.parts)
        late, found = self.late(), list[dict[str, Any]]()
        for p in self.parts:

            def at(t: float, ahead: float = p.offset) -> float:
                return round(1e6 * (t - ahead - start), 3)

            def event(ph: str, name: str, tid: int, pid: int = p.rank, **more: Any) -> None:
                found.append({"ph": ph, "name": name, "pid": pid, "tid": tid, **more})

            event("M", "process_name", 0, args={"name": f"rank {p.rank}"})
            event("M", "thread_name", 0, args={"name": "ops"})
            for c in p.calls:
                took = round(1e6 * (c.end - c.begin), 3)
                facts = {"rule": c.rule, "line": c.line, "clock": c.clock}
                event("X", c.op, 0, cat="op", ts=at(c.begin), dur=took, args=facts)
            lanes: list[float] = []
            for s, wait in zip(p.sent, late[p.rank], strict=True):
                lane = next((i for i, end in enumerate(lanes) if end <= s.begin), len(lanes))
                if lane == len(lanes):
                    lanes.append(0.0)
                    event("M", "thread_name", lane + 1, args={"name": f"collectives {lane + 1}"})
                lanes[lane] = s.end
                event(
                    "X", s.collective, lane + 1, cat="collective",
                    ts=at(s.begin), dur=round(1e6 * (s.end - s.begin), 3),
                    args={
                        "op": s.op, "rule": s.rule, "line": s.line, "backward": s.backward,
                        "bytes": s.bytes, "messages": s.messages, "ranks": s.ranks,
                        "clock": s.clock,
                        "last rank came after us": round(1e6 * wait, 3),
                    },
                )  # fmt: skip
            for t, nbytes in p.memory:
                event("C", "memory", 0, ts=at(t), args={"bytes": nbytes})
        return found

    def save(self, path: str | Path) -> None:
        """Write Chrome trace events: open the file in ui.perfetto.dev or chrome://tracing."""
        text = json.dumps({"traceEvents": self.events(), "displayTimeUnit": "ms"})
        Path(path).write_text(text)

    def picture(self, path: str | Path) -> None:
        """Draw each rank's memory over time, and below when it computed, sent and waited."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        start = min(p.begin - p.offset for p in self.parts)
        with_memory = any(p.memory for p in self.parts)
        rows, heights = (2, (2, 1)) if with_memory else (1, (1,))
        fig, axes = plt.subplots(
            rows, 1, figsize=(10, 3 + 0.35 * len(self.parts) + 2 * with_memory), sharex=True,
            height_ratios=heights, layout="constrained", squeeze=False,
        )  # fmt: skip
        late, bars = self.late(), axes[-1, 0]
        for p in self.parts:
            ahead = p.offset + start
            if with_memory:
                ms = [1e3 * (t - ahead) for t, _ in p.memory]
                held = [b / MIB for _, b in p.memory]
                axes[0, 0].step(ms, held, where="post", label=f"rank {p.rank}", lw=1)
            bars.barh(
                p.rank, 1e3 * (p.end - p.begin), left=1e3 * (p.begin - ahead), height=0.7,
                color="#cfd8e3", label="computing" if p is self.parts[0] else None,
            )  # fmt: skip
            sent = [(1e3 * (s.begin - ahead), 1e3 * s.seconds) for s in p.sent]
            bars.broken_barh(sent, (p.rank - 0.35, 0.7), color="#3b6ea8", lw=0,
                             label="in a collective" if p is self.parts[0] else None)  # fmt: skip
            waits = [(a, min(b, 1e3 * w)) for (a, b), w in zip(sent, late[p.rank], strict=True)]
            bars.broken_barh(waits, (p.rank - 0.35, 0.7), color="#d98032", lw=0,
                             label="of it, until the last rank came"
                             if p is self.parts[0] else None)  # fmt: skip
        bars.set_yticks([p.rank for p in self.parts], [f"rank {p.rank}" for p in self.parts])
        bars.invert_yaxis()
        bars.set_xlabel("ms")
        if with_memory:
            axes[0, 0].set_ylabel("MiB beyond the start")
            axes[0, 0].legend(fontsize=8)
        bars.legend(fontsize=8, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.35))
        fig.savefig(path, dpi=110)
        plt.close(fig)
