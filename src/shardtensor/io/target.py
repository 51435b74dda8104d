"""Arrays of Zarr groups that are written to: made by one rank, written by all, completed by one."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from struct import pack
from typing import Any
from zlib import crc32

import numpy as np

from . import staged
from .coords import Coordinate, consolidate, grows_with, plain_attrs
from .source import dims_of
from .where import need


@dataclass(frozen=True)
class Target:
    """The array `name` of the group at `url`, or row `step` of it; arguments as of `write_zarr`.

    shape, dtype: of what is written. usual: its chunks where neither it nor a caller has any.
    Raises ValueError for arguments that do not fit together.
    """

    url: str
    name: str
    step: int | None
    shape: tuple[int, ...]
    dtype: Any
    chunks: Sequence[int] | None
    usual: Sequence[int]
    dims: Sequence[str] | None
    attrs: Mapping[str, Any]
    coords: Mapping[str, Any]
    zarr_format: int

    def __post_init__(self) -> None:
        chunks, dims, shape = self.chunks, self.dims, self.whole
        if chunks is not None and (len(chunks) != len(self.shape) or min(chunks, default=1) < 1):
            raise ValueError(
                f"chunks {tuple(chunks)} of a tensor of {len(self.shape)} dims: one size of 1 or "
                "more for each"
            )
        if dims is not None and len(dims) != len(shape):
            raise ValueError(f"dims {list(dims)} for an array of shape {shape}")
        if len({d for d in dims or () if d and isinstance(d, str)}) != len(dims or ()):
            raise ValueError(f"dims {list(dims or ())}: a name for each, no two alike")
        # what is wrong in coordinates shows now
        _ = self.axes

    @property
    def lead(self) -> tuple[int, ...]:
        """The steps that there are then."""
        return () if self.step is None else (self.step + 1,)

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the array, with these steps."""
        return (*self.lead, *self.shape)

    @cached_property
    def part(self) -> Path | None:
        """Where it is written before it takes effect; None in object stores."""
        return staged.place(self.url, self.name)

    @property
    def own(self) -> str:
        """Its name in the group that it is in."""
        return self.name.rpartition("/")[2]

    @cached_property
    def axes(self) -> list[Coordinate]:
        return [
            Coordinate(k, v, self.dims or (), self.whole, self.step, self.own)
            for k, v in self.coords.items()
        ]

    @property
    def folder(self) -> Path:
        return Path(os.path.abspath(self.url.removeprefix("file://"))) / self.name

    def number(self) -> int:
        """One for each place that is written to."""
        chunks, dims = self.chunks and tuple(self.chunks), self.dims and tuple(self.dims)
        return crc32(repr((self.name, self.step, chunks, dims)).encode())

    def make(self, held: ExitStack) -> list[int]:
        """The group, and where it is written the array with room for this step; held until then.

        Returns the rows of all dims, that of the steps first, that only one rank may write
        together.
        """
        if self.part is not None:
            held.enter_context(staged.alone(self.part))
        with staged.in_turn(self.url, self.part):
            array = self._array()
        found = [int(n) for n in array.shards or array.chunks]
        return found if self.lead else [1, *found]

    def write(self, start: Sequence[int], numbers: Any) -> None:
        """Some rows, from `start` on."""
        array = self._group(self.part or self.url)[self.name]
        at: list[Any] = [] if self.step is None else [self.step]
        at += [slice(a, a + n) for a, n in zip(start, numbers.shape, strict=True)]
        array[tuple(at)] = numbers

    def complete(self, unit: int) -> None:
        """What was written takes effect. unit: the steps that are written together."""
        with staged.in_turn(self.url, self.part):
            beside = _beside(self._group(self.url), self.name)
            for axis in self.axes:
                # another array's writer may have made it since
                axis.check(beside)
            if self.part is not None:
                staged.commit(self.part, self.name, self.folder, self._row(unit))
            for axis in self.axes:
                axis.write(beside)
            consolidate(need("zarr"), self.url)

    def _group(self, at: Any) -> Any:
        return need("zarr").open_group(at, mode="r+", use_consolidated=False)

    def _row(self, unit: int) -> int | None:
        return None if self.step is None else self.step // unit

    def _array(self) -> Any:
        zarr, name = need("zarr"), self.name
        if self.part is not None:
            staged.settle(self.part)
        try:
            group = self._group(self.url)
        except FileNotFoundError:
            group = zarr.open_group(self.url, mode="a", zarr_format=self.zarr_format)
        there = name in group
        self._check(group, there)
        array: Any = group[name] if there else None
        if self.part is not None:
            version = group.metadata.zarr_format
            group = zarr.open_group(self.part, mode="w", zarr_format=version)
            if there:
                unit = (array.shards or array.chunks)[0] if self.lead else 1
                staged.clone(self.folder, self.part / name, self._row(unit))
                array = group[name]
        if not there:
            return self._made(group)
        if self.lead and array.shape[0] < self.lead[0]:
            array.resize((self.lead[0], *array.shape[1:]))
        return array

    def _check(self, group: Any, there: bool) -> None:
        """Raise ValueError where what is there does not fit."""
        name, beside = self.name, _beside(group, self.name)
        for axis in self.axes:
            axis.check(beside)
        if self.step is not None:
            named = dims_of(group[name], "zarr") if there and not self.dims else self.dims
            written = [self.own, *(axis.name for axis in self.axes)]
            grows_with(beside, named, self.step, written)
        if not there:
            return
        array, lead, shape = group[name], len(self.lead), self.whole
        if not hasattr(array, "shards"):
            raise ValueError(f"{name}: a group is there; give the array another name")
        chunks = self.chunks
        told = f" in chunks {(*array.chunks[:lead], *chunks)}" if chunks is not None else ""
        fits = array.shape[lead:] == shape[lead:] and array.ndim == len(shape)
        alike = chunks is None or tuple(chunks) == array.chunks[lead:]
        if not fits or array.dtype != self.dtype or not alike:
            raise ValueError(
                f"{name}: {array.shape} of {array.dtype} in chunks {array.chunks} is there; to be "
                f"written is {shape} of {self.dtype}{told}"
            )

    def _made(self, group: Any) -> Any:
        """A new array of a Zarr group, with names of dims where its format keeps them."""
        names = list(self.dims) if self.dims else None
        more = plain_attrs(self.attrs)
        extra: dict[str, Any] = {}
        if group.metadata.zarr_format == 2:
            # xarray takes a fill value of 0 for a mask of all zeros
            extra["fill_value"] = None
            if names:
                more["_ARRAY_DIMENSIONS"] = names
        else:
            if names:
                extra["dimension_names"] = names
            fill = more.get("_FillValue")
            if isinstance(fill, int | float) and np.dtype(self.dtype).kind == "f":
                # as xarray has it there, and attributes of such an array already do
                more["_FillValue"] = b64encode(pack("<d", fill)).decode()
        chunks = (*(1 for _ in self.lead), *(self.chunks or self.usual))
        array = group.create_array(
            self.name, shape=self.whole, chunks=chunks, dtype=self.dtype, **extra
        )
        array.attrs.update(more)
        return array


def _beside(group: Any, name: str) -> Any:
    """The group of which the array is."""
    path = name.rpartition("/")[0]
    try:
        return group.require_group(path) if path else group
    except TypeError as e:
        raise ValueError(f"{name}: {path} is no group but an array: give another name") from e
