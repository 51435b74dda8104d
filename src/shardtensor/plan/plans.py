"""The configurations that `plan` found, and the page that shows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from pathlib import Path

from ..observe.network import Network
from ..page import charts, still
from ..page.blocks import (
    Block,
    Cell,
    Row,
    answer,
    chart,
    heading,
    items,
    number,
    slider,
    table,
    text,
)
from ..page.document import Page, Shown
from .details import COLOURS, course, messages, modules, size, unit_of
from .device import CPU
from .estimate import Device, Estimate, Layout, Task, estimate
from .parts import InParts, in_parts
from .sweep import Sweep, sweep

# configurations whose details the page has
MOST = 24
# rows of pictures
SHOWN = 12


class Plans(list[Estimate], Shown):
    """The configurations, the best first; a list, which is a table where it is shown.

    task, devices, device, network: what was asked; missing: meshes that were not tried, and why.
    """

    device: Device
    devices: int
    missing: list[str]
    network: Network
    task: Task

    def __init__(
        self,
        found: Iterable[Estimate],
        task: Task,
        devices: int,
        device: Device,
        network: Network,
        missing: Sequence[str] = (),
    ) -> None:
        super().__init__(found)
        self.task, self.devices, self.device, self.network = task, devices, device, network
        # what one of them has
        self.part: Device = device.among(devices)
        self.missing = list(missing)

    def __str__(self) -> str:
        runs = [e for e in self if not e.refused]
        unit, name = unit_of(max((e.peak for e in runs), default=0))
        kinds = [k for k in COLOURS if any(e.memory.get(k, 0) > e.peak / 500 for e in runs)]
        rows = [["configuration", "fits", "peak", *kinds, "MB sent", "step ms"]]
        for e in runs[:SHOWN]:
            held = (f"{n / unit:.2f}" for n in (e.peak, *(e.memory[k] for k in kinds)))
            fits = "yes" if e.fits(self.device) else "no"
            sent = f"{_sent(e) / 1e6:.2f}"
            rows.append([str(e.layout), fits, *held, sent, number(1e3 * e.seconds)])
        memory = size(self.part.memory)
        lines = [f"{self.devices} x {self.part.name} of {memory}: {name} of a rank at its peak"]
        wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for first, *others in rows if runs else []:
            cells = [c.rjust(w) for c, w in zip(others, wide[1:], strict=True)]
            lines.append("  ".join([first.ljust(wide[0]), *cells]))
        if len(runs) > SHOWN:
            lines.append(f"and {len(runs) - SHOWN} more")
        lines += (f"refused, {e.layout}: {e.refused}" for e in self if e.refused)
        lines += (f"not tried, {told}" for told in self.missing)
        return "\n".join(lines)

    # a list's would show all that each of them sends
    __repr__ = __str__

    def to_html(
        self,
        factors: Sequence[float] = (0.5, 1, 2),
        devices: Sequence[int] = (),
    ) -> str:
        """The page as text; see `html`."""
        page = self.page()
        if runs := [e for e in self if not e.refused]:
            dims = tuple(self.task.dims)
            one = estimate(self.task, Layout(1, dims, (1,) * len(dims)), self.device, self.network)
            told = f"On one device: {self._said(one)}."
            if not one.fits(self.device) and self.device.name == CPU:
                told += f" Or {self.in_parts()}."
            page.blocks.insert(0, text(told))
            swept = sweep(self.task, runs[0], self.device, self.network, factors, devices)
            page.add(*self._sizes(swept))
        return page.text()

    def html(
        self,
        path: str | Path,
        factors: Sequence[float] = (0.5, 1, 2),
        devices: Sequence[int] = (),
    ) -> None:
        """Write a page of all configurations: one file, which needs no network, only plotly here.

        Layouts to sort and filter; of each that is chosen memory over the step, modules, messages;
        then how the best one does on other numbers of devices (default: half, as many, twice, four
        times as many) and at other sizes (factors of the dims that may be cut), which takes an
        estimate for each pair.
        """
        Path(path).write_text(self.to_html(factors, devices), encoding="utf-8")

    def in_parts(self, memory: int = 0) -> InParts:
        """What the task takes on one device with `tiled`, in how many parts; see `parts.in_parts`.

        It runs on CPUs: of another device the answer is what it would take there.
        """
        return in_parts(self.task, self.device, self.network, memory=memory)

    def page(self) -> Page:
        """All but other sizes."""
        task, device = self.task, self.part
        fit = [e for e in self if e.fits(self.device)]
        runs = [e for e in self if not e.refused]
        if fit:
            verdict = f"It fits. The fastest: {fit[0].layout}, {self._needs(fit[0])}"
        elif runs:
            verdict = f"It does not fit. What needs least: {runs[0].layout}, {self._needs(runs[0])}"
        else:
            verdict = "Refused: no configuration can be planned." if self else (
                "There is no mesh of so many devices.")  # fmt: skip
        shapes = ", ".join("x".join(map(str, s)) for s in task.shapes)
        page = Page(
            f"Plan: {_name(task.make)} on {self.devices} x {device.name}",
            verdict,
            bool(fit),
            f"Inputs {shapes}; a step of {'training' if task.train else 'inference'}; "
            f"{device.memory / 2**30:.0f} GiB a device. Memory and messages are those of the real "
            "step of the rank that holds most; times are a model.",
        )
        if said := self.device.assumes(self.devices):
            page.add(text(f"{said}.", "note"))
        page.add(*self._layouts(runs))
        shown = {str(i): e for i, e in enumerate(runs[:MOST])}
        page.add(*course(shown, device), *modules(shown), *messages(shown))
        page.add(*self._left_out())
        return page

    def _needs(self, e: Estimate) -> str:
        return f"{size(e.peak)} of {size(self.part.memory)}, {number(1e3 * e.seconds)} ms a step."

    def _said(self, e: Estimate) -> str:
        if e.refused:
            return f"refused: {e.refused}"
        fits = "fits" if e.fits(self.device) else "does not fit"
        return f"{fits}, needs {size(e.peak)}"

    def _layouts(self, runs: list[Estimate]) -> Iterator[Block]:
        """The table and the picture of all."""
        if not runs:
            return
        unit, name = unit_of(max(e.peak for e in runs))
        kinds = [k for k in COLOURS if any(e.memory.get(k, 0) > e.peak / 500 for e in runs)]
        slowest = max(e.seconds for e in runs)
        rows = []
        for i, e in enumerate(runs):
            fits = e.fits(self.device)
            options = e.layout.options
            cells = [
                Cell(str(e.layout)),
                Cell("yes" if fits else "no", mark="good" if fits else "bad"),
                Cell(f"{e.peak / unit:.2f}", e.peak, e.peak / self.part.memory),
                *(Cell(f"{e.memory[k] / unit:.2f}", e.memory[k]) for k in kinds),
                Cell(number(1e3 * e.seconds), e.seconds, e.seconds / slowest),
                Cell(number(1e3 * e.compute), e.compute),
                Cell(number(1e3 * e.communication), e.communication),
                Cell(f"{_sent(e) / 1e6:.2f}", _sent(e)),
                Cell(str(sum(s.messages for s in e.sent)), sum(s.messages for s in e.sent)),
                Cell(", ".join(e.gathered) or "none"),
            ]
            tags = ["fits"] if fits else []
            tags += [] if options.fsdp else ["whole"]
            tags += [] if options.checkpoint else ["kept"]
            rows.append(Row(cells, str(i) if i < MOST else "0", tags))
        columns = ["layout", "fits", f"peak {name}", *(f"{k} {name}" for k in kinds), "step ms",
                   "compute ms", "wire ms", "MB sent", "messages", "gathers"]  # fmt: skip
        yield heading("Layouts")
        yield text("Choose a row; the charts below are of it. A column's name sorts.", "note")
        yield table(
            columns,
            rows,
            variable="row",
            find=True,
            only={"fits": "fits", "whole": "without FSDP2", "kept": "without checkpointing"},
            notes={"step ms": "between all communication hidden and none: the middle"},
        )
        first = runs[:SHOWN]
        names = [str(e.layout) for e in first]
        limit = (f"memory of {self.part.name}", self.part.memory / unit)
        held = {k: [e.memory[k] / unit for e in first] for k in COLOURS}
        held = {k: v for k, v in held.items() if any(v)}
        yield chart(
            "layouts",
            {
                "layouts": charts.stacked(
                    _broken(names), held, f"peak of a rank, {name}", limit, COLOURS
                )
            },
            "memory of each layout by kind",
            still.bars(names, still.stacked(held), COLOURS, name, limit),
        )
        times = {"compute": [1e3 * e.compute for e in first],
                 "wire": [1e3 * e.communication for e in first]}  # fmt: skip
        yield chart(
            "times",
            {"times": charts.stacked(_broken(names), times, "a step without overlap, ms")},
            "time of each layout",
        )

    def _left_out(self) -> Iterator[Block]:
        """What is not among the layouts, and why."""
        found = [
            items("Refused:", (f"{e.layout}: {e.refused}" for e in self if e.refused)),
            items("Not tried:", self.missing),
            items("Depends on the input:", sorted({a for e in self for a in e.assumed})),
        ]
        if any(b.html for b in found):
            yield heading("What is left out, what is assumed")
            yield from found

    def _sizes(self, s: Sweep) -> Iterator[Block]:
        """Other numbers of devices and other sizes."""
        device, sizes, counts = self.device, s.sizes(), s.counts()
        known = [s.at(n, z) for n in counts for z in sizes]
        peaks = [p.peak for p in known if p.known]
        if not peaks:
            return
        unit, name = unit_of(max(peaks))
        figures, texts = {}, {}
        for i, n in enumerate(counts):
            line = [(prod(z), s.at(n, z)) for z in sizes]
            figures[f"fit/{i}"] = charts.curve(
                [(x, p.peak / unit) for x, p in line if p.how == "computed"],
                [(x, p.peak / unit) for x, p in line if p.known],
                f"size, on {n} devices",
                f"peak of a rank, {name}",
                {prod(z): _times(z) for z in s.shapes},
                (f"memory of {device.name}", device.among(n).memory / unit),
                [prod(z) for z in sizes],
                "size",
            )
            for j, z in enumerate(sizes):
                texts[f"fit/{i}/{j}"] = self._point(s, n, z)
        yield heading("More devices, larger inputs")
        dims = ", ".join(f"dim{d}" for d in self.task.dims)
        yield text(
            f"The first layout that runs, {s.layout}, with its options, cut alike over other "
            f"numbers of devices and at other sizes of {dims}. Computed: an estimate, as in the "
            "table below. Interpolated: between two of these, linear in the number of elements and "
            "in one over the number of devices. Beyond what is computed nothing is said.",
            "note",
        )
        base = next(j for j, z in enumerate(sizes) if z == _own(self.task))
        yield slider("devices", [str(n) for n in counts], counts.index(s.layout.ranks)
                     if s.layout.ranks in counts else 0, "devices")  # fmt: skip
        yield slider("size", [_times(z) for z in sizes], base, "resolution")
        yield answer("fit/{devices}/{size}", texts)
        yield chart("fit/{devices}", figures, "peak of a rank by size")
        rows = []
        for n in s.devices:
            cells = [Cell(str(n), n), Cell(str(s.computed[n, s.shapes[0]].layout))]
            for z in s.shapes:
                e = s.computed[n, z]
                if e.refused:
                    cells.append(Cell(f"refused: {e.refused}", mark="bad"))
                else:
                    fits = e.fits(device)
                    share, mark = e.peak / device.among(n).memory, "good" if fits else "bad"
                    cells.append(Cell(f"{e.peak / unit:.2f}", e.peak, share, mark))
            rows.append(Row(cells))
        yield table(["devices", "layout", *(f"{_times(z)}: {name}" for z in s.shapes)], rows)

    def _point(self, s: Sweep, n: int, z: tuple[int, ...]) -> str:
        """The answer of the sliders."""
        p, device = s.at(n, z), self.device
        ranks = f"{n} device{'s' if n > 1 else ''}"
        if not p.known:
            return f"{ranks} at {_times(z)}: {p.how}."
        memory = device.among(n).memory
        fits = "fits" if p.peak <= memory else "does not fit"
        told = [
            f"{ranks} at {_times(z)}: {fits}, {size(p.peak)} of {size(memory)}, "
            f"{number(1e3 * p.seconds)} ms a step ({p.how})."
        ]
        last, shapes = s.last(n, device), s.shapes
        if last is None:
            told.append(f"On {ranks} no size that was computed fits.")
        elif last == shapes[-1]:
            told.append(f"On {ranks} it fits at all sizes that were computed.")
        else:
            low, high = s.bracket(last)
            told.append(
                f"On {ranks} it stops fitting above about {_times(last)}, interpolated between "
                f"{_times(low)} and {_times(high)}."
            )
        least = s.least(z, device)
        if least is None:
            told.append(f"{_times(z)} fits no number of devices up to {s.devices[-1]}.")
        else:
            how = s.at(least, z).how
            sure = s.least(z, device, s.devices)
            if how == "interpolated" and sure != least:
                how += f"; of those computed, {sure}"
            more = " or fewer" if least == s.devices[0] > 1 else ""
            told.append(
                f"{_times(z)} needs {least} device{'s' if least > 1 else ''}{more} ({how})."
            )
        return "\n".join(told)


def _own(task: Task) -> tuple[int, ...]:
    return tuple(task.shapes[0][d] for d in task.dims)


def _name(make: object) -> str:
    name = getattr(make, "__name__", type(make).__name__)
    return "a model" if name in ("<lambda>", "make") else name


def _broken(names: Sequence[str]) -> list[str]:
    """Long names on two lines."""
    return [n.replace(", ", "<br>", 1) for n in names]


def _times(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def _sent(e: Estimate) -> int:
    return sum(s.bytes for s in e.sent)
