"""The page of a result: one file of HTML that needs no network; without scripts for notebooks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from .blocks import Block

HERE = Path(__file__).parent
# whatever is in the page, it loads nothing from anywhere
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)


class Page:
    """Blocks under a title. verdict: a line that says all; good: whether that is well or bad."""

    about: str
    good: bool | None
    title: str
    verdict: str

    def __init__(self, title: str, verdict: str, good: bool | None = None, about: str = "") -> None:
        self.title, self.verdict, self.good, self.about = title, verdict, good, about
        self.blocks: list[Block] = []

    def add(self, *blocks: Block) -> None:
        self.blocks += blocks

    def text(self) -> str:
        """The HTML. Raises ImportError unless plotly is there, whose script is a part of it."""
        figures: dict[str, Any] = {}
        texts: dict[str, str] = {}
        start: dict[str, str] = {}
        for block in self.blocks:
            figures |= block.figures
            texts |= block.texts
            start |= block.start
        kind = "" if self.good is None else " good" if self.good else " bad"
        data = json.dumps({"figures": figures, "texts": texts, "start": start}, allow_nan=False)
        return _of_cells(
            [
                '<!doctype html><html lang="en"><head><meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f"<title>{escape(self.title)}</title>",
                f"<style>{(HERE / 'page.css').read_text()}</style></head><body><main>",
                f"<h1>{escape(self.title)}</h1>",
                f'<p class="about">{escape(self.about)}</p>' if self.about else "",
                f'<p class="verdict{kind}">{escape(self.verdict)}</p>',
                *(b.html for b in self.blocks),
                "</main>",
                # a "<" in a name must not end the script
                f'<script type="application/json" id="data">{data.replace("<", chr(92) + "u003c")}'
                "</script>",
                f"<script>{_plotly()}</script>" if figures else "",
                f"<script>{(HERE / 'page.js').read_text()}</script></body></html>",
            ]
        )

    def still(self) -> str:
        """The same without scripts: tables, and charts as pictures."""
        shown = [b for b in self.blocks if b.still]
        # a title with nothing under it says nothing
        kept = [
            b.still
            for b, after in zip(shown, [*shown[1:], None], strict=True)
            if not b.title or (after is not None and not after.title)
        ]
        lines = (f"<p>{escape(line)}</p>" for line in (self.verdict, self.about) if line)
        head = f"<p><b>{escape(self.title)}</b></p>{''.join(lines)}"
        return _of_cells(['<div style="overflow-x: auto">', head, *kept, "</div>"])


class Shown:
    """A result that has a page: a file of its own, or a cell of a notebook."""

    def page(self) -> Page:
        """What it shows."""
        raise NotImplementedError

    def to_html(self) -> str:
        """The page as text: one file, which needs no network. Raises ImportError without plotly."""
        return self.page().text()

    def html(self, path: str | Path) -> None:
        """Write the page there."""
        Path(path).write_text(self.to_html(), encoding="utf-8")

    def _repr_html_(self) -> str:
        return self.page().still()


def _of_cells(parts: Iterable[str]) -> str:
    """Joined; a line of a notebook is told by its cell, which is no file that one can open."""
    return re.sub(r"[\w./-]*ipykernel_\d+/\d+\.py:(\d+)", r"line \1 of a cell", "".join(parts))


def _plotly() -> str:
    """plotly's script."""
    try:
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
    except ImportError as e:
        raise ImportError(f"{e}: a page needs plotly: pip install shardtensor[html]") from e
    return str(get_plotlyjs())
