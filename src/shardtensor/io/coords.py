"""Coordinates in Zarr groups, as xarray reads them: 1-dim arrays named as their dims."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# CF's attributes of coordinates that are given none
_KNOWN = {
    "latitude": {"standard_name": "latitude", "units": "degrees_north"},
    "longitude": {"standard_name": "longitude", "units": "degrees_east"},
    "time": {"standard_name": "time"},
}
_NAMES = {"lat": "latitude", "lon": "longitude", "valid_time": "time"}
_EPOCH = {"units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian"}


class Coordinate:
    """One coordinate. row: where its only value goes, along the dim of the steps; None: all of it.

    given: values, or (values, attributes). array: the name of what it is a coordinate of. Raises
    ValueError for what is no coordinate of the dims.
    """

    name: str
    row: int | None

    def __init__(
        self, name: str, given: Any, dims: Sequence[str], shape: Sequence[int], step: int | None,
        array: str,
    ) -> None:  # fmt: skip
        values, attrs = given, dict[str, Any]()
        if isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping):
            values, attrs = given
        if name == array:
            raise ValueError(f"coords {name}: the array has that name; give it another one")
        if np.ma.is_masked(values):
            raise ValueError(f"coords {name}: masked values; a coordinate has all of them")
        if name not in dims:
            raise ValueError(f"coords {name}: the dims are {list(dims)}; name it as one of them")
        found = np.asarray(values)
        self.name, self.row = name, None
        if step is not None and name == dims[0]:
            self.row = step
            found = found.reshape(-1)
        size = 1 if self.row is not None else shape[list(dims).index(name)]
        if found.shape != (size,):
            raise ValueError(f"coords {name}: {found.shape} values for a dim of {size} rows")
        time: Mapping[str, str] = {}
        if found.dtype.kind == "M":
            if np.isnat(found).any():
                raise ValueError(f"coords {name}: times are missing (NaT)")
            if (found.astype("datetime64[s]") != found).any():
                raise ValueError(f"coords {name}: times of parts of a second; give numbers, units")
            found, time = found.astype("datetime64[s]").astype(np.int64), _EPOCH
        if found.dtype.kind not in "biuf":
            raise ValueError(f"coords {name}: {found.dtype}; give numbers or datetime64")
        self.values = found
        self.attrs = {**_KNOWN.get(_NAMES.get(name, name), {}), **time, **plain_attrs(attrs)}

    def check(self, group: Any) -> None:
        """Raise ValueError where the group has another coordinate of this name."""
        if self.name not in group:
            return
        there = group[self.name]
        units = there.attrs.get("units", self.attrs.get("units"))
        if there.ndim != 1 or units != self.attrs.get("units", units):
            raise ValueError(
                f"coords {self.name}: {there.shape} in {units!r} is there, to be written is "
                f"{self.values.shape} in {self.attrs.get('units')!r}"
            )
        if self.row is not None:
            kept = self.values.astype(there.dtype)
            if not np.array_equal(kept, self.values, equal_nan=kept.dtype.kind == "f"):
                raise ValueError(
                    f"coords {self.name}: {there.dtype} is there, which does not hold "
                    f"{self.values[0]}; write the first step's in the type of all"
                )
        elif not np.array_equal(there[:], self.values):
            raise ValueError(f"coords {self.name}: other values are there")

    def write(self, group: Any) -> None:
        if self.name not in group:
            self._make(group)
        array = group[self.name]
        if self.row is not None:
            if array.shape[0] <= self.row:
                array.resize((self.row + 1,))
            array[self.row : self.row + 1] = self.values

    def _make(self, group: Any) -> None:
        extra: dict[str, Any] = {}
        attrs = dict(self.attrs)
        if group.metadata.zarr_format == 2:
            extra["fill_value"] = None
            attrs["_ARRAY_DIMENSIONS"] = [self.name]
        else:
            extra["dimension_names"] = [self.name]
        grows = self.row is not None
        n = (self.row or 0) + 1 if grows else len(self.values)
        chunks = (512,) if grows else (max(1, n),)
        array = group.create_array(
            self.name, shape=(n,), chunks=chunks, dtype=self.values.dtype, **extra
        )
        if not grows:
            array[:] = self.values
        array.attrs.update(attrs)


def grows_with(group: Any, dims: Sequence[str] | None, step: int, written: Sequence[str]) -> None:
    """Raise ValueError where a step has no place in the coordinate that is there of the steps:
    readers would find two lengths of one dim. written: arrays that get a row for it.
    """
    own = dims[0] if dims else None
    if own is None or own not in group or own in written:
        return
    n: Sequence[int] = getattr(group[own], "shape", ())
    if len(n) == 1 and n[0] <= step:
        raise ValueError(
            f"step {step}: the coordinate {own} is there with {n[0]} values and none for it: give "
            f"coords={{{own!r}: ...}}"
        )


def plain_attrs(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as JSON takes them: numbers of NumPy as Python's."""
    return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in attrs.items()}


def consolidate(zarr: Any, url: str) -> None:
    """Gather the metadata of a group in one place, where xarray looks for them."""
    with warnings.catch_warnings():
        # Zarr 3 has it as a convention
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        zarr.consolidate_metadata(url)
