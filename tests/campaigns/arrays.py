"""Arrays of random formats, chunks and CF attributes, read and written by blocks: against xarray and zarr."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import netCDF4
import numpy as np
import torch
import xarray as xr
import zarr
from torch.distributed.tensor import Replicate, Shard

from shardtensor import distribute_tensor, io
from shardtensor.tensor import wrap

FORMATS = ("zarr 2", "zarr 3", "netcdf 4", "netcdf 3")
INTEGERS = ("i1", "u1", "i2", "u2", "i4", "u4", "i8")
OLD = ("i1", "i2", "i4", "f4", "f8")  # what NetCDF 3 has
DIMS = ("time", "y", "x")


def draw(rng: random.Random) -> Any:
    mesh = rng.choice([(1,), (2,), (3,), (4,), (2, 2), (1, 3)])
    shape = tuple(rng.choice([1, 2, 3, 5, 8, 11]) for _ in range(rng.randint(1, 3)))
    chunks = tuple(rng.randint(1, n) for n in shape)
    placements, sizes = _cut(rng, mesh, shape)
    if rng.random() < 0.3:
        return _write(rng, mesh, shape, chunks, placements, sizes)
    form = rng.choice(FORMATS)
    dtype = rng.choice(OLD if form == "netcdf 3" else (*INTEGERS, "f4", "f8", ">f4", ">i2"))
    if form.startswith("zarr") and rng.random() < 0.15:
        dtype = rng.choice(["f2", "?", "c8"])
    index = {d: _rows(rng, n) for d, n in enumerate(shape) if rng.random() < 0.25}
    kept = [n if d not in index else len(range(n)[index[d]]) for d, n in enumerate(shape)
            if not isinstance(index.get(d), int)]  # fmt: skip
    if index:
        placements, sizes = _cut(rng, mesh, kept)
    return Read(
        mesh, form, dtype, shape, chunks if rng.random() < 0.8 else None,
        rng.random() < 0.3, _attributes(rng, np.dtype(dtype)), index,
        rng.choice(["path", "path", "dataset", "selected"]), tuple(placements), sizes,
        rng.randrange(10**6),
    )  # fmt: skip


def _cut(rng: random.Random, mesh: tuple[int, ...], shape: Any) -> tuple[list[Any], Any]:
    """Placements, and sizes of shards of which some are empty."""
    placements = [
        Shard(rng.randrange(len(shape))) if shape and rng.random() < 0.8 else Replicate()
        for _ in mesh
    ]
    sizes = {}
    for d, n in enumerate(shape):
        parts = int(
            np.prod([m for m, p in zip(mesh, placements, strict=True) if p == Shard(d)], dtype=int)
        )
        if parts > 1 and rng.random() < 0.7:
            ends = sorted(rng.randint(0, n) for _ in range(parts - 1))
            sizes[d] = tuple(np.diff([0, *ends, n]).tolist())
    return placements, sizes or None


def _rows(rng: random.Random, n: int) -> int | slice:
    if rng.random() < 0.5:
        return rng.randrange(-n, n)
    a = rng.randint(0, n)
    return slice(a, rng.randint(a, n))


def _attributes(rng: random.Random, dtype: np.dtype) -> dict[str, Any]:
    """CF attributes as they are stored, of the types that CF wants."""
    found: dict[str, Any] = {}
    if dtype.kind == "b":
        return found
    special = [-9, 7] if dtype.kind in "ifc" else [3, 7]
    kind = dtype.newbyteorder("=").type
    if rng.random() < 0.45:
        found["_FillValue"] = kind(rng.choice(special))
        if dtype.kind == "f" and rng.random() < 0.3:
            found["_FillValue"] = kind("nan")
    if rng.random() < 0.3:
        found["missing_value"] = kind(rng.choice(special))
        if rng.random() < 0.2:
            found["missing_value"] = np.array([5, special[0]], dtype)
    scaling = np.float64 if rng.random() < 0.7 else np.float32
    if dtype.kind in "iuf" and rng.random() < 0.4:
        found["scale_factor"] = scaling(rng.choice([0.5, 0.01, 3.0]))
    if dtype.kind in "iuf" and rng.random() < 0.3:
        found["add_offset"] = scaling(rng.choice([1.0, -273.15, 1e6]))
    # xarray takes the bytes of a swapped fill value as they lie
    if dtype.kind in "iu" and dtype.isnative and rng.random() < 0.25:
        found["_Unsigned"] = rng.choice(["true", "false"])
    if rng.random() < 0.2:
        found["valid_range"] = np.array([1, 6], dtype)
    if rng.random() < 0.2:
        found["units"] = rng.choice(["K", "days", "hours since 2000-01-01"])
    return found


class _Folder:
    """A folder that goes with its case."""

    def __init__(self) -> None:
        self.held: Any = None

    def __repr__(self) -> str:
        return "folder()"

    def path(self, name: str) -> Path:
        if self.held is None:
            self.held = tempfile.TemporaryDirectory(prefix="arrays")
        return Path(self.held.name) / name


@dataclass
class Read:
    """An array in a file, and the cut by which it is read."""

    mesh: tuple[int, ...]
    form: str
    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...] | None
    shards: bool
    attrs: dict[str, Any]
    index: dict[int, int | slice]
    where: str
    placements: tuple[Any, ...]
    sizes: Any
    seed: int
    folder: _Folder = field(default_factory=_Folder)
    # float32 where xarray has float64, where that tells all values apart
    rtol: float = 1e-6
    atol: float = 1e-6

    def serial(self) -> Any:
        path = self.folder.path("a.zarr" if "zarr" in self.form else "a.nc")
        self._make(path)
        with self._opened(path) as data:
            values = data["t"].values[
                tuple(self.index.get(d, slice(None)) for d in range(len(self.shape)))
            ]
        return _wide(torch.from_numpy(np.array(values)))

    def sharded(self, mesh: Any) -> Any:
        path = self.folder.path("a.zarr" if "zarr" in self.form else "a.nc")
        index: Any = {DIMS[d] if self.seed % 2 else d: v for d, v in self.index.items()}
        if self.where == "path":
            source = io.open_array(path, "t")
        else:
            with self._opened(path) as data:
                if self.where == "selected":
                    picked = data["t"].isel({DIMS[d]: v for d, v in self.index.items()})
                    index, source = {}, io.open_array(picked)
                else:
                    source = io.open_array(data, "t")
                x = io.read(source, mesh, self.placements, index=index, sizes=self.sizes)
                return wrap(_wide(x.to_local()), x.spec)
        x = io.read(source, mesh, self.placements, index=index, sizes=self.sizes)
        return wrap(_wide(x.to_local()), x.spec)

    def _opened(self, path: Path) -> Any:
        engine = "zarr" if "zarr" in self.form else "netcdf4"
        more = {"consolidated": False} if engine == "zarr" else {}
        return xr.open_dataset(path, engine=engine, decode_times=False, **more)

    def _stored(self) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        low = 0 if np.dtype(self.dtype).kind in "ub" else -12
        return rng.integers(low, 13, self.shape).astype(self.dtype)

    def _make(self, path: Path) -> None:
        if "zarr" in self.form:
            self._make_zarr(path)
            return
        with netCDF4.Dataset(
            path, "w", format="NETCDF4" if "4" in self.form else "NETCDF3_CLASSIC"
        ) as f:
            for name, n in zip(DIMS, self.shape, strict=False):
                f.createDimension(name, n)
            attrs = dict(self.attrs)
            made = f.createVariable(
                "t", self.dtype, DIMS[: len(self.shape)], fill_value=attrs.pop("_FillValue", None),
                **({"chunksizes": self.chunks, "zlib": True} if "4" in self.form and self.chunks else {}),
            )  # fmt: skip
            made.set_auto_maskandscale(False)
            for k, v in attrs.items():
                made.setncattr(k, v)
            made[...] = self._stored()

    def _make_zarr(self, path: Path) -> None:
        version = int(self.form[-1])
        attrs = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in self.attrs.items()}
        attrs = {k: _json(v) for k, v in attrs.items()}
        more: dict[str, Any] = {"fill_value": None} if version == 2 else {}
        names = DIMS[: len(self.shape)]
        if version == 2:
            attrs["_ARRAY_DIMENSIONS"] = list(names)
            if "_FillValue" in attrs:
                more["fill_value"] = self.attrs["_FillValue"]
                del attrs["_FillValue"]
        else:
            more["dimension_names"] = names
            if "_FillValue" in attrs:
                encode = xr.backends.zarr.FillValueCoder.encode
                attrs["_FillValue"] = encode(self.attrs["_FillValue"].item(), np.dtype(self.dtype))
        chunks = self.chunks or self.shape
        if version == 3 and self.shards:
            more["shards"] = tuple(c * 2 for c in chunks)
        group = zarr.open_group(str(path), mode="w", zarr_format=version)
        array = group.create_array("t", shape=self.shape, chunks=chunks, dtype=self.dtype, **more)
        array.attrs.update(attrs)
        array[...] = self._stored()


def _json(value: Any) -> Any:
    if isinstance(value, list):
        return [_json(v) for v in value]
    return value.real if isinstance(value, complex) else value


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def _write(
    rng: random.Random, mesh: Any, shape: Any, chunks: Any, placements: Any, sizes: Any
) -> Write:
    """Writes into a new array, into one that is there, of steps, in shards."""
    version = rng.choice([2, 3])
    there = rng.random() < 0.6
    shards = version == 3 and there and rng.random() < 0.7
    return Write(
        mesh, shape, chunks, rng.choice(["float32", "float64", "int16", "bfloat16"]), version, there,
        tuple(c * rng.randint(1, 3) for c in chunks) if shards else None,
        [rng.randint(0, 4) for _ in range(3)] if rng.random() < 0.5 else None,
        rng.choice([1, 1, 2]), tuple(placements), sizes,
    )  # fmt: skip


@dataclass
class Write:
    """Tensors written one after the other, at `steps` or each over the last."""

    mesh: tuple[int, ...]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    version: int
    there: bool
    shards: tuple[int, ...] | None
    steps: list[int] | None
    lead: int
    placements: tuple[Any, ...]
    sizes: Any
    folder: _Folder = field(default_factory=_Folder)

    def _values(self, i: int) -> torch.Tensor:
        n = int(np.prod(self.shape))
        return (torch.arange(n).reshape(self.shape) + 100 * i).to(getattr(torch, self.dtype))

    def serial(self) -> Any:
        if self.there:
            group = zarr.open_group(
                str(self.folder.path("w.zarr")), mode="w", zarr_format=self.version
            )
            lead, more = (), {}
            if self.steps is not None:
                lead = (self.lead,)
            if self.shards:
                more["shards"] = (*(n * 2 for n in lead), *self.shards)
            group.create_array(
                "t", shape=(*(0 for _ in lead), *self.shape), chunks=(*lead, *self.chunks),
                dtype=str(self._values(0)[..., :0].float().numpy().dtype) if self.dtype == "bfloat16"
                else self.dtype, **more,
            )  # fmt: skip
        if self.steps is None:
            return self._values(2).double()
        found = torch.zeros(max(self.steps) + 1, *self.shape, dtype=torch.float64)
        for i, step in enumerate(self.steps):
            found[step] = self._values(i)
        return found

    def sharded(self, mesh: Any) -> Any:
        url = str(self.folder.path("w.zarr"))
        for i, step in enumerate(self.steps or [None, None, None]):
            x = distribute_tensor(self._values(i), mesh, self.placements, sizes=self.sizes)
            chunks = None if self.there else self.chunks
            io.write_zarr(x, url, "t", step=step, chunks=chunks, zarr_format=self.version)
        return torch.from_numpy(zarr.open_group(url, mode="r")["t"][...]).double()
