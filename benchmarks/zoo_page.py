"""The matrix as a page: a line for each model, a column for each tool, then what is not right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tables import commits, short
from zoo_models import REDUCED

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
COLUMNS = (
    "2",
    "uneven",
    "3",
    "trains",
    "bf16",
    "plan",
    "check",
    "compile",
    "inductor",
    "rehearse",
    "peak",
    "gathers",
)
GOOD = ("right", "planned", "rounding", "whole", "blocks")
TOOLS = {"2": "runs", "uneven": "runs", "3": "runs", "compile": "compiled"}
HEAD = """# Models that run unmodified

Third-party models, as their packages have them, with random weights and one spatial dim of the
input sharded, held against the same model on one device. Each cell is a process of its own; ranks
are simulated. Made by `make matrix` from benchmarks/zoo_rows.jsonl, which has the last row of each
cell.

- **2**, **uneven**, **3**: value within 1e-9 and every gradient within 1e-7 of one device's, in
  float64, on 2 ranks, on 2 with shards of odd and different sizes, on 3. Casts inside a model are
  made wider; *fp32*: it cannot run in float64, and is held within 1e-4 and 1e-2.
- **trains**: losses and weights of three steps of AdamW in training mode, on 2 ranks (dropout by
  `match_single_device`). *rounding*: as far off as a change in the last digit of the input leads
  on one device.
- **bf16**: under autocast no further from float64 than three times what one device under autocast
  is.
- **plan**: `st.plan` has a layout on 4 devices. **check**: what `st.check` says. **compile**:
  whole, or by blocks, with the numbers of one device (backend `aot_eager`: the graphs).
  **inductor**: the same with what Inductor makes of these graphs, C++ here, of some models.
  **rehearse**: a rank alone sends what it does among others.
- Where batch norm cannot train on one sample, **trains** and **plan** are of two.
- **peak**: at a size that users have (2048 x 2048, 256^3, 10^6 points), on 8 ranks: see
  [Memory](memory.md). 1.00 is a perfect split. **gathers**: ops without a rule, which gather
  their operands.

Not among the models: xcit, levit and tiny_vit, whose gradient on one CPU is wrong in torch 2.13
(batch norm misreads a transposed one).

What Inductor makes of diffusers.DiT is 4e-9 from eager also of the plain model on one device: its
timesteps are float32 inside.

pn.Transolver++ draws noise in eval mode, too. To be held against one device it is seeded within the
call, which no graph of the whole can be.
"""


def page(rows: Sequence[Row], models: Sequence[str]) -> str:
    """rows: the last of each cell."""
    found = {(r["model"], r["tool"]): r for r in rows if r["model"] in models}
    found |= {(name, "peak"): row for name, row in _peaks().items()}
    rows = [r for (_, tool), r in found.items() if tool != "peak"]
    table, bad = [], []
    good, tried = dict.fromkeys(COLUMNS, 0), dict.fromkeys(COLUMNS, 0)
    for name in models:
        cells = []
        for column in COLUMNS:
            row = found.get((name, TOOLS.get(column, column)), {})
            text, right, why = _cell(column, row, found.get((name, "runs"), {}))
            cells.append(text)
            tried[column] += bool(text)
            good[column] += right
            if why:
                bad.append(f"- {name}, {column}: {why}")
        if any(cells):
            table.append("| " + " | ".join([name, *cells]) + " |")
    counted = [c for c in COLUMNS if c not in ("peak", "gathers")]
    counts = ", ".join(f"{c}: {good[c]} of {tried[c]}" for c in counted if tried[c])
    compiles = [r for r in rows if r["tool"] == "compiled"]
    blocks = sum(r["result"] == "blocks" for r in compiles)
    served = sum(bool(r.get("graphs")) for r in compiles)
    lines = [
        HEAD,
        f"An empty cell was not tried. Right, planned or compiled, of those tried: {counts};",
        f"peak at most 1.10: {good['peak']} of {tried['peak']}.",
        "",
        f"By blocks alone compile {blocks} of {len(compiles)}. The graphs of {served}, once made,",
        "serve a further call: a model may fill a cache at its first one, and run that eagerly.",
        "",
        f"{_versions(rows)}; CPU. Cells by the commit whose sources ran: {commits(rows)}.",
        "",
        *(
            f"- {name} is not as published: {how} (**peak** is of the published one)."
            for name, how in REDUCED.items()
            if name in models
        ),
        "",
        "| model | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
        *table,
        "",
        *(["## What is not", "", *bad, ""] if bad else []),
    ]
    return "\n".join(lines)


def _cell(column: str, row: Row, runs: Row) -> tuple[str, bool, str]:
    """(text, whether it counts as good, why not)."""
    if column == "gathers":
        return " ".join(runs.get("gathers", ())), False, ""
    if not row:
        return "", False, ""
    if column in ("2", "uneven", "3"):
        row = {**row, **row.get(column, {"result": row["result"]})}
    result = row["result"]
    if column == "peak":
        ratio = row.get("ratio")
        return "" if ratio is None else f"{ratio:.2f}", bool(ratio) and ratio <= 1.1, ""
    if result in GOOD:
        how = [h for h in ("fp32", "rounding") if h in row.get("how", "")]
        text = {"right": "yes", "planned": "yes"}.get(result, result)
        why = short(row.get("why", ""), 300) if result == "blocks" else ""
        return " ".join([text, *how]), True, f"not whole: {why}" if why else ""
    return "no", False, short(result, 300)


def _peaks() -> dict[str, Row]:
    """What docs/memory.md says of each model: peak over share, or why there is none."""
    found: dict[str, Row] = {}
    names: list[str] = []
    for line in (ROOT / "docs/memory.md").read_text().splitlines():
        cells = [c.strip() for c in line.strip("| ").split(" | ")] if line[:1] == "|" else []
        if "peak" in cells:
            names = cells
        elif names and len(cells) > names.index("peak") and "---" not in cells[0]:
            peak = cells[names.index("peak")]
            found[cells[0]] = {"result": "", "ratio": float(peak) if peak != "-" else None}
    return found


def _versions(rows: Sequence[Row]) -> str:
    """Of all libraries with which cells were made; several of one, if they differ."""
    return ", ".join(sorted({v for r in rows for v in r["with"].split(", ")}, key=str.lower))
