"""Charts as plain values that plotly draws; colours of text and grid are the page's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log10
from typing import Any

# told apart with any colour vision (Okabe and Ito), on white and on black
COLOURS = (
    "#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#0072b2", "#b8a900", "#8c8c8c",
)  # fmt: skip
BAD = "#d55e00"


def colour(i: int) -> str:
    """Of the i-th of some things."""
    return COLOURS[i % len(COLOURS)]


def stacked(
    names: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    title: str,
    limit: tuple[str, float] | None = None,
    colours: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Bars, each of parts. limit: a line across, with its name."""
    data = [
        {
            "type": "bar", "orientation": "h", "name": part, "x": list(values), "y": _apart(names),
            "marker": {"color": (colours or {}).get(part, colour(i))},
            "hovertemplate": "%{y}<br>" + part + ": %{x:.4g}<extra></extra>",
        }
        for i, (part, values) in enumerate(parts.items()) if any(values)
    ]  # fmt: skip
    layout = _layout(title, height=110 + 34 * len(names))
    layout |= {"barmode": "stack", "bargap": 0.35}
    layout["yaxis"] = {
        "autorange": "reversed", "automargin": True, "ticksuffix": " ", "tickmode": "array",
        "tickvals": _apart(names), "ticktext": list(names), "type": "category",
    }  # fmt: skip
    most = max((sum(v[i] for v in parts.values()) for i in range(len(names))), default=0.0)
    if limit is not None and limit[1] < 4 * most:
        _line(layout, limit, upright=True)
    return {"data": data, "layout": layout}


def course(
    at: Sequence[float],
    held: Mapping[str, Sequence[float]],
    x: str,
    y: str,
    colours: Mapping[str, str] | None = None,
    phases: Sequence[tuple[str, float]] = (),
    limit: tuple[str, float] | None = None,
) -> dict[str, Any]:
    """Steps over time, one on another. phases: (name, where it begins)."""
    data = [
        {
            "type": "scatter", "mode": "lines", "name": kind, "x": list(at), "y": list(values),
            "line": {"shape": "hv", "width": 1, "color": (colours or {}).get(kind, colour(i))},
            "hovertemplate": kind + ": %{y:.4g}<extra></extra>", "stackgroup": "all",
        }
        for i, (kind, values) in enumerate(held.items())
    ]  # fmt: skip
    layout = _layout(x, height=380)
    layout["yaxis"] = {"title": {"text": y}, "rangemode": "tozero", "automargin": True}
    layout["hovermode"] = "x unified"
    most = max(map(sum, zip(*held.values(), strict=True)), default=0.0) if held else 0.0
    if limit is not None and limit[1] < 2 * most:
        _line(layout, limit, upright=False)
    for name, begin in phases:
        layout["shapes"].append(_shape("x", begin, "dot"))
        layout["annotations"].append(
            {"x": begin, "y": 1, "yref": "paper", "text": name, "showarrow": False,
             "xanchor": "left", "yanchor": "bottom"}
        )  # fmt: skip
    return {"data": data, "layout": layout}


def icicle(
    ids: Sequence[str],
    labels: Sequence[str],
    parents: Sequence[str],
    values: Sequence[float],
    notes: Sequence[str],
    kind: str = "icicle",
) -> dict[str, Any]:
    """A tree whose parts are as large as their values. kind: or "treemap"."""
    tree: dict[str, Any] = {
        "type": kind, "ids": list(ids), "labels": list(labels), "parents": list(parents),
        "values": list(values), "text": list(notes), "branchvalues": "total", "sort": False,
        "textinfo": "label+percent root", "hovertemplate": "%{id}<br>%{text}<extra></extra>",
        "tiling": {"orientation": "v"} if kind == "icicle" else {"pad": 2},
        "root": {"color": "rgba(128,128,128,0.2)"}, "maxdepth": 5,
    }  # fmt: skip
    if kind == "icicle":
        tree["leaf"] = {"opacity": 1}
    layout = _layout("", height=460)
    layout["margin"] = {"l": 4, "r": 4, "t": 8, "b": 4}
    layout["colorway"] = list(COLOURS)
    layout[f"{kind}colorway"] = list(COLOURS)
    return {"data": [tree], "layout": layout}


def lanes(
    lanes: Sequence[str],
    blocks: Mapping[str, Sequence[tuple[int, float, float, str]]],
    title: str,
    colours: Mapping[str, str],
) -> dict[str, Any]:
    """What is when in each lane. blocks: (number of the lane, begin, length, what) by kind."""
    data = [
        {
            "type": "bar", "orientation": "h", "name": kind, "y": [lanes[b[0]] for b in found],
            "base": [b[1] for b in found], "x": [b[2] for b in found],
            "text": [b[3] for b in found], "textposition": "none",
            "marker": {"color": colours[kind], "line": {"width": 0}},
            "hovertemplate": "%{text}<extra></extra>",
        }
        for kind, found in blocks.items() if found
    ]  # fmt: skip
    layout = _layout(title, height=110 + 30 * len(lanes))
    layout |= {"barmode": "overlay", "bargap": 0.25}
    layout["yaxis"] = {
        "autorange": "reversed", "automargin": True, "categoryorder": "array",
        "categoryarray": list(lanes), "type": "category", "ticksuffix": " ",
    }  # fmt: skip
    return {"data": data, "layout": layout}


def matrix(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    unit: str,
    titles: tuple[str, str],
) -> dict[str, Any]:
    """Numbers of pairs, as colours. titles: of rows and of columns."""
    data = {
        "type": "heatmap", "z": [list(r) for r in values], "x": list(columns), "y": list(rows),
        "colorscale": [[0, "rgba(86,180,233,0.1)"], [1, "#0072b2"]], "xgap": 2, "ygap": 2,
        "texttemplate": "%{z:.3g}", "colorbar": {"title": {"text": unit}, "thickness": 12},
        "hovertemplate": titles[0] + " %{y}, " + titles[1] + " %{x}: %{z:.4g} " + unit
        + "<extra></extra>",
    }  # fmt: skip
    layout = _layout(titles[1], height=150 + 44 * len(rows))
    layout["xaxis"] |= {"type": "category", "showgrid": False}
    layout["yaxis"] = {"autorange": "reversed", "automargin": True, "type": "category",
                       "showgrid": False, "title": {"text": titles[0]}}  # fmt: skip
    return {"data": [data], "layout": layout}


def curve(
    computed: Sequence[tuple[float, float]],
    between: Sequence[tuple[float, float]],
    x: str,
    y: str,
    ticks: Mapping[float, str],
    limit: tuple[str, float],
    places: Sequence[float] = (),
    variable: str = "",
) -> dict[str, Any]:
    """A curve that is known at some points and drawn between them. places: where a line across
    stands for each value of a variable."""
    data = [
        {"type": "scatter", "mode": "lines", "name": "interpolated", "x": [p[0] for p in between],
         "y": [p[1] for p in between], "line": {"dash": "dot", "color": COLOURS[0]},
         "hovertemplate": "interpolated: %{y:.4g}<extra></extra>"},
        {"type": "scatter", "mode": "markers", "name": "computed", "x": [p[0] for p in computed],
         "y": [p[1] for p in computed], "marker": {"size": 10, "color": COLOURS[5]},
         "hovertemplate": "computed: %{y:.4g}<extra></extra>"},
    ]  # fmt: skip
    layout = _layout(x, height=340)
    layout["xaxis"] |= {"type": "log", "tickmode": "array", "tickvals": list(ticks),
                        "ticktext": list(ticks.values())}  # fmt: skip
    layout["yaxis"] = {"title": {"text": y}, "type": "log", "dtick": "D2", "automargin": True}
    _line(layout, limit, upright=False)
    if places:
        layout["shapes"].insert(0, _shape("x", places[0], "solid"))
        layout["meta"] = {"variable": variable, "places": list(places)}
    return {"data": data, "layout": layout}


def points(
    names: Sequence[str], values: Sequence[float], title: str, limit: tuple[str, float] | None
) -> dict[str, Any]:
    """Positive numbers of things, on a logarithmic axis."""
    over = [limit is not None and v > limit[1] for v in values]
    data = {
        "type": "scatter", "mode": "markers", "x": list(values), "y": _apart(names),
        "marker": {"size": 11, "color": [BAD if o else COLOURS[5] for o in over]},
        "hovertemplate": "%{y}: %{x:.2e}<extra></extra>", "showlegend": False,
    }  # fmt: skip
    layout = _layout(title, height=110 + 26 * len(names))
    layout["xaxis"] |= {"type": "log", "exponentformat": "power", "nticks": 8}
    layout["yaxis"] = {
        "autorange": "reversed", "automargin": True, "type": "category", "ticksuffix": " ",
        "tickvals": _apart(names), "ticktext": list(names),
    }  # fmt: skip
    if limit is not None:
        _line(layout, limit, upright=True)
    return {"data": [data], "layout": layout}


def _apart(names: Sequence[str]) -> list[str]:
    """The same names, of which no two are one: plotly draws those as one bar."""
    return [f"{i + 1}. {name.replace('<br>', ' ')}" for i, name in enumerate(names)]


def _layout(x: str, height: int) -> dict[str, Any]:
    return {
        "height": height,
        "margin": {"l": 10, "r": 16, "t": 34, "b": 44},
        "xaxis": {"title": {"text": x}, "automargin": True},
        "shapes": [],
        "annotations": [],
    }


def _shape(axis: str, at: float, dash: str) -> dict[str, Any]:
    other = "y" if axis == "x" else "x"
    return {
        "type": "line", f"{axis}0": at, f"{axis}1": at, f"{other}0": 0, f"{other}1": 1,
        f"{other}ref": "paper", "line": {"dash": dash, "width": 1.5, "color": "#8c8c8c"},
    }  # fmt: skip


def _line(layout: dict[str, Any], limit: tuple[str, float], upright: bool) -> None:
    name, at = limit
    shape = _shape("x" if upright else "y", at, "dash")
    shape["line"]["color"] = BAD
    layout["shapes"].append(shape)
    if layout["xaxis" if upright else "yaxis"].get("type") == "log":
        # a note is placed by the logarithm, a line is not
        at = log10(at)
    where = {"x": at, "y": 1, "yref": "paper"} if upright else {"x": 1, "y": at, "xref": "paper"}
    layout["annotations"].append(
        {**where, "text": name, "showarrow": False, "xanchor": "center" if upright else "right",
         "yanchor": "bottom", "font": {"color": BAD}}
    )  # fmt: skip
