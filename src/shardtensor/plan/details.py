"""What a page shows of the configuration that is chosen: memory, modules, messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..comm.counters import Sent
from ..page import charts
from ..page.blocks import (
    Block,
    Cell,
    Row,
    answer,
    chart,
    choice,
    heading,
    number,
    place,
    table,
    variants,
)
from .estimate import Device, Estimate
from .step.ledger import KINDS
from .tree import Part, Tree

_LARGEST_FIRST = (
    "activations", "parameters", "gradients", "optimizer", "communication", "inputs", "buffers",
)  # fmt: skip
# what stays all the step lies below
_FROM_BELOW = (
    "parameters", "optimizer", "gradients", "buffers", "inputs", "communication", "activations",
)  # fmt: skip
COLOURS = {kind: charts.colour(i) for i, kind in enumerate(_LARGEST_FIRST)}
MEASURES = {"held": "memory at the peak", "time": "time", "sent": "bytes sent"}


def course(shown: dict[str, Estimate], device: Device) -> Iterator[Block]:
    """What is held over the step."""
    figures = {}
    for row, e in shown.items():
        c = e.course
        if c is None:
            continue
        unit, name = unit_of(e.peak)
        held = {
            k: [h[KINDS.index(k)] / unit for h in c.held]
            for k in _FROM_BELOW
            if any(h[KINDS.index(k)] > e.peak / 1000 for h in c.held)
        }  # fmt: skip
        figures[f"course/{row}"] = charts.course(
            [1e3 * t for t in c.at], held, "ms of compute, estimated", name, COLOURS,
            [(p, 1e3 * t) for p, t in c.phases],
            (f"memory of {device.name}", device.memory / unit),
        )  # fmt: skip
    if figures:
        yield heading("Memory over the step")
        yield _names(shown)
        yield chart("course/{row}", figures, "memory over the step by kind")


def modules(shown: dict[str, Estimate]) -> Iterator[Block]:
    """Where memory, time and messages are, by module."""
    figures, advice = {}, {}
    for row, e in shown.items():
        tree = e.tree()
        advice[row] = "\n".join(tree.advice())
        for measure in MEASURES:
            for kind in ("icicle", "treemap"):
                figure = _drawn(tree, measure, kind)
                if figure is not None:
                    figures[f"tree/{row}/{measure}/{kind}"] = figure
    if figures:
        yield heading("Modules")
        yield _names(shown)
        yield choice("measure", MEASURES, "size")
        yield choice("kind", {"icicle": "icicle", "treemap": "treemap"}, "as")
        yield chart("tree/{row}/{measure}/{kind}", figures, "the modules by share")
        yield heading("What would help", 3)
        yield answer("advice/{row}", {f"advice/{row}": a for row, a in advice.items()})


def messages(shown: dict[str, Estimate]) -> Iterator[Block]:
    """What is sent, by op."""
    figures, tables = {}, {}
    for row, e in shown.items():
        if not e.sent:
            continue
        by_op = _grouped(e, lambda s: (_whose(s), s.collective))
        ops = sorted({op for op, _ in by_op}, key=lambda o: -sum(
            v[2] for (op, _), v in by_op.items() if op == o))[:20]  # fmt: skip
        ways = sorted({way for _, way in by_op})
        figures[f"sent/{row}"] = charts.stacked(
            ops,
            {w: [by_op.get((op, w), [0, 0, 0])[2] / 1e6 for op in ops] for w in ways},
            "MB that a rank sends",
        )
        by_line = _grouped(e, lambda s: (_whose(s), s.collective, place(s.line)))
        tables[row] = table(
            ["op", "collective", "line", "calls", "messages", "MB"],
            [
                Row([*k, Cell(str(c), c), Cell(str(m), m), Cell(f"{b / 1e6:.4g}", b)])
                for k, (c, m, b) in sorted(by_line.items(), key=lambda i: -i[1][2])[:60]
            ],
            find=True,
        )
    if figures:
        yield heading("Messages by op")
        yield _names(shown)
        yield chart("sent/{row}", figures, "bytes sent by op")
        yield variants("{row}", tables)


def _drawn(tree: Tree, measure: str, kind: str) -> dict[str, object] | None:
    """The modules as a chart; None where nothing of the kind is taken."""

    # a part must not be larger than its whole by rounding
    of: dict[str, Callable[[Part], int]] = {
        "held": lambda p: p.held,
        "time": lambda p: round(1e9 * p.total),
        "sent": lambda p: p.sent,
    }
    totals = tree.totals(of[measure])
    if not totals[""]:
        return None
    # what is too small to be seen has a parent that is larger
    names = [p for p in tree.parts if totals[p] >= totals[""] / 1000]
    notes = []
    for name in names:
        p = tree[name]
        notes.append(
            f"{size(p.held)} at the peak<br>{number(1e3 * p.total)} ms, most of it {p.limit}<br>"
            f"{p.kernels} kernels, {p.sent / 1e6:.3g} MB sent"
        )
    return charts.icicle(
        [n or "the model" for n in names],
        [n.rpartition(".")[2] or "the model" for n in names],
        ["" if not n else n.rpartition(".")[0] or "the model" for n in names],
        [totals[n] for n in names],
        notes,
        kind,
    )


def _names(shown: dict[str, Estimate]) -> Block:
    """A line with the layout that is chosen."""
    made = "".join(
        f'<p class="about" data-when="{{row}}" data-is="{row}">{e.layout}</p>'
        for row, e in shown.items()
    )
    return Block(made)


def _grouped(
    e: Estimate, key: Callable[[Sent], tuple[str, ...]]
) -> dict[tuple[str, ...], list[int]]:
    """Calls, messages and bytes by what key says of a message."""
    found: dict[tuple[str, ...], list[int]] = {}
    for s in e.sent:
        row = found.setdefault(key(s), [0, 0, 0])
        for i, v in enumerate((1, s.messages, s.bytes)):
            row[i] += v
    return found


def _whose(s: Sent) -> str:
    op = s.op or "gradients of weights"
    return f"{op}, backward" if s.backward else op


def unit_of(most: float) -> tuple[float, str]:
    return (2**30, "GiB") if most >= 2**30 else (2**20, "MiB")


def size(nbytes: float) -> str:
    unit, name = unit_of(nbytes)
    return f"{nbytes / unit:.3g} {name}"
