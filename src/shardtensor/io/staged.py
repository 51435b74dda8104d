"""Writes into Zarr arrays on file systems that take effect together: beside the store, then moved.

A rank that dies while it writes leaves the array as it was. The moves are renames by one process,
chunks before metadata; if it dies among them, the next write to that array completes them first.
Object stores have no renames: there an array is written in place.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import locks

_META = ("zarr.json", ".zarray", ".zattrs")


def place(url: str, name: str) -> Path | None:
    """A folder beside the store for what is written to its array `name`; None for object stores."""
    url = url.removeprefix("file://")
    if "://" in url or "::" in url or os.path.isfile(url):
        return None
    store = Path(os.path.abspath(url))
    return store.with_name(f".{store.name}.{name.replace('/', '.')}.part")


@contextmanager
def alone(part: Path) -> Iterator[None]:
    """Hold an array while it is written. Raises ValueError if somebody else holds it."""
    lock = part.with_suffix(".lock")
    try:
        file = locks.take(lock)
    except BlockingIOError:
        raise ValueError(
            f"{part.stem[1:]}: another writer is in this array, as another group of ranks "
            "beside a data axis would be: let one group write, or give each its own store"
        ) from None
    with _released(lock, file):
        yield


@contextmanager
def in_turn(url: str, part: Path | None) -> Iterator[None]:
    """Hold what the arrays of a store share: groups, coordinates and consolidated metadata.

    Writers of its other arrays wait; nothing is sent meanwhile. Object stores have no locks.
    """
    if part is None:
        yield
        return
    lock = part.with_name(f".{Path(os.path.abspath(url)).name}.lock")
    with _released(lock, locks.take(lock, wait=True)):
        yield


@contextmanager
def _released(lock: Path, file: int) -> Iterator[None]:
    try:
        yield
    finally:
        locks.let_go(lock, file)


def settle(part: Path) -> None:
    """Complete a commit that was cut short, or drop what was never committed."""
    if (part / "commit").exists():
        _move(part)
    shutil.rmtree(part, ignore_errors=True)


def clone(array: Path, part: Path, row: int | None) -> None:
    """The array's metadata, and of its chunks those that hold row number `row` of chunks."""
    part.mkdir(parents=True, exist_ok=True)
    for file in _META:
        if (array / file).exists():
            shutil.copyfile(array / file, part / file)
    if row is None:
        return
    for chunk in _chunks(array, row):
        (part / chunk).parent.mkdir(parents=True, exist_ok=True)
        try:
            # written files replace others, they are never written into
            os.link(array / chunk, part / chunk)
        except OSError:
            shutil.copyfile(array / chunk, part / chunk)


def commit(part: Path, name: str, array: Path, row: int | None) -> None:
    """Move what was written to `name` in `part` into the array: all of it, or a row of chunks."""
    chunks = sorted(_chunks(part / name, row))
    note = part / "commit.part"
    note.write_text(json.dumps({"name": name, "array": str(array), "row": row, "chunks": chunks}))
    note.replace(part / "commit")
    _move(part)
    shutil.rmtree(part, ignore_errors=True)


def _move(part: Path) -> None:
    told = json.loads((part / "commit").read_text())
    source, array = part / told["name"], Path(told["array"])
    stale = set(_chunks(array, told["row"])) - set(told["chunks"])
    for file in told["chunks"]:
        _replace(source / file, array / file)
    for file in stale:
        (array / file).unlink()
    for file in _META:
        _replace(source / file, array / file)


def _replace(source: Path, target: Path) -> None:
    if source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        source.replace(target)


def _chunks(array: Path, row: int | None) -> Iterator[str]:
    """Files of chunks, relative; of all of them or of a row."""
    if not array.exists():
        return
    for path in array.rglob("*"):
        found = path.relative_to(array).as_posix()
        if path.name in _META or not path.is_file():
            continue
        numbers = re.findall(r"\d+", found)
        if row is None or (numbers and int(numbers[0]) == row):
            yield found
