"""What a page is made of: tables, charts and controls, each also as it is without scripts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any


@dataclass(frozen=True)
class Block:
    """A piece of a page. still: the same without scripts, for notebooks; figures: charts, by key.

    texts: what it says, by key; start: its variables and what they are first.
    """

    html: str
    still: str = ""
    figures: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    start: dict[str, str] = field(default_factory=dict)
    title: bool = False


@dataclass(frozen=True)
class Cell:
    """value: what it is sorted by, default its text; share: length of the bar behind it, 0 to 1;
    mark: "good", "bad" or none."""

    text: str
    value: float | str | None = None
    share: float | None = None
    mark: str = ""


@dataclass(frozen=True)
class Row:
    """key: the value of the table's variable when the row is chosen; tags: for checkboxes."""

    cells: Sequence[Cell | str]
    key: str = ""
    tags: Sequence[str] = ()


def number(x: float) -> str:
    """Three digits, or all before the point."""
    return f"{x:.3g}" if abs(x) < 999.5 else f"{x:,.0f}"


def place(line: str) -> str:
    """The last two names of "path:line"."""
    return "/".join(line.split("/")[-2:]) or "?"


def heading(text: str, level: int = 2) -> Block:
    """A title."""
    made = f"<h{level}>{escape(text)}</h{level}>"
    return Block(made, f"<p><b>{escape(text)}</b></p>", title=True)


def text(words: str, kind: str = "") -> Block:
    """A paragraph, lines of which stay lines. kind: a class of the style sheet; a "note" is for
    pages with scripts."""
    inner = "<br>".join(escape(words).split("\n"))
    return Block(f'<p class="{kind}">{inner}</p>', "" if kind == "note" else f"<p>{inner}</p>")


def items(title: str, lines: Iterable[str]) -> Block:
    """A list under a line; nothing where it is empty."""
    rows = "".join(f"<li>{escape(line)}</li>" for line in lines)
    made = f"<p>{escape(title)}</p><ul>{rows}</ul>" if rows else ""
    return Block(made, made)


def table(
    columns: Sequence[str],
    rows: Sequence[Row],
    *,
    variable: str = "",
    only: Mapping[str, str] | None = None,
    find: bool = False,
    notes: Mapping[str, str] | None = None,
    most: int = 12,
) -> Block:
    """A table whose columns sort it. variable: chosen by a click on a row; find: a field to filter
    rows by; only: checkboxes, by the tag of the rows that stay; notes: what a column means; most:
    rows without scripts."""
    head = "".join(
        f'<th scope="col" title="{escape((notes or {}).get(c, ""))}">'
        f'<button type="button">{escape(c)}</button></th>'
        for c in columns
    )
    body = "".join(_row(r, bool(variable)) for r in rows)
    controls = "".join(
        f'<label><input type="checkbox" data-only="{escape(tag)}"> {escape(label)}</label>'
        for tag, label in (only or {}).items()
    )
    if find:
        controls += '<input type="search" placeholder="filter" aria-label="filter rows">'
    controls = f'<div class="controls">{controls}</div>' if controls else ""
    chosen = f' data-variable="{escape(variable)}"' if variable else ""
    made = (
        f'<div class="table">{controls}<div class="scroll"><table{chosen}>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></div>"
    )
    plain = "".join(f"<th>{escape(c)}</th>" for c in columns)
    still = "".join(_row(r, False) for r in rows[:most])
    left = f"<p>{len(rows) - most} more rows</p>" if len(rows) > most else ""
    start = {variable: rows[0].key} if variable and rows else {}
    made_still = f'<table style="white-space: nowrap"><tr>{plain}</tr>{still}</table>{left}'
    return Block(made, made_still if rows else "", start=start)


def _row(row: Row, chosen: bool) -> str:
    cells = [c if isinstance(c, Cell) else Cell(c) for c in row.cells]
    extra = f' data-key="{escape(row.key)}" tabindex="0"' if chosen else ""
    tags = f' data-tags="{escape(" ".join(row.tags))}"' if row.tags else ""
    return f"<tr{extra}{tags}>{''.join(map(_cell, cells))}</tr>"


def _cell(cell: Cell) -> str:
    number = isinstance(cell.value, int | float)
    value = "" if cell.value is None else f' data-v="{escape(str(cell.value))}"'
    kind = " ".join(filter(None, ["number" if number else "", cell.mark]))
    named = f' class="{kind}"' if kind else ""
    bar = "" if cell.share is None else f' style="--share:{max(0.0, min(1.0, cell.share)):.1%}"'
    return f"<td{named}{value}{bar}>{escape(cell.text)}</td>"


def chart(key: str, figures: Mapping[str, Any], label: str, still: str = "") -> Block:
    """The figure under a key, whose {variables} are replaced by what is chosen. label: for readers
    that see no pictures."""
    made = (
        f'<div class="chart" role="img" aria-label="{escape(label)}" '
        f'data-figure="{escape(key)}"></div>'
    )
    return Block(made, still, dict(figures))


def choice(variable: str, options: Mapping[str, str], label: str) -> Block:
    """Buttons of which one is chosen. options: label by value."""
    name = escape(variable)
    made = "".join(
        f'<label><input type="radio" name="{name}" value="{escape(value)}"'
        f"{'' if i else ' checked'}> {escape(shown)}</label>"
        for i, (value, shown) in enumerate(options.items())
    )
    return Block(
        f'<fieldset class="controls"><legend>{escape(label)}</legend>{made}</fieldset>',
        start={variable: next(iter(options))},
    )


def slider(variable: str, options: Sequence[str], start: int, label: str) -> Block:
    """A slider over options, which are shown. Its variable is the number of the option."""
    name, last = escape(variable), len(options) - 1
    made = (
        f'<label class="slider">{escape(label)} <output>{escape(options[start])}</output>'
        f'<input type="range" name="{name}" min="0" max="{last}" value="{start}" '
        f'data-options="{escape(chr(10).join(options))}"></label>'
    )
    return Block(made, start={variable: str(start)})


def answer(key: str, texts: Mapping[str, str]) -> Block:
    """The text under a key, as of `chart`; read out when it changes."""
    first = "<br>".join(escape(next(iter(texts.values()), "")).split("\n"))
    made = f'<p class="answer" aria-live="polite" data-text="{escape(key)}"></p>'
    return Block(made, f"<p>{first}</p>", texts=dict(texts))


def variants(key: str, blocks: Mapping[str, Block]) -> Block:
    """Of some blocks the one whose key is chosen."""
    made = "".join(
        f'<div data-when="{escape(key)}" data-is="{escape(k)}">{b.html}</div>'
        for k, b in blocks.items()
    )
    first = next(iter(blocks.values()), Block(""))
    return Block(made, first.still, {k: f for b in blocks.values() for k, f in b.figures.items()})
