"""HDF5 files in the schema of The Well (PolymathicAI, arXiv 2412.00568; its docs/data_format).

Groups t0_fields, t1_fields, t2_fields hold scalars, vectors and tensors of shape ([trajectory,]
[step,] spatial..., components...): a leading dim is there where the field varies in it. A spatial
dim in which it doesn't (`dim_varying`) is missing, as in the schema's text, or of size 1, as The
Well's own loader wants it. The group `dimensions` names the spatial dims and has their coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .chunks import heed
from .foreign import closed, named

Window = Sequence[tuple[int, int] | slice | None]
_GROUPS = ("t0_fields", "t1_fields", "t2_fields")


def _h5py() -> Any:
    try:
        import h5py  # type: ignore[import-untyped]
    except ImportError as e:
        raise ImportError('HDF5 files need h5py: pip install "shardtensor[io]"') from e
    return h5py


class Field(NamedTuple):
    """A field of the file. order: 0 scalar, 1 vector, 2 tensor. components: numbers per point.

    by_*: what it varies in. stored: the spatial dims that its dataset has.
    """

    order: int
    components: int
    by_trajectory: bool
    by_step: bool
    by_dim: tuple[bool, ...]
    stored: tuple[bool, ...]


class WellFile:
    """One file of The Well, open for reading; a context manager.

    path: or an open binary file, for instance a remote one of fsspec. shape: the spatial shape.
    fields: name -> Field. boundary_conditions: name -> bc_type. bytes_read: bytes of fields read so
    far; a dataset stored in chunks costs whole chunks on top. Raises ImportError that names the
    extra where h5py is not installed.
    """

    boundary_conditions: dict[str, str]
    bytes_read: int
    dims: tuple[str, ...]
    n_steps: int
    n_trajectories: int
    name: str
    shape: tuple[int, ...]

    def __init__(self, path: str | PathLike[str] | BinaryIO) -> None:
        self._path = path
        self.bytes_read = 0
        where = path if isinstance(path, str | PathLike) else getattr(path, "name", "a file")
        with named(where):
            self._file = _h5py().File(path, "r")
            try:
                closed(self._file, str(where))
                self._look()
            except BaseException:
                self._file.close()
                raise

    def _look(self) -> None:
        names = [_text(n) for n in self._file["dimensions"].attrs["spatial_dims"]]
        self.dims = tuple(names)
        self.shape = tuple(self._file["dimensions"][n].shape[-1] for n in names)
        self.n_trajectories = int(self._file.attrs["n_trajectories"])
        self.n_steps = int(self._file["dimensions"]["time"].shape[-1])
        self.name = _text(self._file.attrs["dataset_name"])
        conditions = self._file.get("boundary_conditions", {})
        # in lower case: files of The Well have both
        types = {k: _text(g.attrs["bc_type"]) for k, g in conditions.items()}
        self.boundary_conditions = {k: v.lower() for k, v in types.items()}
        self.fields: dict[str, Field] = {}
        self._data: dict[str, Any] = {}
        for order, group in enumerate(_GROUPS):
            for name, data in self._file.get(group, {}).items():
                if name in self.fields:
                    raise ValueError(f"{data.name}: an earlier group has a field of that name")
                self.fields[name] = self._field(order, data)
                self._data[name] = data

    def __reduce__(self) -> Any:
        if not isinstance(self._path, str | PathLike):
            raise TypeError("a WellFile of an open file is not pickled: open it by its path")
        return WellFile, (self._path,)

    def __enter__(self) -> WellFile:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _field(self, order: int, data: Any) -> Field:
        by_dim = tuple(bool(v) for v in data.attrs["dim_varying"])
        flags = bool(data.attrs["sample_varying"]), bool(data.attrs["time_varying"])
        shape = data.shape[sum(flags) :]
        for stored in ((True,) * len(by_dim), by_dim):
            dims = zip(self.shape, by_dim, stored, strict=True)
            sizes = tuple(n if varies else 1 for n, varies, kept in dims if kept)
            components = shape[len(sizes) :]
            # the schema's text has tensors of D^2 components, the loader D, D; a scalar may have 1
            fits = 1 <= len(components) <= order if order else prod(components) == 1
            if shape[: len(sizes)] == sizes and fits:
                return Field(order, prod(components), *flags, by_dim, stored)
        raise ValueError(
            f"{data.name}: {data.shape} doesn't fit the spatial shape {self.shape}, varying by "
            f"trajectory, step {flags}, dim {by_dim}"
        )

    def channels(self, fields: Sequence[str]) -> int:
        """How many channels `read` gives for these fields."""
        return sum(self.fields[f].components for f in fields)

    def read(
        self, fields: Sequence[str], trajectory: int, step: int, window: Window | None = None
    ) -> Tensor:
        """Fields at one step: float32 (channels, *window), components as channels.

        window: for each spatial dim (start, stop), a slice, or None for the whole dim; only that
        block is read. Raises IndexError for a trajectory, step or window outside the file, KeyError
        for a field that it has not.
        """
        if not 0 <= trajectory < self.n_trajectories or not 0 <= step < self.n_steps:
            raise IndexError(
                f"trajectory {trajectory}, step {step}: the file has {self.n_trajectories} "
                f"trajectories of {self.n_steps} steps"
            )
        ranges = self._ranges(window)
        for f in fields:
            self.fields[f]  # KeyError
        with named(self._file.filename):
            return torch.cat([self._read(f, trajectory, step, ranges) for f in fields])

    def _ranges(self, window: Window | None) -> list[slice]:
        found = []
        for n, w in zip(self.shape, window or [None] * len(self.shape), strict=True):
            if w is None:
                w = slice(0, n)
            if not isinstance(w, slice):
                w = slice(*w)
            start, stop = w.start or 0, n if w.stop is None else w.stop
            if not 0 <= start <= stop <= n or w.step not in (None, 1):
                raise IndexError(f"window {w} of a dim of size {n}")
            found.append(slice(start, stop))
        return found

    def _read(self, name: str, trajectory: int, step: int, ranges: list[slice]) -> Tensor:
        field, data = self.fields[name], self._data[name]
        index: list[Any] = [trajectory] if field.by_trajectory else []
        index += [step] if field.by_step else []
        dims = zip(ranges, field.by_dim, field.stored, strict=True)
        index += [r if varies else slice(None) for r, varies, stored in dims if stored]
        block = np.asarray(data[tuple(index)], dtype=np.float32)
        rows = [
            (i, i + 1) if isinstance(i, int) else i.indices(n)[:2]
            for i, n in zip(index, data.shape, strict=False)
        ]
        rows += [(0, n) for n in data.shape[len(rows) :]]
        told = f"{self._file.filename}{data.name}"
        heed(told, data.shape, data.chunks, data.dtype.itemsize, rows, {})
        self.bytes_read += block.size * data.dtype.itemsize
        shape = [r.stop - r.start for r in ranges]
        sizes = [n if varies else 1 for n, varies in zip(shape, field.by_dim, strict=True)]
        x = torch.from_numpy(block).reshape(*sizes, field.components).movedim(-1, 0)
        return x.expand(-1, *shape).contiguous()


def write_well(
    path: str | PathLike[str],
    fields: Mapping[str, Tensor],
    *,
    name: str,
    times: Sequence[float],
    parameters: Mapping[str, float] | None = None,
    boundary: str = "periodic",
    lengths: Sequence[float] | None = None,
) -> None:
    """Write fields of every trajectory and step as one file of The Well.

    fields: name -> (trajectories, steps, *spatial) for a scalar, one or two dims of components more
    for a vector or tensor; all with the same spatial shape. times: of the steps. lengths: of the
    domain in each spatial dim (default 1; to be given where there is no scalar, which tells the
    dims of space from those of components). boundary: periodic, wall or open, in every dim.
    One rank calls this, with whole fields. The file appears under its name when it is complete.
    Raises ValueError for shapes that differ, ImportError where h5py is not installed.
    """
    first = next(iter(fields.values()))
    ndim = len(lengths) if lengths else min(f.ndim for f in fields.values()) - 2
    shape = first.shape[2 : 2 + ndim]
    for key, field in fields.items():
        components = field.shape[2 + ndim :]
        alike = field.shape[: 2 + ndim] == (first.shape[0], len(times), *shape)
        if not alike or len(components) > 2 or set(components) - {ndim}:
            raise ValueError(
                f"{key}: {tuple(field.shape)} is not ({first.shape[0]} trajectories, {len(times)} "
                f"steps, *{tuple(shape)}) and up to two dims of {ndim} components"
            )
    dims = ("x", "y", "z")[:ndim]
    whole = Path(path)
    part = whole.with_name(whole.name + ".part")
    with _h5py().File(part, "w") as file:
        file.attrs["dataset_name"] = name
        file.attrs["grid_type"] = "cartesian"
        file.attrs["n_spatial_dims"] = ndim
        file.attrs["n_trajectories"] = first.shape[0]
        file.attrs["simulation_parameters"] = list(parameters or {})
        for key, value in (parameters or {}).items():
            file.attrs[key] = float(value)
        _write_dimensions(file, dims, shape, times, lengths or (1.0,) * ndim)
        _write_boundaries(file, dims, shape, boundary)
        scalars = file.create_group("scalars")
        scalars.attrs["field_names"] = list(parameters or {})
        for key, value in (parameters or {}).items():
            data = scalars.create_dataset(key, data=np.float32(value))
            data.attrs["sample_varying"] = data.attrs["time_varying"] = False
        for order, group_name in enumerate(_GROUPS):
            group = file.create_group(group_name)
            chosen = {k: f for k, f in fields.items() if f.ndim == 2 + ndim + order}
            group.attrs["field_names"] = list(chosen)
            for key, field in chosen.items():
                data = group.create_dataset(key, data=field.to(torch.float32).cpu().numpy())
                data.attrs["dim_varying"] = [True] * ndim
                data.attrs["sample_varying"] = data.attrs["time_varying"] = True
                if order == 2:
                    data.attrs["symmetric"] = data.attrs["antisymmetric"] = False
    part.replace(whole)


def _write_dimensions(
    file: Any,
    dims: Sequence[str],
    shape: Sequence[int],
    times: Sequence[float],
    lengths: Sequence[float],
) -> None:
    group = file.create_group("dimensions")
    group.attrs["spatial_dims"] = list(dims)
    time = group.create_dataset("time", data=np.asarray(times, dtype=np.float32))
    time.attrs["sample_varying"] = False
    for name, n, length in zip(dims, shape, lengths, strict=True):
        data = group.create_dataset(name, data=np.arange(n, dtype=np.float32) * (length / n))
        data.attrs["sample_varying"] = data.attrs["time_varying"] = False


def _write_boundaries(file: Any, dims: Sequence[str], shape: Sequence[int], kind: str) -> None:
    conditions = file.create_group("boundary_conditions")
    for name, n in zip(dims, shape, strict=True):
        group = conditions.create_group(f"{name}_{kind}")
        group.attrs["associated_dims"] = [name]
        group.attrs["associated_fields"] = []
        group.attrs["bc_type"] = kind
        group.attrs["sample_varying"] = group.attrs["time_varying"] = False
        mask = np.zeros(n, dtype=bool)
        mask[[0, -1]] = True
        group.create_dataset("mask", data=mask)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
