"""Weather on a latitude-longitude grid, as WeatherBench 2 publishes it, sample by sample.

Rasp et al. 2024 (arXiv 2308.15560): Zarr stores with dims time, level, latitude and longitude, the
last two in either order, latitudes ascending or descending; float32; one array for each variable,
with a level dim for those of the atmosphere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement

from ..spec import Spec
from ..tensor import ShardTensor
from .block import placed
from .source import Source, open_array

Number = float | Sequence[float]


class LatLon:
    """Samples {"x": state at time i, "y": state at time i + lead}, each (C, latitude, longitude).

    where: what `open_array` takes, in the schema above. variables: names; a variable with levels
    gives a channel for each of `levels` (hPa; default all). mean, std: for normalisation, for each
    variable a number or one for each of its levels; or a file with arrays so named. placements: of
    a sample; sizes: of its shards. lead: in time steps; 0: samples have no "y".

    channels: names, as "geopotential@500". times: datetime64. latitude, longitude: degrees, as
    stored. bytes_read: by this rank so far. A sample is read without communication.
    """

    def __init__(
        self,
        where: Any,
        variables: Sequence[str],
        mesh: DeviceMesh,
        placements: Sequence[Placement],
        *,
        levels: Sequence[float] | None = None,
        mean: Mapping[str, Number] | str | None = None,
        std: Mapping[str, Number] | str | None = None,
        sizes: Mapping[int, Sequence[int]] | None = None,
        lead: int = 1,
    ) -> None:
        self.sources = {name: open_array(where, name) for name in variables}
        self.latitude, self.longitude = (_axis(where, d) for d in ("latitude", "longitude"))
        self.times = decoded_times(open_array(where, "time"))
        self.lead = lead
        self.channels: list[str] = []
        self._levels: dict[str, list[int]] = {}
        for name, source in self.sources.items():
            self._add(where, name, source, levels)
        shape = (len(self.channels), len(self.latitude), len(self.longitude))
        self.spec = Spec.of(mesh, placements, shape, sizes)
        if self.spec.dims[0].axes or self.spec.partial:
            raise ValueError(f"LatLon shards latitude and longitude, not {self.spec.placements}")
        self.mean = self._statistics(mean, 0.0)
        self.std = self._statistics(std, 1.0)

    def _add(self, where: Any, name: str, source: Source, levels: Sequence[float] | None) -> None:
        dims = source.dims or ()
        missing = {"time", "latitude", "longitude"} - set(dims)
        if missing or set(dims) - {"time", "level", "latitude", "longitude"}:
            raise ValueError(
                f"{source.name}: dims {dims}; expected time, [level,] latitude, longitude"
            )
        if "level" not in dims:
            self._levels[name] = []
            self.channels.append(name)
            return
        stored = [float(v) for v in _axis(where, "level")]
        wanted = stored if levels is None else [float(v) for v in levels]
        unknown = sorted(set(wanted) - set(stored))
        if unknown:
            raise ValueError(f"{name}: no levels {unknown}; there are {stored}")
        self._levels[name] = [stored.index(v) for v in wanted]
        self.channels += [f"{name}@{v:g}" for v in wanted]

    def __len__(self) -> int:
        return max(0, len(self.times) - self.lead)

    def __getitem__(self, i: int) -> dict[str, ShardTensor]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        sample = {"x": self.state(i)}
        if self.lead:
            sample["y"] = self.state(i + self.lead)
        return sample

    def state(self, time: int) -> ShardTensor:
        """The normalised channels at one time, float32 (C, latitude, longitude)."""
        blocks = [self._block(name, time) for name in self.sources]
        local = torch.cat(blocks).sub_(self.mean).div_(self.std)
        return placed(local, self.spec)

    def _block(self, name: str, time: int) -> Tensor:
        """(channels, latitude, longitude) of this rank, of one variable."""
        source, levels = self.sources[name], self._levels[name]
        rows = dict(time=(time, time + 1))
        for d, dim in enumerate(("latitude", "longitude"), 1):
            a = self.spec.offset[d]
            rows[dim] = (a, a + self.spec.local_shape[d])
        if levels:
            # one read, from the lowest wanted level to the highest
            rows["level"] = (min(levels), max(levels) + 1)
        dims = source.dims or ()
        block = torch.from_numpy(source.read([rows[d] for d in dims])).float()
        order = [dims.index(d) for d in ("time", "level", "latitude", "longitude") if d in dims]
        block = block.permute(order)[0]
        return block[[v - min(levels) for v in levels]] if levels else block[None]

    def coordinates(self) -> tuple[Tensor, Tensor]:
        """Degrees of this rank's (latitudes, longitudes), float32."""
        found = []
        for d, values in enumerate((self.latitude, self.longitude), 1):
            a = self.spec.offset[d]
            found.append(torch.from_numpy(values[a : a + self.spec.local_shape[d]].copy()).float())
        return found[0], found[1]

    def area_weights(self) -> Tensor:
        """Weights of all latitudes, float32 (latitude,), of mean 1: the area of a row of cells.

        sin of the upper minus sin of the lower border (WeatherBench 2, equation 1).
        """
        degrees = np.deg2rad(np.sort(self.latitude.astype(np.float64)))
        inner = (degrees[1:] + degrees[:-1]) / 2
        borders = np.concatenate([[-np.pi / 2], inner, [np.pi / 2]])
        weights = np.diff(np.sin(borders))
        weights = weights[np.argsort(np.argsort(self.latitude))]
        return torch.from_numpy(weights / weights.mean()).float()

    def denormalised(self, x: Tensor) -> Tensor:
        """A sample (..., C, latitude, longitude) in the units of the file."""
        return x * self.std + self.mean

    @property
    def bytes_read(self) -> int:
        return sum(s.bytes_wanted for s in self.sources.values())

    def _statistics(self, given: Mapping[str, Number] | str | None, default: float) -> Tensor:
        """(C, 1, 1)."""
        found: list[float] = []
        for name, levels in self._levels.items():
            if given is None:
                values = np.full(max(1, len(levels)), default)
            elif isinstance(given, Mapping):
                values = np.atleast_1d(np.asarray(given[name], dtype=np.float64))
            else:
                stored = open_array(given, name)
                values = np.atleast_1d(stored.read([(0, n) for n in stored.shape])).reshape(-1)
                values = values[levels] if levels and len(values) > 1 else values
            if len(values) not in (1, max(1, len(levels))):
                raise ValueError(f"{name}: {len(values)} statistics for {len(levels)} levels")
            found += np.broadcast_to(values, max(1, len(levels))).tolist()
        return torch.tensor(found, dtype=torch.float32).view(-1, 1, 1)


def _axis(where: Any, name: str) -> np.ndarray:
    source = open_array(where, name)
    return source.read([(0, n) for n in source.shape])


def decoded_times(source: Source) -> np.ndarray:
    """A time coordinate as datetime64[s], from CF's "<unit> since <date>" or decoded by xarray.

    Raises ValueError for other units than days, hours, minutes and seconds, other calendars than
    that of everyday life, dates before it, times of another zone than UTC and missing times.
    """
    if source.dtype.kind not in "iufM":
        raise ValueError(f"{source.name}: times of {source.dtype}; expected numbers or datetime64")
    values = source.read([(0, n) for n in source.shape])
    if np.isnat(values).any() if source.dtype.kind == "M" else np.isnan(values).any():
        raise ValueError(f"{source.name}: times are missing")
    if source.dtype.kind == "M":
        return values.astype("datetime64[s]")
    units = str(source.attrs.get("units", ""))
    calendar = str(source.attrs.get("calendar", "standard")).lower()
    found = re.fullmatch(_SINCE, units.strip(), re.IGNORECASE)
    if found is None:
        raise ValueError(f"{source.name}: units {units!r}; expected 'hours since 1959-01-01'")
    unit, year, month, day, hour, minute, second = found.groups()
    try:
        first = np.datetime64(f"{int(year):04}-{int(month):02}-{int(day):02}", "s")
    except ValueError as e:
        raise ValueError(f"{source.name}: units {units!r}: {e}") from e
    # before it, the standard calendar is the Julian one
    reformed = first >= np.datetime64("1582-10-15") or calendar == "proleptic_gregorian"
    if calendar not in ("standard", "gregorian", "proleptic_gregorian") or not reformed:
        raise ValueError(
            f"{source.name}: units {units!r} of the calendar {calendar!r} are not read"
        )
    seconds = {"day": 86400, "hour": 3600, "minute": 60, "second": 1}[unit.lower()]
    # integers of 32 bits would overflow
    since: np.ndarray = (
        values.astype(np.int64 if values.dtype.kind in "iu" else np.float64) * seconds
    )
    since = since + int(hour or 0) * 3600 + int(minute or 0) * 60 + float(second or 0)
    return first + np.round(since).astype("timedelta64[s]")


_SINCE = (
    r"(day|hour|minute|second)s? since (\d{1,4})-(\d{1,2})-(\d{1,2})"
    r"(?:[T ]+(\d{1,2}):(\d{1,2})(?::(\d{1,2}(?:\.\d*)?))?)? ?(?:Z|UTC|GMT|[+-]?00?:?00?)?"
)
