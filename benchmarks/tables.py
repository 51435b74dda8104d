"""Tables that benchmarks leave behind."""

from __future__ import annotations

import csv
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
