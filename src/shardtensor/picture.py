"""A picture of how a tensor is cut, for notebooks: plain SVG from plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP = 260, 150, 46, 22
# of ranks, in turn
COLOURS = ("#8ecae6", "#ffb703", "#95d5b2", "#f4a6b7", "#cdb4db", "#e9c46a", "#a8dadc", "#d9d9d9")
# pixels below which a label does not fit
SMALL = 13


def cut(
    rows: Sequence[int],
    columns: Sequence[int],
    held: dict[tuple[int, int], list[int]],
    own: tuple[int, int] | None,
    titles: tuple[str, str],
) -> str:
    """The SVG of a rectangle cut into rows and columns, each block with the ranks that hold it.

    own: the block with a thick border. titles: of the two dims.
    """
    found = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 8}" '
        f'height="{TOP + HEIGHT + 8}" font-family="sans-serif" font-size="11">',
        f'<text x="{LEFT}" y="13" fill="currentColor">{escape(titles[1])}</text>',
        f'<text x="12" y="{TOP + HEIGHT}" fill="currentColor" '
        f'transform="rotate(-90 12 {TOP + HEIGHT})">{escape(titles[0])}</text>',
    ]
    last: list[str] = []
    for i, (y, h) in enumerate(_spans(rows, HEIGHT)):
        if h >= SMALL and len(rows) > 1:
            found.append(
                f'<text x="{LEFT - 4}" y="{TOP + y + h / 2 + 4:.1f}" text-anchor="end" '
                f'fill="currentColor">{rows[i]}</text>'
            )
        for j, (x, w) in enumerate(_spans(columns, WIDTH)):
            ranks = held.get((i, j), [])
            mine = (i, j) == own
            box = (
                f'<rect x="{LEFT + x:.1f}" y="{TOP + y:.1f}" width="{w:.1f}" height="{h:.1f}" '
                f'fill="{COLOURS[(ranks or [0])[0] % len(COLOURS)]}" stroke="#222" '
                f'stroke-width="{2.5 if mine else 0.8}"/>'
            )
            (last if mine else found).append(box)
            label = f"rank {', '.join(map(str, ranks[:3]))}{', ...' if len(ranks) > 3 else ''}"
            if h >= SMALL and w >= 6 * len(label):
                last.append(
                    f'<text x="{LEFT + x + w / 2:.1f}" y="{TOP + y + h / 2 + 4:.1f}" '
                    f'text-anchor="middle" fill="#222">{label}</text>'
                )
    return "".join([*found, *last, "</svg>"])


def _spans(sizes: Sequence[int], length: int) -> list[tuple[float, float]]:
    """(begin, length) in pixels of each part."""
    total, at, found = max(1, sum(sizes)), 0, []
    for n in sizes:
        found.append((at * length / total, n * length / total))
        at += n
    return found
