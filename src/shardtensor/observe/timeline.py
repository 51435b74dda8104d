"""When each rank ran what, and who waited for whom: as numbers, Chrome trace events, a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..comm.counters import Call, Sent
from ..page import charts, still
from ..page.blocks import (
    Block,
    Cell,
    Row,
    chart,
    choice,
    heading,
    number,
    place,
    table,
    text,
    variants,
)
from ..page.document import Page, Shown

MIB = 2**20
COLOURS = {"ops": "#56b4e9", "collectives": "#009e73", "waiting": "#d55e00"}
# blocks that a page draws, the longest; ranks, those that waited most; moments of memory, the peaks
MOST, RANKS, MOMENTS = 6000, 32, 1000


@dataclass
class Part:
    """One rank's. offset: by how much its clock is ahead (s); memory: (s, bytes) over time.

    simulated: ranks run one at a time, so that times mean little.
    """

    rank: int
    offset: float
    begin: float
    end: float
    calls: list[Call]
    sent: list[Sent]
    memory: list[tuple[float, int]]
    simulated: bool = False


class Timeline(Shown):
    """The parts of some ranks. A notebook shows it; `.html(path)` writes a page."""

    parts: list[Part]

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = sorted(parts, key=lambda p: p.rank)

    def late(self) -> dict[int, list[float]]:
        """For each rank and collective: seconds from its coming to when the last rank came.

        The n-th collective of a group is the same one on all its ranks. Of collectives that run
        while the rank computes it is a bound: it need not have waited.
        """
        return {
            rank: [came[last] - came[rank] for came, last in met]
            for rank, met in self._met().items()
        }

    def _met(self) -> dict[int, list[tuple[dict[int, float], int]]]:
        """For each rank and collective: when each of the ranks came to it, and who was last."""
        came: dict[tuple[Any, int], dict[int, float]] = {}
        found: dict[int, list[dict[int, float]]] = {}
        for p in self.parts:
            seen: dict[Any, int] = {}
            mine = found.setdefault(p.rank, [])
            for s in p.sent:
                seen[s.peers] = number = seen.get(s.peers, -1) + 1
                met = came.setdefault((s.peers, number), {})
                met[p.rank] = s.begin - p.offset
                mine.append(met)
        # once for all ranks of a collective
        last = {id(met): max(met, key=met.__getitem__) for met in came.values()}
        return {rank: [(met, last[id(met)]) for met in mine] for rank, mine in found.items()}

    def waited_for(self) -> dict[tuple[int, int], float]:
        """(rank, the rank that came last): seconds that the first waited for the second."""
        found: dict[tuple[int, int], float] = {}
        met = self._met()
        for p in self.parts:
            for s, (came, last) in zip(p.sent, met[p.rank], strict=True):
                if last != p.rank:
                    wait = min(came[last] - came[p.rank], s.seconds)
                    found[p.rank, last] = found.get((p.rank, last), 0.0) + wait
        return found

    def waits(self, by: str = "rank") -> dict[Any, float]:
        """Seconds spent waiting for later ranks, by "rank", or by "op" or "line" over all ranks.

        Raises ValueError for another word.
        """
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

    def page(self) -> Page:
        """What each rank did and when, who waited for whom, messages, memory."""
        waits = self.waits()
        spent = sum(s.seconds for p in self.parts for s in p.sent)
        whole = sum(p.end - p.begin for p in self.parts) or 1.0
        n = len(self.parts)
        verdict = f"{number(1e3 * max(p.end - p.begin for p in self.parts))} ms"
        verdict += f" on {n} ranks" if n > 1 else f" on rank {self.parts[0].rank}"
        verdict += f": {spent / whole:.0%} of the time in collectives"
        if n > 1:
            verdict += f", {sum(waits.values()) / whole:.0%} waiting for later ranks"
            by_line = self.waits("line")
            if any(by_line.values()):
                verdict += f", most at {place(max(by_line, key=by_line.__getitem__))}"
        about = "Times of simulated ranks mean little: one runs at a time; messages are right."
        simulated = any(p.simulated for p in self.parts)
        page = Page("Trace", f"{verdict}.", None, about if simulated else "")
        most = set(sorted(waits, key=waits.__getitem__, reverse=True)[:RANKS])
        shown = [p for p in self.parts if p.rank in most]
        page.add(*self._ranks(waits), *self._lanes(shown), *self._pairs(shown), *self._messages())
        page.add(*self._memory())
        return page

    def _ranks(self, waits: dict[Any, float]) -> Iterator[Block]:
        longest = max(p.end - p.begin for p in self.parts) or 1.0
        rows = []
        for p in self.parts:
            inside = sum(s.seconds for s in p.sent)
            peak = max((b for _, b in p.memory), default=0)
            numbers = [
                Cell(f"{1e3 * t:.3f}", t, t / longest)
                for t in (p.end - p.begin, inside, waits[p.rank])
            ]
            sent, messages = sum(s.bytes for s in p.sent), sum(s.messages for s in p.sent)
            numbers += [Cell(f"{sent / 1e6:.3f}", sent), Cell(str(messages), messages)]
            numbers += [Cell(f"{peak / MIB:.1f}", peak) if p.memory else Cell("-")]
            rows.append(Row([Cell(str(p.rank), p.rank), *numbers]))
        yield heading("Ranks")
        yield table(
            ["rank", "ms", "ms in collectives", "ms waiting", "MB sent", "messages", "peak MiB"],
            rows,
        )

    def _lanes(self, shown: Sequence[Part]) -> Iterator[Block]:
        """When each rank computed, sent and waited."""
        start, late = min(p.begin - p.offset for p in self.parts), self.late()
        found: dict[str, list[tuple[int, float, float, str]]] = {k: [] for k in COLOURS}
        for i, p in enumerate(shown):
            ahead = p.offset + start
            for c in p.calls:
                told = f"{c.op}, {1e3 * (c.end - c.begin):.3g} ms<br>{c.line}"
                found["ops"].append((2 * i, 1e3 * (c.begin - ahead), 1e3 * (c.end - c.begin), told))
            for s, wait in zip(p.sent, late[p.rank], strict=True):
                at, way = 1e3 * (s.begin - ahead), ", backward" if s.backward else ""
                told = f"{s.collective} of {s.op or 'gradients'}{way}, {1e3 * s.seconds:.3g} ms, "
                told += f"{s.bytes} bytes<br>{s.line}"
                found["collectives"].append((2 * i + 1, at, 1e3 * (s.end - s.begin), told))
                waited = 1e3 * min(wait, s.end - s.begin)
                found["waiting"].append(
                    (2 * i + 1, at, waited, f"{waited:.3g} ms for a later rank")
                )
        least = sorted((b[2] for blocks in found.values() for b in blocks), reverse=True)[:MOST]
        drawn = {k: [b for b in v if b[2] > 0 and b[2] >= least[-1]] for k, v in found.items()}
        names = [f"rank {p.rank}, {what}" for p in shown for what in ("ops", "collectives")]
        if any(drawn.values()):
            plain = {k: [b[:3] for b in v] for k, v in drawn.items()}
            yield heading("Timeline")
            if len(shown) < len(self.parts):
                yield text(f"Of {len(self.parts)} ranks the {len(shown)} that waited most.", "note")
            yield chart(
                "lanes",
                {"lanes": charts.lanes(names, drawn, "ms", COLOURS)},
                "when each rank computed, sent and waited",
                still.bars(names, plain, COLOURS, "ms"),
            )

    def _pairs(self, shown: Sequence[Part]) -> Iterator[Block]:
        """Who waited for whom."""
        pairs, ranks = self.waited_for(), [p.rank for p in shown]
        if not pairs:
            return
        names = [f"rank {r}" for r in ranks]
        values = [[1e3 * pairs.get((a, b), 0.0) for b in ranks] for a in ranks]
        yield heading("Who waits for whom")
        yield text(
            "The rank that came last to a collective is the one that was waited for.", "note"
        )
        titles = ("waits", "for")
        yield chart(
            "pairs",
            {"pairs": charts.matrix(values, names, names, "ms", titles)},
            "waiting by pairs",
        )

    def _messages(self) -> Iterator[Block]:
        """Messages by op and by line, of all ranks."""
        sent = [s for p in self.parts for s in p.sent]
        if not sent:
            return
        tables, figures = {}, {}
        for by in ("op", "line"):
            rows: dict[tuple[str, str, str], list[float]] = {}
            for s in sent:
                of = (s.line or "?") if by == "line" else s.op or "gradients of weights"
                row = rows.setdefault(
                    (of, "backward" if s.backward else "forward", s.collective), [0] * 4
                )
                for i, v in enumerate((1, s.messages, s.bytes, 1e3 * s.seconds)):
                    row[i] += v
            ordered = sorted(rows.items(), key=lambda r: -r[1][3])
            tables[by] = table(
                [by, "way", "collective", "calls", "messages", "bytes", "ms"],
                [Row([*k, *(Cell(f"{v:.0f}", v) for v in row[:3]), Cell(f"{row[3]:.3f}", row[3])])
                 for k, row in ordered],
                find=True,
            )  # fmt: skip
            names = list(dict.fromkeys(of for (of, *_), _ in ordered))[:20]
            ways = sorted({way for _, _, way in rows})
            parts = {
                w: [sum(r[2] for (of, _, way), r in rows.items() if (of, way) == (name, w)) / 1e6
                    for name in names] for w in ways
            }  # fmt: skip
            figures[f"sent/{by}"] = charts.stacked(
                list(map(place, names)), parts, "MB sent by all ranks"
            )
        yield heading("Messages")
        yield choice("by", {"op": "op", "line": "line of your code"}, "by")
        yield chart("sent/{by}", figures, "bytes sent")
        yield variants("{by}", tables)

    def _memory(self) -> Iterator[Block]:
        start = min(p.begin - p.offset for p in self.parts)
        figures = {
            str(p.rank): charts.course(
                [1e3 * (t - p.offset - start) for t, _ in held],
                {"allocated": [b / MIB for _, b in held]}, "ms", "MiB",
            )
            for p in self.parts if (held := _peaks(p.memory))
        }  # fmt: skip
        if figures:
            yield heading("Memory")
            yield choice("rank", {r: f"rank {r}" for r in figures}, "of")
            keyed = {f"memory/{r}": f for r, f in figures.items()}
            yield chart("memory/{rank}", keyed, "memory over time")

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


def _peaks(memory: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Of many moments those at which most was held."""
    step = -(-len(memory) // MOMENTS) or 1
    return [max(memory[i : i + step], key=lambda m: m[1]) for i in range(0, len(memory), step)]
