"""Every third-party model of the zoo with every tool: what works, as a table.

    python benchmarks/matrix.py [NAME ...] [--tools runs check ...] [--limit 150] [--again]
    python benchmarks/matrix.py --docs docs/zoo.md

Needs the extra `zoo`. Each cell is a process of its own, a fork of one that has the libraries
loaded, which is ended after --limit seconds of the processor; its row is appended to --rows, a file
of JSON lines. What has a row of this commit there is skipped, so that a run can be taken up again;
--any: a row of any commit. Models whose cells took least time before come first.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import platform
import subprocess
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from apart import apart
from tables import add, lines
from zoo_cells import CELLS, timed
from zoo_models import MODELS, declare_torchvision_ops
from zoo_page import page

Row = dict[str, Any]
ROWS = Path("out/zoo.jsonl")
LIBRARIES = {
    "torchvision": "torchvision", "timm": "timm", "diffusers": "diffusers",
    "transformers": "transformers", "monai": "monai.networks.nets", "vit-pytorch": "vit_pytorch",
    "segmentation-models-pytorch": "segmentation_models_pytorch", "neuraloperator": "neuralop",
    "nvidia-physicsnemo": "physicsnemo",
}  # fmt: skip
# what takes long to import, once for all cells
SLOW = [
    "timm.models", "torchvision.models", "zoo_memory", *(f"physicsnemo.models.{m}" for m in (
        "afno", "diffusion_unets", "dit", "dpot", "fengwu", "flare", "fno", "geotransolver",
        "pangu", "pix2pix", "srrn", "transolver", "unet")),
]  # fmt: skip


def commit() -> str:
    """The commit of what is measured."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD:src"], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def versions() -> str:
    """Of torch, Python and the libraries."""
    names = ["torch", *LIBRARIES]
    found = [f"{n} {importlib.metadata.version(n)}" for n in names]
    return ", ".join([*found, f"Python {platform.python_version()}"])


def known(path: Path) -> dict[tuple[str, str], Row]:
    """The last row of each cell."""
    return {(r["model"], r["tool"]): r for r in lines(path)}


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
    parser.add_argument("--docs", type=Path, help="write the table of --rows to this file")
    options = parser.parse_args()
    done, at = known(options.rows), commit()
    if options.docs:
        options.docs.write_text(page(list(done.values()), list(MODELS), list(CELLS)))
        return
    warnings.simplefilter("ignore")
    declare_torchvision_ops()
    for module in (*LIBRARIES.values(), *SLOW):
        importlib.import_module(module)
    torch.set_num_threads(1)
    picked = [n for n in MODELS if not options.names or any(n.startswith(p) for p in options.names)]
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
        row = {"model": name, "tool": tool, "version": at, "with": versions()}
        how = None if tool == "runs" else done.get((name, "runs"), {}).get("how")
        row |= apart(partial(timed, tool, name, how), options.limit)
        done[name, tool] = row
        row |= {"wall": round(time.perf_counter() - begin, 1), "when": round(time.time())}
        add(options.rows, row)
        print(f"{tool:9} {name:36} {row['wall']:6.1f} s  {row['result'][:150]}", flush=True)


if __name__ == "__main__":
    main()
