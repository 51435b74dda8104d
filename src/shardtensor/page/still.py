"""Pictures without scripts, for notebooks: bars and lanes as plain SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

LEFT, WIDTH, ROW = 250, 460, 22
# characters of a label
MOST = 38


def bars(
    names: Sequence[str],
    blocks: Mapping[str, Sequence[tuple[int, float, float]]],
    colours: Mapping[str, str],
    unit: str,
    limit: tuple[str, float] | None = None,
) -> str:
    """Blocks in rows. blocks: (number of the row, begin, length) by kind; limit: a line across."""
    used = {k: v for k, v in blocks.items() if any(b[2] for b in v)}
    end = max((b[1] + b[2] for found in used.values() for b in found), default=0.0) or 1.0
    if limit is not None and limit[1] < 4 * end:
        end = max(end, limit[1])
    else:
        limit = None
    scale, height = WIDTH / end, ROW * len(names)
    found = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 60}" '
        f'height="{height + 46}" font-family="sans-serif" font-size="11">'
    ]
    for i, kind in enumerate(used):
        x = LEFT + 105 * (i % 4)
        y = 4 + 13 * (i // 4)
        found.append(
            f'<rect x="{x}" y="{y}" width="9" height="9" fill="{colours[kind]}"/>'
            f'<text x="{x + 13}" y="{y + 9}" fill="currentColor">{escape(kind)}</text>'
        )
    top = 8 + 13 * -(-len(used) // 4)
    for i, name in enumerate(names):
        shown = name if len(name) <= MOST else name[: MOST - 1] + "…"
        found.append(
            f'<text x="{LEFT - 6}" y="{top + ROW * i + 15}" text-anchor="end" '
            f'fill="currentColor">{escape(shown)}</text>'
        )
    for kind, parts in used.items():
        for i, begin, length in parts:
            if length * scale > 0.05:
                found.append(
                    f'<rect x="{LEFT + begin * scale:.1f}" y="{top + ROW * i + 4}" '
                    f'width="{length * scale:.2f}" height="{ROW - 7}" fill="{colours[kind]}"/>'
                )
    if limit is not None:
        across = LEFT + limit[1] * scale
        found.append(
            f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{top}" y2="{top + height}" '
            f'stroke="#d55e00" stroke-dasharray="4 3"><title>{escape(limit[0])}</title></line>'
        )
    ends = ((LEFT, "start", f"0 {unit}"), (LEFT + WIDTH, "end", f"{end:.3g} {unit}"))
    found += [
        f'<text x="{x}" y="{top + height + 12}" text-anchor="{side}" fill="currentColor">'
        f"{escape(label)}</text>"
        for x, side, label in ends
    ]
    return "".join([*found, "</svg>"])


def stacked(parts: Mapping[str, Sequence[float]]) -> dict[str, list[tuple[int, float, float]]]:
    """Blocks of `bars` that stand one after another in each row."""
    at: dict[int, float] = {}
    found: dict[str, list[tuple[int, float, float]]] = {}
    for kind, values in parts.items():
        for i, v in enumerate(values):
            found.setdefault(kind, []).append((i, at.get(i, 0.0), v))
            at[i] = at.get(i, 0.0) + v
    return found
