"""What a file of a stranger may not do: lead to other files, or run code.

Held by tests/test_crafted_data.py. An array that the caller opened, an h5py dataset for instance,
is taken as it is, but for pickles.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

_OPEN = "open it yourself and give that array, if you trust the file"


@contextmanager
def named(file: Any) -> Iterator[None]:
    """What goes wrong in reading is a ValueError that names the file; it stays what it is where
    the file is not there or the system would not give it.
    """
    try:
        yield
    except (ImportError, IndexError, FileNotFoundError):
        raise
    except Exception as e:
        # libraries have numbers of their own below 0
        system = isinstance(e, OSError) and (e.errno or 0) > 0
        if system or (isinstance(e, ValueError) and str(file) in str(e)):
            raise
        raise ValueError(f"{file} cannot be read: {type(e).__name__}: {e}") from e


def plain_name(name: Any) -> bool:
    """Whether it is the name of a file in a folder, and not a path."""
    return (
        isinstance(name, str) and name.isprintable() and name[:1] not in ("", ".")
        and not {"/", "\\", ":"} & set(name) and len(name.encode()) < 240
    )  # fmt: skip


def zarr_store(zarr: Any, url: str) -> Any:
    """What `zarr.open` shall read: of a folder, a store whose links do not lead out of it."""
    path = url.removeprefix("file://")
    return _inside(zarr)(path, read_only=True) if os.path.isdir(path) else url


@cache
def _inside(zarr: Any) -> Any:
    """A store of Zarr that reads nothing outside of its folder."""

    class Inside(zarr.storage.LocalStore):
        def _check(self, key: str) -> None:
            root = os.path.realpath(self.root)
            found = os.path.realpath(Path(root) / key)
            if found != root and not found.startswith(root + os.sep):
                raise PermissionError(f"{self.root}: {key} leads out of the store; {_OPEN}")

        async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
            self._check(key)
            return await super().get(key, *args, **kwargs)

        def get_sync(self, key: str, **kwargs: Any) -> Any:
            self._check(key)
            return super().get_sync(key, **kwargs)

        async def get_partial_values(self, prototype: Any, key_ranges: Any) -> Any:
            ranges = list(key_ranges)
            for key, _ in ranges:
                self._check(key)
            return await super().get_partial_values(prototype, ranges)

    return Inside


def refuse_pickles(array: Any, name: str) -> None:
    """Raises ValueError for a Zarr array one of whose codecs unpickles."""
    fields = {k: v for k, v in array.metadata.to_dict().items() if k != "attributes"}
    for codec in _codecs(fields):
        if codec.replace("/", ".").rsplit(".", 1)[-1].lower() == "pickle":
            raise ValueError(f"{name}: its chunks are pickles, which would run what they say")


def _codecs(x: Any) -> Iterator[str]:
    """Names of codecs, those within others too."""
    if isinstance(x, Mapping):
        yield from (str(x[k]) for k in ("id", "name") if k in x)
        for v in x.values():
            yield from _codecs(v)
    elif isinstance(x, list | tuple):
        for v in x:
            yield from _codecs(v)
    elif hasattr(x, "get_config"):
        yield from _codecs(x.get_config())


# VTK's reader of PLY goes on beyond the end of a file, and the process dies
_PLY = {
    **dict.fromkeys(("char", "uchar", "int8", "uint8"), "u1"),
    **dict.fromkeys(("short", "ushort", "int16", "uint16"), "u2"),
    **dict.fromkeys(("int", "uint", "int32", "uint32", "float", "float32"), "u4"),
    **dict.fromkeys(("double", "float64"), "u8"),
}


def whole_ply(path: Path) -> None:
    """Raises ValueError for a PLY file that has less than its header says."""
    head, end, body = path.read_bytes().partition(b"end_header\n")
    with named(path):
        if not end:
            head, end, body = path.read_bytes().partition(b"end_header\r\n")
        lines = [line.split() for line in head.decode("ascii", "replace").splitlines()]
        if not end or lines[:1] != [["ply"]]:
            raise ValueError("its header has no end")
        kind = next(line[1] for line in lines if line[:1] == ["format"])
        elements: list[tuple[int, list[list[str]]]] = []
        for line in lines:
            if line[:1] == ["element"]:
                elements.append((int(line[2]), []))
            elif line[:1] == ["property"]:
                elements[-1][1].append(line[1:])
        if kind == "ascii":
            if sum(n for n, _ in elements) > sum(1 for line in body.splitlines() if line.strip()):
                raise ValueError("it has fewer lines than its header says")
            return
        order, at = "<" if "little" in kind else ">", 0
        for n, properties in elements:
            at = _rows(body, at, n, properties, order)


def _rows(body: bytes, at: int, n: int, properties: list[list[str]], order: str) -> int:
    """Where n rows of an element end that begin at a byte."""
    fixed = sum(int(_PLY[p[0]][1]) for p in properties if p[0] != "list")
    lists = [(int(_PLY[p[1]][1]), int(_PLY[p[2]][1])) for p in properties if p[0] == "list"]
    little: Literal["little", "big"] = "little" if order == "<" else "big"
    if len(lists) == 1 and properties[0][0] == "list" and n:
        # mostly all are as long as the first
        count, item = lists[0]
        row = count + int.from_bytes(body[at : at + count], little) * item + fixed
        rows = np.frombuffer(body[at : at + n * row][: len(body[at:]) // row * row], "u1")
        found = rows.reshape(-1, row)
        if len(found) == n and (found[:, :count] == found[0, :count]).all():
            return at + n * row
    elif not lists:
        at += n * fixed
        n = 0
    for _ in range(n):
        for p in properties:
            if p[0] != "list":
                at += int(_PLY[p[0]][1])
                continue
            count, item = int(_PLY[p[1]][1]), int(_PLY[p[2]][1])
            at += count + int.from_bytes(body[at : at + count], little) * item
        if at > len(body):
            break
    if at > len(body):
        raise ValueError("it has fewer bytes than its header says")
    return at


# HDF5 ---------------------------------------------------------------------------------------------


def member(group: Any, name: str, file: str) -> Any:
    """An object of an HDF5 group, links followed within the file only.

    Raises ValueError where the way to it or its data lie in another file.
    """
    at, steps, soft = group, name.split("/"), 0
    while steps:
        step = steps.pop(0)
        if step in ("", "."):
            continue
        kind, target = _link(at, step, file)
        if kind == "soft":
            soft += 1
            if soft > 32:
                raise ValueError(f"{file}: the link {step} leads round in a circle")
            at = at.file if target.startswith("/") else at
            steps = target.split("/") + steps
        else:
            at = at[step]
    refuse_outside(at, file)
    return at


def refuse_outside(data: Any, file: str) -> None:
    """Raises ValueError for an HDF5 dataset whose data lie in other files."""
    if getattr(data, "external", None):
        raise ValueError(f"{file}: {data.name} is external storage, bytes of other files; {_OPEN}")
    if getattr(data, "is_virtual", False):
        raise ValueError(f"{file}: {data.name} is a virtual dataset of other files; {_OPEN}")


def closed(file: Any, name: str) -> None:
    """Raises ValueError for an HDF5 file that leads to any other."""
    todo, seen = [file], set()
    while todo:
        group = todo.pop()
        for step in group:
            if _link(group, step, name)[0] == "soft":
                continue
            found = group[step]
            address = found.id.__hash__()
            if address in seen:
                continue
            seen.add(address)
            refuse_outside(found, name)
            if hasattr(found, "keys"):
                todo.append(found)


def _link(group: Any, step: str, file: str) -> tuple[str, str]:
    """Whether a link is hard or soft, and where a soft one leads."""
    from h5py import h5l  # type: ignore[import-untyped]

    key = step.encode(errors="surrogateescape")
    if not group.id.links.exists(key):
        raise ValueError(f"{file}: {group.name} has no {step}")
    kind = group.id.links.get_info(key).type
    if kind == h5l.TYPE_HARD:
        return "hard", ""
    if kind == h5l.TYPE_SOFT:
        return "soft", group.id.links.get_val(key).decode()
    raise ValueError(f"{file}: {step} is a link to another file; {_OPEN}")
