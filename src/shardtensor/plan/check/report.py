"""The answer of `check`: what was found on each layout, and all of it in one line."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import isfinite

from ...page import charts
from ...page.blocks import Block, Cell, Row, chart, heading, items, table, text
from ...page.document import Page, Shown

# errors are drawn from here on
LEAST = 1e-17
# what errors of a module's activations are called
ACTIVATIONS = "activations of "


@dataclass
class Finding:
    """What was found on one layout. error: the largest relative one, of any output or gradient.

    verdict: "right", "rounding" (right to the model's own rounding), "wrong", "refused" (by an
    UnsupportedOpError), "raises" (anything else) or "parted" (ranks ran different ops).
    module, op, line, what, advice: where it is not right; gathered: ops without a rule, and their
    bytes; lines: where those are; errors: of each output, gradient and buffer, relative to its
    largest value, and where it is wrong of each module's activations.
    """

    layout: str
    verdict: str
    error: float = 0.0
    module: str = ""
    what: str = ""
    advice: str = ""
    op: str = ""
    line: str = ""
    gathered: dict[str, int] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict, repr=False)
    ok: bool = field(init=False)

    def __post_init__(self) -> None:
        self.ok = self.verdict in ("right", "rounding")

    def add(
        self, gathered: dict[str, int], lines: dict[str, str], errors: dict[str, float]
    ) -> None:
        """What a rank found, too."""
        self.gathered.update(gathered)
        self.lines.update(lines)
        for k, error in errors.items():
            self.errors[k] = max(error, self.errors.get(k, 0.0))

    @property
    def where(self) -> str:
        """module, op, line: as far as they are known."""
        at = f" in {self.op}" if self.op else ""
        return f"{self.module}{at}" + (f" at {self.line}" if self.line else "")

    def __str__(self) -> str:
        if self.ok:
            how = " to the model's own rounding" if self.verdict == "rounding" else ""
            return f"right{how} on {self.layout}: largest relative difference {self.error:.0e}"
        word = "REFUSED" if self.verdict == "refused" else "NOT right"
        text = f"{word} on {self.layout}: {self.where}: {self.what}"
        return text + (f"\n    {self.advice}" if self.advice else "")


@dataclass(repr=False)
class Report(Shown):
    """The findings of all layouts. notes: what was done to make runs comparable.

    at: the shape that was given as the user's own, and by what factor it is larger. rtol: the
    largest relative error that is right. A notebook shows it; `.html(path)` writes a page.
    """

    findings: list[Finding]
    notes: list[str]
    at: tuple[int, ...] = ()
    scale: float = 1.0
    rtol: float = 0.0

    @property
    def ok(self) -> bool:
        return all(f.ok for f in self.findings)

    @property
    def verdict(self) -> str:
        """The worst of the findings'."""
        order = ("parted", "wrong", "raises", "refused", "rounding", "right")
        return min((f.verdict for f in self.findings), key=order.index, default="right")

    @property
    def gathered(self) -> dict[str, int]:
        """The most bytes that each op without a rule gathered, at the check's size."""
        most: dict[str, int] = {}
        for f in self.findings:
            for op, nbytes in f.gathered.items():
                most[op] = max(nbytes, most.get(op, 0))
        return most

    def page(self) -> Page:
        """The answer, each layout, errors by module, what is wrong, what gathers."""
        page = Page(
            "Check: sharded against one device",
            self._answer(),
            self.ok,
            "Outputs, gradients and buffers of each layout, held against the same model on one "
            "device; the largest difference relative to the largest value"
            + (f"; up to {self.rtol:.0e} is right." if self.rtol else "."),
        )
        page.add(*self._wrong(), *self._layouts(), *self._modules())
        lines = [line.strip() for line in self._gathers()]
        if lines or self.notes:
            page.add(heading("Notes"), items("Gathers:", lines), items("Done:", self.notes))
        return page

    def _wrong(self) -> Iterator[Block]:
        """The first that is wrong, and what to do."""
        bad = {f.where: f for f in reversed(self.findings) if not f.ok}
        for f in reversed(bad.values()):
            yield heading(f"{'Refused' if f.verdict == 'refused' else 'Not right'}: {f.where}")
            yield text(f"On {f.layout}: {f.what}")
            if f.advice:
                yield text(f"What to do: {f.advice}", "verdict")

    def _layouts(self) -> Iterator[Block]:
        rows = [
            Row([
                f.layout,
                Cell(_WORDS.get(f.verdict, "not right"), mark="good" if f.ok else "bad"),
                Cell(f"{most:.1e}" if isfinite(most) else "-", most),
                f.module, f.op, f.line,
            ])
            for f in self.findings
            for most in [f.error if f.ok or not f.errors else max(f.errors.values())]
        ]  # fmt: skip
        columns = ["layout", "answer", "largest error", "module", "op", "line"]
        if self.ok:
            columns, rows = columns[:3], [Row(r.cells[:3]) for r in rows]
        yield heading("Layouts")
        yield table(columns, rows)

    def _modules(self) -> Iterator[Block]:
        """The largest errors of each module, over all layouts."""
        every: dict[str, float] = {}
        for f in self.findings:
            for k, error in f.errors.items():
                every[k] = max(error, every.get(k, 0.0))
        passed = {k: e for k, e in every.items() if k.startswith(ACTIVATIONS)}
        results = {k: e for k, e in every.items() if k not in passed}
        if passed:
            yield heading("Errors of activations")
            yield text("In the order of forward, on the layouts that are not right.", "note")
            yield self._drawn(
                "activations", {k.removeprefix(ACTIVATIONS): e for k, e in passed.items()}
            )
        if not results:
            return
        modules: dict[str, float] = {}
        for k, error in results.items():
            modules[_module(k)] = max(error, modules.get(_module(k), 0.0))
        yield heading("Errors by module")
        yield text("Of gradients of its weights, and of its buffers, over all layouts.", "note")
        yield self._drawn("errors", modules)
        rows = [
            Row([k, Cell(f"{e:.1e}" if isfinite(e) else "other shape", e if isfinite(e) else 1e99,
                         mark="bad" if self.rtol and e > self.rtol else "")])
            for k, e in sorted(results.items(), key=lambda i: -i[1])
        ]  # fmt: skip
        yield table(["result", "largest error"], rows, find=True, most=8)

    def _drawn(self, key: str, errors: dict[str, float]) -> Block:
        """The largest errors, in the order given."""
        finite = {m or "the model": max(e, LEAST) for m, e in errors.items() if isfinite(e)}
        worst = set(sorted(finite, key=finite.__getitem__, reverse=True)[:40])
        shown = {m: e for m, e in finite.items() if m in worst}
        limit = ("right up to here", self.rtol) if self.rtol else None
        figure = charts.points(list(shown), list(shown.values()), "relative error", limit)
        return chart(key, {key: figure}, "the largest error of each module")

    def __str__(self) -> str:
        return "\n".join([self._answer(), *map(str, self.findings), *self._gathers(), *self.notes])

    __repr__ = __str__

    def _answer(self) -> str:
        text = {
            "right": "RIGHT",
            "rounding": "RIGHT to the model's own rounding",
            "refused": "REFUSED",
        }.get(self.verdict, "NOT RIGHT")
        bad = [f for f in self.findings if not f.ok]
        text += f" on {len(self.findings)} layouts" if not bad else ""
        if bad:
            first = next(f for f in bad if f.verdict == self.verdict)
            text += f" on {len(bad)} of {len(self.findings)} layouts: {first.where}"
        if self.gathered:
            text += f"; it gathers: {', '.join(self.gathered)}"
        return text

    def _gathers(self) -> list[str]:
        lines = {k: v for f in self.findings for k, v in f.lines.items()}
        found = []
        for op, nbytes in self.gathered.items():
            at = f" ({lines[op]})" if lines.get(op) else ""
            text = f"    {op} has no rule: it gathers {nbytes} bytes on every rank{at}"
            if self.at:
                size = "x".join(map(str, self.at))
                text += f", about {int(nbytes * self.scale)} at {size}"
            text += (
                " (right, but memory grows with the global size; see st.rule and docs/errors.md)"
            )
            found.append(text)
        return found


_WORDS = {"right": "right", "rounding": "right to rounding", "refused": "refused"}


def _module(result: str) -> str:
    """Whose result it is: "gradient a.weight" is of a."""
    _, _, name = result.partition(" ")
    if result.startswith("output"):
        return "outputs"
    if name.startswith("of input"):
        return "inputs"
    return name.rpartition(".")[0] or "the model"
