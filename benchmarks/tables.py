"""Tables that benchmarks leave behind."""

from __future__ import annotations

import csv
import json
import platform
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def hardware() -> str:
    """What a figure was measured on."""
    return f"{platform.processor() or platform.machine()}, torch {version('torch')}"


def append(path: Path | None, fields: Sequence[str], row: dict[str, Any]) -> None:
    """Write a row to the end of a CSV file, if one is named, under a header if it is the first."""
    if path is None:
        return
    begun = path.exists()
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, fields)
        if not begun:
            writer.writeheader()
        writer.writerow(row)


def extend(path: Path | None, rows: Iterable[Sequence[Any]]) -> None:
    """Write rows without a header to the end of a CSV file, if one is named."""
    if path is not None:
        with path.open("a", newline="") as f:
            csv.writer(f).writerows(rows)


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; none if there is no file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line]


def add(path: Path, row: dict[str, Any]) -> None:
    """Write a row to the end of a file of JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        f.write(json.dumps(row) + "\n")


def short(message: str, most: int) -> str:
    """A message in a cell of Markdown, without the paths to this checkout and what is installed."""
    said = " ".join(message.split()).replace("|", "/").replace(f"{ROOT}/", "")
    return re.sub(r"/[^\s()]*site-packages/", "", said)[:most]


def sources() -> str:
    """What tells the library's sources that are measured from others."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD:src"], cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return found.stdout.strip()


def commits(rows: Sequence[dict[str, Any]]) -> str:
    """The numbers of rows by the first commit that has the sources that ran."""
    log = subprocess.run(
        ["git", "log", "--format=%h %cs"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    days = dict(line.split() for line in log.stdout.splitlines())
    asked = "".join(f"{at}:src\n" for at in days)
    trees = subprocess.run(
        ["git", "cat-file", "--batch-check=%(objectname)"], cwd=ROOT, input=asked,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    # the log begins with the last
    first = dict(zip(trees.stdout.split("\n"), days, strict=False))
    told = []
    for tree, n in Counter(r["version"] for r in rows).most_common():
        at = next((at for full, at in first.items() if full.startswith(tree)), None)
        told.append(f"{n} {at} ({days[at]})" if at else f"{n} of sources {tree} that are gone")
    return ", ".join(told)
