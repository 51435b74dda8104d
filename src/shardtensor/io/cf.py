"""Packed and masked numbers of the CF conventions, decoded as xarray does.

CF 1.11, sections 2.5.1 and 8.1: stored * scale_factor + add_offset, NaN where a number equals
_FillValue or missing_value. _Unsigned is of the NetCDF Users' Guide. Ranges of valid numbers
(valid_min, valid_max, valid_range) change nothing, as in xarray.
"""

from __future__ import annotations

from base64 import b64decode
from collections.abc import Mapping
from dataclasses import dataclass
from struct import unpack
from typing import Any

import numpy as np

_FILLS = ("_FillValue", "missing_value")


@dataclass(frozen=True)
class Packing:
    """How stored numbers become values. stored: what they are read as. dtype: of the values."""

    stored: np.dtype
    dtype: np.dtype
    fills: tuple[Any, ...] = ()
    scale: float = 1.0
    offset: float = 0.0
    scaled: bool = False

    def decode(self, block: np.ndarray) -> np.ndarray:
        if block.dtype.kind in "iu" and self.stored != block.dtype:
            block = block.astype(self.stored)  # the same bits
        if self.scaled:
            wide = np.complex128 if block.dtype.kind == "c" else np.float64
            found = block.astype(wide)
            found *= self.scale
            found += self.offset
            found = found.astype(self.dtype, copy=False)
        else:
            found = block.astype(self.dtype, copy=bool(self.fills))
        for fill in self.fills:
            found[block == fill] = np.nan
        return found


def packing(stored: np.dtype, attrs: Mapping[str, Any], name: str) -> Packing:
    """What the attributes of an array of that dtype say.

    Raises ValueError that names the array for an attribute that is not a number.
    """
    stored = stored.newbyteorder("=")
    fills: list[Any] = []
    for key in _FILLS:
        if key in attrs:
            values = _numbers(attrs[key], stored, f"{name}: {key}")
            fills += [v for v in values if not np.isnan(v)]
    fills, stored = _signed(stored, attrs, fills)
    scaled = "scale_factor" in attrs or "add_offset" in attrs
    scale = _number(attrs.get("scale_factor", 1.0), f"{name}: scale_factor")
    offset = _number(attrs.get("add_offset", 0.0), f"{name}: add_offset")
    dtype = stored
    if scaled:
        dtype = _scaled(stored, scale, offset)
    elif fills:
        dtype = _with_nan(stored)
    elif attrs.get("dtype") == "bool":
        dtype = np.dtype(bool)
    return Packing(stored, dtype, tuple(fills), scale, offset, scaled)


def _signed(stored: np.dtype, attrs: Mapping[str, Any], fills: list[Any]) -> tuple[Any, np.dtype]:
    """The dtype that _Unsigned says, and _FillValue in it."""
    kind = {("i", "true"): "u", ("u", "false"): "i"}.get((stored.kind, attrs.get("_Unsigned", "")))
    if kind is None:
        return fills, stored
    other = np.dtype(f"{kind}{stored.itemsize}")
    if "_FillValue" in attrs and fills:
        fills = [np.array(int(fills[0])).astype(stored).astype(other)[()], *fills[1:]]
    return fills, other


def _with_nan(stored: np.dtype) -> np.dtype:
    """The dtype that holds every stored number and NaN."""
    if stored.kind in "fc":
        return stored
    return np.dtype(np.float64 if stored.itemsize > 2 else np.float32)


def _scaled(stored: np.dtype, scale: float, offset: float) -> np.dtype:
    """float32 where it tells all values well apart, else float64."""
    if stored.kind == "c":
        return stored
    if stored.kind == "f":
        return np.dtype(np.float32 if stored.itemsize <= 4 and not offset else np.float64)
    if stored.itemsize > 2:
        return np.dtype(np.float64)
    most = 2.0 ** (8 * stored.itemsize) * abs(scale) + abs(offset)
    return np.dtype(np.float32 if most * 2.0**-24 <= abs(scale) / 16 else np.float64)


def _numbers(value: Any, stored: np.dtype, what: str) -> list[Any]:
    if isinstance(value, str) or (isinstance(value, list) and any(type(v) is str for v in value)):
        value = _from_base64(value, stored, what)
    found = np.ravel(value)
    if found.dtype.kind not in "biufc":
        raise ValueError(f"{what} is {value!r}; expected a number like the array's ({stored})")
    # Python's own numbers take part in comparisons as numbers of the array's dtype
    return list(found) if isinstance(value, np.ndarray | np.generic) else np.ravel(value).tolist()


def _from_base64(value: Any, stored: np.dtype, what: str) -> Any:
    """A number as xarray writes it into attributes of Zarr 3: eight little-endian bytes."""
    try:
        parts = [unpack("<d", b64decode(v, validate=True))[0] for v in np.ravel(value)]
    except Exception as e:
        raise ValueError(
            f"{what} is {value!r}; expected a number like the array's ({stored})"
        ) from e
    return complex(*parts) if stored.kind == "c" else parts[0]


def _number(value: Any, what: str) -> float:
    found = np.ravel(value)
    if found.size != 1 or found.dtype.kind not in "iuf":
        raise ValueError(f"{what} is {value!r}; expected one number")
    return float(found[0])
