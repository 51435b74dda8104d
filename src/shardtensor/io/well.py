"""HDF5 files in the schema of The Well (PolymathicAI, arXiv 2412.00568; its docs/data_format).

Groups t0_fields, t1_fields, t2_fields hold scalars, vectors and tensors of shape ([trajectory,] [step,]
spatial..., components...): a leading dim is there where the field varies in it, a spatial dim where
`dim_varying` says so. The group `dimensions` names the spatial dims and has their coordinates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Window = Sequence[tuple[int, int] | slice | None]
_GROUPS = ("t0_fields", "t1_fields", "t2_fields")


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as e:
        raise ImportError('HDF5 files need h5py: pip install "shardtensor[io]"') from e
    return h5py


class Field(NamedTuple):
    """A field of the file. order: 0 scalar, 1 vector, 2 tensor. components: numbers per point."""

    order: int
    components: int
    by_trajectory: bool
    by_step: bool
    by_dim: tuple[bool, ...]


class WellFile:
    """One file of The Well, open for reading; a context manager.

    shape: the spatial shape. fields: name -> Field. boundary_conditions: name -> bc_type.
    bytes_read: bytes of fields read so far.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._file = _h5py().File(path, "r")
        self.bytes_read = 0
        names = [_text(n) for n in self._file["dimensions"].attrs["spatial_dims"]]
        self.dims = tuple(names)
        self.shape = tuple(self._file["dimensions"][n].shape[-1] for n in names)
        self.n_trajectories = int(self._file.attrs["n_trajectories"])
        self.n_steps = int(self._file["dimensions"]["time"].shape[-1])
        self.name = _text(self._file.attrs["dataset_name"])
        conditions = self._file.get("boundary_conditions", {})
        self.boundary_conditions = {k: _text(g.attrs["bc_type"]) for k, g in conditions.items()}
        self.fields: dict[str, Field] = {}
        self._data: dict[str, Any] = {}
        for order, group in enumerate(_GROUPS):
            for name, data in self._file.get(group, {}).items():
                self.fields[name] = self._field(order, data)
                self._data[name] = data

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
        lead = sum(flags) + sum(by_dim)
        return Field(order, prod(data.shape[lead:]), *flags, by_dim)

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
        index += [r for r, varies in zip(ranges, field.by_dim, strict=True) if varies]
        block = np.asarray(data[tuple(index)], dtype=np.float32)
        self.bytes_read += block.size * data.dtype.itemsize
        spatial = sum(field.by_dim)
        x = torch.from_numpy(block).reshape(*block.shape[:spatial], field.components)
        for d, varies in enumerate(field.by_dim):
            if not varies:
                x = x.unsqueeze(d)
        x = x.movedim(-1, 0)
        return x.expand(-1, *(r.stop - r.start for r in ranges)).contiguous()


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
    domain in each spatial dim (default 1). boundary: periodic, wall or open, in every dim.
    """
    first = next(iter(fields.values()))
    ndim = min(f.ndim for f in fields.values()) - 2
    shape = first.shape[2 : 2 + ndim]
    dims = ("x", "y", "z")[:ndim]
    with _h5py().File(path, "w") as file:
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


def _write_dimensions(
    file: Any, dims: Sequence[str], shape: Sequence[int], times: Sequence[float],
    lengths: Sequence[float],
) -> None:  # fmt: skip
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
