"""Every third-party model of the zoo with every tool: what works, as a table.

    python benchmarks/matrix.py [NAME ...] [--tools runs check ...] [--limit 150] [--again]
    python benchmarks/matrix.py --drawn 25 --seed 1 --rows out/drawn.jsonl
    python benchmarks/matrix.py --docs docs/zoo.md

Needs the extra `zoo`. Each cell is a process of its own, a fork of one that has the libraries
loaded, which is ended after --limit seconds of the processor; its row is appended to --rows, a file
of JSON lines, by default that of the project. What has a row of this commit there is skipped, so
that a run can be taken up again; --any: a row of any commit. Models whose cells took least time
before come first.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from apart import apart
from tables import add, lines, short, sources
from zoo_cells import CELLS, SETTINGS, timed
from zoo_drawn import enter
from zoo_models import MODELS, declare_torchvision_ops
from zoo_page import page

Row = dict[str, Any]
ROWS = Path(__file__).with_name("zoo_rows.jsonl")
# by how names of models begin: the package, and what to import of it
LIBRARIES = {
    "tv": ("torchvision", "torchvision"), "timm": ("timm", "timm"),
    "diffusers": ("diffusers", "diffusers"), "hf": ("transformers", "transformers"),
    "monai": ("monai", "monai.networks.nets"), "vit_pytorch": ("vit-pytorch", "vit_pytorch"),
    "smp": ("segmentation-models-pytorch", "segmentation_models_pytorch"),
    "neuralop": ("neuraloperator", "neuralop"), "pn": ("nvidia-physicsnemo", "physicsnemo"),
}  # fmt: skip
KEPT = ("model", "tool", "version", "with", "result", "how", "graphs", "gathers", "seconds")
# what takes long to import, once for all cells
SLOW = [
    "timm.models", "torchvision.models", *(f"physicsnemo.models.{m}" for m in (
        "afno", "diffusion_unets", "dit", "dpot", "fengwu", "flare", "fno", "geotransolver",
        "pangu", "pix2pix", "srrn", "transolver", "unet")),
]  # fmt: skip


def versions(name: str) -> str:
    """Of torch, the model's library and Python."""
    names = ["torch", LIBRARIES[name.removeprefix("drawn.").split(".")[0]][0]]
    found = [f"{n} {importlib.metadata.version(n)}" for n in names]
    return ", ".join([*found, f"Python {platform.python_version()}"])


def known(path: Path) -> dict[tuple[str, str], Row]:
    """The last row of each cell."""
    return {(r["model"], r["tool"]): r for r in lines(path)}


def kept(row: Row) -> Row:
    """What the page says of a cell; of settings, those with another result than the cell has."""
    found = {k: row[k] for k in KEPT if row.get(k)}
    found |= {k: short(row[k], 300) for k in ("result", "why") if row.get(k)}
    others = {k: short(row[k]["result"], 300) for k in SETTINGS if k in row}
    return found | {k: {"result": r} for k, r in others.items() if r != found["result"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[])
    # Inductor takes minutes for a model
    usual = [t for t in CELLS if t != "inductor"]
    parser.add_argument("--tools", nargs="*", default=usual, choices=list(CELLS))
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--limit", type=float, default=150.0, help="seconds for one cell")
    parser.add_argument("--again", action="store_true", help="also what has a row")
    parser.add_argument("--any", action="store_true", help="skip what has a row of any commit")
    parser.add_argument("--drawn", type=int, default=0, help="so many models that the zoo has not")
    parser.add_argument("--seed", type=int, default=0, help="of --drawn")
    parser.add_argument("--docs", type=Path, help="write the table of --rows here, drop old rows")
    options = parser.parse_args()
    done, at = known(options.rows), sources()
    if options.docs:
        done = {k: done[k] for k in sorted(done) if k[0] in MODELS and k[1] in CELLS}
        options.rows.unlink()
        for row in done.values():
            add(options.rows, kept(row))
        options.docs.write_text(page(list(done.values()), list(MODELS)))
        return
    warnings.simplefilter("ignore")
    declare_torchvision_ops()
    for module in (*(module for _, module in LIBRARIES.values()), *SLOW):
        importlib.import_module(module)
    torch.set_num_threads(1)
    models = enter(options.drawn, options.seed) if options.drawn else MODELS
    picked = [n for n in models if not options.names or any(n.startswith(p) for p in options.names)]
    took = {
        n: [r["seconds"] for (m, _), r in done.items() if m == n and "seconds" in r] for n in picked
    }
    picked.sort(key=lambda n: min(took[n], default=1e9))
    # `runs` says how a model is judged
    first = [("runs", n) for n in picked if "runs" in options.tools]
    for tool, name in [*first, *((t, n) for n in picked for t in options.tools if t != "runs")]:
        old = done.get((name, tool))
        if old and not options.again and (options.any or old["version"] == at):
            continue
        begin = time.perf_counter()
        row = {"model": name, "tool": tool, "version": at, "with": versions(name)}
        how = None if tool == "runs" else done.get((name, "runs"), {}).get("how")
        row |= apart(partial(timed, tool, name, how), options.limit)
        done[name, tool] = row
        add(options.rows, row)
        wall = time.perf_counter() - begin
        print(f"{tool:9} {name:36} {wall:6.1f} s  {row['result'][:150]}", flush=True)


if __name__ == "__main__":
    main()
