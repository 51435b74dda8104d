"""Tables that benchmarks leave behind."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def append(path: Path, fields: Sequence[str], row: dict[str, Any]) -> None:
    """Write a row to the end of a CSV file, under a header if it is the first."""
    begun = path.exists()
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, fields)
        if not begun:
            writer.writeheader()
        writer.writerow(row)


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
    """A message in a cell of Markdown, without the path to what is installed."""
    said = " ".join(message.split()).replace("|", "/")
    before, found, after = said.rpartition("site-packages/")
    return (before.rpartition("(")[0] + "(" + after if found else said)[:most]
