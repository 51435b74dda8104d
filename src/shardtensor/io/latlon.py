"""Weather on a latitude-longitude grid, as WeatherBench 2 publishes it, sample by sample.

Rasp et al. 2024 (arXiv 2308.15560): Zarr stores with dims time, level, latitude and longitude, the
last two in either order, latitudes ascending or descending; float32; one array for each variable,
with a level dim for those of the atmosphere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import comm
from ..caller import described
from ..later import dt
from ..spec import Dim, Spec, axes_in
from ..tensor import ShardTensor
from .block import placed
from .chunks import Cut, heed
from .failing import reason
from .source import Source, open_array
from .where import several

Number = float | Sequence[float]


# names of dims in stores of others
NAMES = {
    "time": ("time", "valid_time"),
    "level": ("level", "pressure_level", "isobaricInhPa", "plev", "lev"),
    "latitude": ("latitude", "lat"),
    "longitude": ("longitude", "lon"),
}


class LatLon:
    """Samples {"x": state at time i, "y": state at time i + lead}, each (C, latitude, longitude).

    where: what `open_array` takes, in the schema above, under any of `NAMES`. variables: names; a
    variable with levels gives a channel for each of `levels` (hPa; default all). mean, std: for
    normalisation, for each variable a number or one for each of its levels; or a file with arrays
    so named; `statistics` finds them. placements: of a sample; sizes: of its shards.

    lead: in time steps; 0: samples have no "y"; several: "y" is a list. history: how many states,
    the last at time i, make up "x", oldest first. forcings: variables that "x" has at its end, at
    time i, and "y" has not; those without time are the same in all. times: which time steps are
    there, a slice or indices; lead and history count these. fill: what is put for NaN, after
    normalisation.

    channels: names, as "geopotential@500"; of one state, forcings not among them. times:
    datetime64. latitude, longitude: degrees, as stored. bytes_read: by this rank so far. A sample
    is read without communication. Raises ValueError for variables, times and units that are not
    in the schema, a history below 1, a lead below 0, a std that is not above 0, and placements that
    shard the channels.
    """

    fill: float | None
    forcings: tuple[str, ...]
    history: int
    latitude: np.ndarray[Any, Any]
    lead: int | Sequence[int]
    longitude: np.ndarray[Any, Any]
    mean: Tensor
    sources: dict[str, Source]
    spec: Spec
    std: Tensor
    times: np.ndarray[Any, Any]
    variables: tuple[str, ...]

    def __init__(
        self,
        where: Any,
        variables: Sequence[str],
        mesh: DeviceMesh,
        placements: Sequence[dt.Placement],
        *,
        levels: Sequence[float] | None = None,
        mean: Mapping[str, Number] | str | None = None,
        std: Mapping[str, Number] | str | None = None,
        sizes: Mapping[int, Sequence[int]] | None = None,
        lead: int | Sequence[int] = 1,
        history: int = 1,
        forcings: Sequence[str] = (),
        times: slice | Sequence[int] | None = None,
        fill: float | None = None,
    ) -> None:
        self.variables = several(variables, "variables")
        self.forcings = several(forcings, "forcings")
        if not self.variables:
            raise ValueError("LatLon of no variables: give the names of some")
        names = dict.fromkeys((*self.variables, *self.forcings))
        self.sources = {name: open_array(where, name) for name in names}
        known = [d for s in self.sources.values() for d in s.dims or ()]
        # the store's name of each dim
        self._named = {d: next((n for n in also if n in known), d) for d, also in NAMES.items()}
        self.latitude, self.longitude = (
            _axis(where, self._named[d]) for d in ("latitude", "longitude")
        )
        every = decoded_times(open_array(where, self._named["time"]))
        self._steps = np.arange(len(every))[slice(None) if times is None else times]
        self.times = every[self._steps]
        self.lead, self.history, self.fill = lead, index(history), fill
        self._leads = [index(v) for v in np.atleast_1d(np.asarray(lead, object))]
        if history < 1 or not self._leads or min(self._leads) < 0:
            raise ValueError(f"history {history}, lead {lead}: at least 1, and none before 0")
        self.channels: list[str] = []
        self._levels: dict[str, list[int]] = {}
        for name, source in self.sources.items():
            found = self._add(where, name, source, levels)
            self.channels += found if name in self.variables else []
        shape = (len(self.channels), len(self.latitude), len(self.longitude))
        self.spec = Spec.of(mesh, placements, shape, sizes)
        if self.spec.dims[0].axes or self.spec.partial:
            raise ValueError(f"LatLon shards latitude and longitude, not {self.spec.placements}")
        self.mean = self._statistics(mean, 0.0, self.variables)
        self.std = self._statistics(std, 1.0, self.variables)
        self._forced = [self._statistics(g, d, self.forcings) for g, d in ((mean, 0.0), (std, 1.0))]
        for of, by in ((self.variables, self.std), (self.forcings, self._forced[1])):
            owners = [n for n in of for _ in range(max(1, len(self._levels[n])))]
            wrong = {n: s for n, s in zip(owners, by.flatten().tolist(), strict=True) if not s > 0}
            if wrong:
                raise ValueError(f"std {wrong}, by which is divided: give 1 for what is constant")

    def _add(
        self, where: Any, name: str, source: Source, levels: Sequence[float] | None
    ) -> list[str]:
        """The channels of a variable."""
        dims = source.dims or ()
        needed = {self._named[d] for d in ("latitude", "longitude")}
        if name in self.variables:
            needed.add(self._named["time"])
        if needed - set(dims) or set(dims) - set(self._named.values()):
            raise ValueError(
                f"{source.name}: dims {dims}; expected time, [level,] latitude, longitude; "
                "without time only among forcings"
            )
        if self._named["level"] not in dims:
            self._levels[name] = []
            return [name]
        stored = [float(v) for v in _axis(where, self._named["level"])]
        wanted = stored if levels is None else [float(v) for v in levels]
        unknown = sorted(set(wanted) - set(stored))
        if unknown or not wanted:
            raise ValueError(f"{name}: no levels {unknown or 'at all'}; there are {stored}")
        self._levels[name] = [stored.index(v) for v in wanted]
        return [f"{name}@{v:g}" for v in wanted]

    def __len__(self) -> int:
        return max(0, len(self.times) - max(self._leads) - self.history + 1)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        now = i + self.history - 1
        states = [self._state(t) for t in range(i, now + 1)]
        if self.forcings:
            states.append(self._read(self.forcings, now, *self._forced))
        local = torch.cat(states)
        channels = Dim(local.shape[0])
        sample: dict[str, Any] = {"x": placed(local, self.spec.replace({0: channels}))}
        targets = [self.state(now + lead) for lead in self._leads if lead or len(self._leads) > 1]
        if targets:
            sample["y"] = targets if np.ndim(self.lead) else targets[0]
        return sample

    def state(self, time: int) -> ShardTensor:
        """The normalised channels at one time, float32 (C, latitude, longitude)."""
        return placed(self._state(time), self.spec)

    def recut(self, sizes: Mapping[int, Sequence[int]]) -> None:
        """Give samples in shards of other sizes from now on; every rank calls it.

        What a Loader has read ahead keeps its cut: call it between epochs, or after a `break`.
        """
        spec = self.spec
        self.spec = Spec.of(spec.mesh, spec.placements, spec.shape, {**spec.sizes, **sizes})

    def _state(self, time: int) -> Tensor:
        return self._read(self.variables, time, self.mean, self.std)

    def _read(self, names: Sequence[str], time: int, mean: Tensor, std: Tensor) -> Tensor:
        """This rank's part of some variables, normalised."""
        local = torch.cat([self._block(name, time) for name in names]).sub_(mean).div_(std)
        return local if self.fill is None else local.nan_to_num_(self.fill, torch.inf, -torch.inf)

    def _block(self, name: str, time: int) -> Tensor:
        """(channels, latitude, longitude) of this rank, of one variable."""
        source, levels = self.sources[name], self._levels[name]
        step = int(self._steps[time])
        rows = {self._named["time"]: (step, step + 1)}
        for d, dim in enumerate(("latitude", "longitude"), 1):
            a = self.spec.offset[d]
            rows[self._named[dim]] = (a, a + self.spec.local_shape[d])
        if levels:
            # one read, from the lowest wanted level to the highest
            rows[self._named["level"]] = (min(levels), max(levels) + 1)
        dims = source.dims or ()
        ranges = [rows[d] for d in dims]
        block = torch.from_numpy(source.read(ranges)).float()
        cuts = {
            d: Cut(dims.index(self._named[dim]), (0, self.spec.shape[d]), self.spec.dims[d].sizes)
            for d, dim in enumerate(("latitude", "longitude"), 1)
            if self.spec.dims[d].axes
        }
        heed(source.name, source.shape, source.chunks, source.item, ranges, cuts)
        order = [dims.index(d) for d in self._named.values() if d in dims]
        block = block.permute(order)
        block = block[0] if self._named["time"] in dims else block
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

        sin of the upper minus sin of the lower border (WeatherBench 2, equation 1). The outermost
        rows of a globe end at the poles, those of a region half a row farther out.
        """
        degrees = np.sort(self.latitude.astype(np.float64))
        inner = (degrees[1:] + degrees[:-1]) / 2
        ends = [-90.0, 90.0]
        for i, beside in ((0, 1), (-1, -2)) if len(degrees) > 1 else ():
            row = abs(degrees[beside] - degrees[i])
            if abs(ends[i] - degrees[i]) > 1.01 * row:
                ends[i] = degrees[i] + np.sign(ends[i]) * row / 2
        weights = np.diff(np.sin(np.deg2rad([ends[0], *inner, ends[1]])))
        weights = weights[np.argsort(np.argsort(self.latitude))]
        return torch.from_numpy(weights / weights.mean()).float()

    def denormalised(self, x: Tensor) -> Tensor:
        """A sample (..., C, latitude, longitude) in the units of the file."""
        return x * self.std + self.mean

    @property
    def bytes_read(self) -> int:
        """Bytes that this rank has asked of the store."""
        return sum(s.bytes_wanted for s in self.sources.values())

    def statistics(
        self, names: Sequence[str] | None = None, times: slice | Sequence[int] | None = None
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """(mean, std) of each variable's channels over area and time, as `mean` and `std` take.

        names: variables and forcings, default the variables. Each rank reads its own part, of
        `times` (default all); NaN does not count. Collective: one
        all-reduce over the ranks that share a sample. In the units of the file. Raises ValueError
        for names that are not read, and on all ranks where one cannot read its part.
        """
        names = self.variables if names is None else several(names, "names")
        if set(names) - set(self.sources):
            raise ValueError(f"statistics of {names}: there are {tuple(self.sources)}")
        weights = self.area_weights()[slice(*self.spec.spans[1])].double()[None, :, None]
        sums = torch.zeros(3, sum(max(1, len(self._levels[n])) for n in names), dtype=torch.float64)
        error: Exception | None = None
        try:
            for time in np.arange(len(self.times))[slice(None) if times is None else times]:
                block = torch.cat([self._block(name, time) for name in names]).double()
                good = block.isfinite()
                w, block = weights * good, block.where(good, 0.0)
                sums += torch.stack([w, w * block, w * block * block]).sum((-2, -1))
        except Exception as e:
            error = e
        axes = axes_in(self.spec.dims)
        device = self.spec.mesh.device_type
        # whether a rank failed travels with its sums
        sent = torch.cat([sums.view(-1), sums.new_tensor([float(error is not None)])]).to(device)
        group = comm.group(self.spec.mesh, axes)
        sent = comm.reduce(sent, group).cpu()
        if sent[-1]:
            why = reason("" if error is None else described(error), device, group)
            raise error or RuntimeError(f"another rank could not read its part of the data: {why}")
        total = sent[:-1].view_as(sums)
        mean = total[1] / total[0]
        std = (total[2] / total[0] - mean * mean).clamp(min=0).sqrt()
        sizes = [max(1, len(self._levels[n])) for n in names]
        found = [
            {n: v.tolist() for n, v in zip(names, x.split(sizes), strict=True)} for x in (mean, std)
        ]
        return found[0], found[1]

    def _statistics(
        self, given: Mapping[str, Number] | str | None, default: float, names: Sequence[str]
    ) -> Tensor:
        """(C, 1, 1)."""
        found: list[float] = []
        for name in names:
            levels = self._levels[name]
            if given is None or (
                name not in self.variables and isinstance(given, Mapping) and name not in given
            ):
                values = np.full(max(1, len(levels)), default)
            elif isinstance(given, Mapping):
                if name not in given:
                    raise ValueError(f"mean and std of {name} are missing; there are {[*given]}")
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
    return _of_dim(open_array(where, name))


def _of_dim(source: Source) -> np.ndarray:
    if len(source.shape) != 1:
        raise ValueError(
            f"{source.name}: a coordinate of shape {source.shape} is none of a dim; keep a single "
            "row's dim, as .isel(time=[0]) does"
        )
    return source.read([(0, n) for n in source.shape])


def decoded_times(source: Source) -> np.ndarray:
    """A time coordinate as datetime64[s], from CF's "<unit> since <date>" or decoded by xarray.

    Raises ValueError for other units than days, hours, minutes and seconds, other calendars than
    that of everyday life, dates before it, times of another zone than UTC and missing times.
    """
    if source.dtype.kind not in "iufM":
        raise ValueError(f"{source.name}: times of {source.dtype}; expected numbers or datetime64")
    values = _of_dim(source)
    if np.isnat(values).any() if source.dtype.kind == "M" else np.isnan(values).any():
        raise ValueError(f"{source.name}: times are missing")
    if source.dtype.kind == "M":
        # what was decoded from floats is a little off
        return (values + np.timedelta64(500, "ms")).astype("datetime64[s]")
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
