"""The answer of `check`: what was found on each layout, and all of it in one line."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Finding:
    """What was found on one layout. error: the largest relative one, of any output or gradient.

    verdict: "right", "rounding" (right to the model's own rounding), "wrong", "refused" (by an
    UnsupportedOpError), "raises" (anything else) or "parted" (ranks ran different ops).
    module, op, line, what, advice: where it is not right; gathered: ops without a rule, and their
    bytes; lines: where those are.
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
    ok: bool = field(init=False)

    def __post_init__(self) -> None:
        self.ok = self.verdict in ("right", "rounding")

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
class Report:
    """The findings of all layouts. notes: what was done to make runs comparable.

    at: the shape that was given as the user's own, and by what factor it is larger.
    """

    findings: list[Finding]
    notes: list[str]
    at: tuple[int, ...] = ()
    scale: float = 1.0

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
