"""Arrays in files, of which any block can be read: Zarr, HDF5, NetCDF, NumPy, xarray."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from os import PathLike, fspath
from typing import Any

import numpy as np

from .cf import Packing, packing
from .chunks import covered
from .collate import as_torch_takes
from .foreign import member, named, refuse_pickles, zarr_store
from .where import ending, has_magic, is_store, is_url, local_file, need, only

Range = tuple[int, int]


@dataclass(eq=False)
class Source:
    """One array that is read block by block.

    dims: names of its dims where it has any. chunks: what storage reads at once; None where any
    rows can be read alone. dtype: of what `read` gives. bytes_wanted, bytes_touched: of the blocks
    read so far and of all the chunks that they meet (uncompressed). packing: how stored numbers
    become values. origin: what `open_array` makes the same source of: another process, forked or
    sent a pickle of this one, opens it again. Reading may go on in several threads.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...] | None
    dims: tuple[str, ...] | None
    attrs: Mapping[str, Any]
    fetch: Callable[[tuple[slice, ...]], Any] = field(repr=False)
    item: int = 0
    bytes_wanted: int = 0
    bytes_touched: int = 0
    packing: Packing | None = None
    origin: tuple[Any, str | None] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.item = self.item or self.dtype.itemsize
        self._lock = threading.Lock()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in vars(self).items() if k not in ("_lock", "_process")}
        if self.origin is not None:
            del state["fetch"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._open()

    def _open(self) -> None:
        if self.origin is not None:
            self.fetch = open_array(*self.origin).fetch
            _OPEN.add(self)

    def read(self, ranges: Sequence[Range]) -> np.ndarray:
        """The block of these (start, stop), one for each dim, in native byte order.

        Raises IndexError for a range outside of the array, ValueError for a file that gives another
        block than its header says. Nothing is sent.
        """
        if len(ranges) != len(self.shape):
            raise IndexError(f"{self.name}: {len(ranges)} ranges for {len(self.shape)} dims")
        for (a, b), n in zip(ranges, self.shape, strict=True):
            if not 0 <= a <= b <= n:
                raise IndexError(f"{self.name}: rows {a} to {b} of a dim of size {n}")
        shape = [b - a for a, b in ranges]
        if not prod(shape):
            return np.zeros(shape, self.dtype)
        if self._process != os.getpid():
            # forked: handles of files, and a lock that another thread may have held
            _let_go(os.getpid())
            self.__setstate__(self.__getstate__())
        with self._lock:
            self.bytes_wanted += prod(shape) * self.item
            self.bytes_touched += self.touched(ranges)
        with named(self.name):
            block = np.asarray(self.fetch(tuple(slice(a, b) for a, b in ranges)))
            if list(block.shape) != shape:
                raise ValueError(f"rows {list(ranges)} are a block of {block.shape}")
            found = block if self.packing is None else self.packing.decode(block)
            return as_torch_takes(found, self.dtype)

    def touched(self, ranges: Sequence[Range]) -> int:
        """Bytes (uncompressed) of the chunks that a block meets."""
        chunks = self.chunks or (1,) * len(self.shape)
        return prod(covered(self.shape, chunks, ranges)) * self.item

    def dim(self, name: str | int) -> int:
        """The number of a dim. Raises ValueError for a name or number that it does not have."""
        if isinstance(name, str):
            if name not in (self.dims or ()):
                raise ValueError(f"{self.name} has no dim {name!r}; its dims are {self.dims}")
            return (self.dims or ()).index(name)
        if type(name) is bool or not hasattr(name, "__index__"):
            raise ValueError(f"{self.name}: {name!r} is no dim; give its name or number")
        if not -len(self.shape) <= name < len(self.shape):
            raise ValueError(f"{self.name} has no dim {name}; its shape is {self.shape}")
        return name % len(self.shape)


def open_array(where: Any, variable: str | None = None) -> Source:
    """An array to read from.

    where: the path or fsspec URL of a .npy file, of a Zarr store (v2 or v3; kerchunk's references,
    too), an HDF5 or a NetCDF file (3 or 4); or an xarray DataArray or Dataset, lazily opened or
    selected or not, a store of Zarr (icechunk's, too), a Zarr or h5py group or array, a NumPy
    array. variable: the name within a store or file; it may be left out where there is one array
    only. Packed and masked numbers of NetCDF and of xarray's Zarr are decoded as by
    xarray.open_dataset, times are not: see `cf`. Pickles are never loaded. The
    source can be sent to other processes, that of an open h5py file only where it has a path.
    Raises ValueError where the variable is missing, FileNotFoundError where the file is,
    ImportError that names the extra where the library is not installed, TypeError for what
    cannot be opened, ValueError that names the file for one that is damaged or leads to others.
    """
    if variable is not None and not isinstance(variable, str):
        raise TypeError(f"variable {variable!r}: give the name of an array")
    if isinstance(where, np.ma.MaskedArray):
        raise TypeError("open_array of a masked array: give x.filled(...), of floats with NaN")
    if isinstance(where, np.ndarray):
        only("array", "", variable)
        return _plain(where, "array", where)
    kind = type(where).__module__.split(".")[0]
    if kind == "xarray":
        return _xarray(where, variable)
    if is_store(where):
        # icechunk's, for instance
        return _member(need("zarr").open(where, mode="r"), variable, "zarr")
    if kind in ("zarr", "h5py"):
        return _member(where, variable, kind)
    if not isinstance(where, str | PathLike):
        raise TypeError(f"open_array of a {type(where).__name__}: give a path, a URL or an array")
    url = fspath(where)
    bare = ending(url)
    with named(url):
        if bare.endswith(".npy"):
            only(url, "", variable)
            return _npy(url)
        if bare.endswith((".h5", ".hdf5", ".nc", ".nc4", ".cdf", ".he5")) or has_magic(url):
            found = _file(url, variable)
        else:
            zarr = need("zarr")
            found = _member(zarr.open(zarr_store(zarr, url), mode="r"), variable, "zarr")
    found.origin = (url, variable)
    return found


def numbers(dtype: np.dtype) -> bool:
    """Whether torch has numbers of that dtype; it has none of more than 64 bits a part."""
    return dtype.kind in "biufc" and dtype.itemsize <= (16 if dtype.kind == "c" else 8)


def _plain(x: Any, name: str, origin: Any) -> Source:
    if not numbers(x.dtype):
        raise ValueError(f"{name}: {x.dtype} is not a dtype of numbers")
    return Source(
        name, x.shape, x.dtype.newbyteorder("="), None, None, {}, x.__getitem__,
        origin=(origin, None),
    )  # fmt: skip


def _npy(url: str) -> Source:
    """An array of NumPy: mapped where it is a file, by ranges of rows where it is a URL."""
    if not is_url(url):
        return _plain(np.load(url, mmap_mode="r", allow_pickle=False), url, url)
    opener = need("fsspec").open(url, "rb")
    with opener as f:
        version = np.lib.format.read_magic(f)
        read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        shape, fortran, dtype = read[version[0]](f)
        start = f.tell()
    if not numbers(dtype):
        raise ValueError(f"{url}: {dtype} is not a dtype of numbers")
    if fortran or min(shape, default=0) < 0:
        raise ValueError(f"{url}: {shape}, of which only arrays in C order can be read in part")
    row = prod(shape[1:]) * dtype.itemsize

    def fetch(block: tuple[slice, ...]) -> np.ndarray:
        first, *others = block
        with opener as f:
            f.seek(start + first.start * row)
            data = f.read((first.stop - first.start) * row)
        rows = np.frombuffer(data, dtype).reshape(-1, *shape[1:])
        return rows[(slice(None), *others)]

    # whole rows of the first dim are read
    chunks = (1, *shape[1:])
    return Source(url, shape, dtype.newbyteorder("="), chunks, None, {}, fetch, origin=(url, None))


def _file(url: str, variable: str | None) -> Source:
    opener = need("fsspec").open(url, "rb").open() if is_url(url) else open(url, "rb")  # noqa: SIM115
    magic = opener.read(4)
    opener.seek(0)
    if magic[:3] == b"CDF":
        opener.close()
        return _netcdf3(local_file(url), variable)
    if not is_url(url):
        opener.close()
        opener = url
    found = _member(need("h5py").File(opener, "r"), variable, "h5py")
    _OPEN.add(found)
    return found


_OPEN: weakref.WeakSet[Source] = weakref.WeakSet()


@atexit.register
def _close() -> None:
    """HDF5 closes files after Python has ended; a file of fsspec is read by Python."""
    for source in list(_OPEN):
        file = getattr(getattr(source.fetch, "__self__", None), "file", None)
        if file:  # an open file of h5py
            file.close()


def _netcdf3(url: str, variable: str | None) -> Source:
    data = need("netCDF4").Dataset(url)
    data.set_auto_maskandscale(False)
    found = data.variables[_chosen(url, list(data.variables), variable)]
    attrs = {k: found.getncattr(k) for k in found.ncattrs()}
    return _of(f"{url}: {found.name}", found, found.dimensions, attrs, None)


def _member(where: Any, variable: str | None, kind: str) -> Source:
    """An array of a Zarr or HDF5 group, or the array itself."""
    name = getattr(where, "filename", None) or str(getattr(where, "store_path", where.name))
    if hasattr(where, "dtype"):
        only(name, str(where.name), variable)
    else:
        arrays = _names(where)
        chosen = _chosen(name, arrays, variable)
        where = member(where, chosen, name) if kind == "h5py" else where[chosen]
        name = f"{name}: {chosen}"
    attrs = {k: _value(v) for k, v in dict(where.attrs).items() if k not in _SCALES}
    if kind == "h5py":
        origin = (where.file.filename, where.name) if os.path.isfile(where.file.filename) else None
        if where.external or where.is_virtual:
            # opened by the caller; by its path it would be refused
            origin = None
    else:
        refuse_pickles(where, name)
        origin = (where, None)
        # where xarray writes the dims of Zarr 2, the array's fill value is its _FillValue; other
        # Zarr says with it only what chunks hold that were never written
        masked = "_ARRAY_DIMENSIONS" in attrs and where.metadata.zarr_format == 2
        if masked and where.fill_value is not None:
            attrs["_FillValue"] = where.fill_value
    found = _of(name, where, dims_of(where, kind), attrs, where.chunks)
    found.origin = origin
    return found


# HDF5's own bookkeeping of dims: references, not values
_SCALES = {"DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME", "_Netcdf4Dimid"}


def _of(
    name: str,
    array: Any,
    dims: Sequence[str] | None,
    attrs: Mapping[str, Any],
    chunks: Sequence[int] | None,
) -> Source:
    """The source of an array of any library: dtype, shape, dims and CF attributes."""
    stored = np.dtype(array.dtype)
    if not numbers(stored):
        raise ValueError(f"{name}: {stored} is not a dtype of numbers")
    if array.shape is None:
        raise ValueError(f"{name}: it has no values, not even a shape")
    packed = packing(stored, attrs, name)
    shape = tuple(int(n) for n in array.shape)
    found = tuple(chunks) if chunks else None
    if min(shape, default=0) < 0 or (found and min(found) < 1):
        raise ValueError(f"{name}: a shape of {shape} in chunks of {found}")
    return Source(
        name, shape, packed.dtype, found, tuple(dims) if dims else None, attrs, array.__getitem__,
        stored.itemsize, packing=packed,
    )  # fmt: skip


def _names(group: Any) -> list[str]:
    found: list[str] = []
    if hasattr(group, "arrays"):
        return [name for name, _ in group.arrays()]
    group.visititems(lambda name, x: found.append(name) if _is_variable(x) else None)
    return found


def _is_variable(x: Any) -> bool:
    """Whether it is an array, and more than the length of a dim of NetCDF 4."""
    length = b"This is a netCDF dimension but not a netCDF variable"
    return hasattr(x, "dtype") and not bytes(x.attrs.get("NAME", b"")).startswith(length)


_HIDDEN = "_nc4_non_coord_"


def _chosen(where: str, names: list[str], variable: str | None) -> str:
    if variable is None and len(names) == 1:
        return names[0]
    plain = None if variable is None else variable.strip("/")
    group, _, last = (plain or "").rpartition("/")
    # so NetCDF 4 calls what has a dim's name and is no coordinate
    hidden = f"{group}/{_HIDDEN}{last}".lstrip("/")
    if hidden in names:
        return hidden
    if plain in names or (plain and "/" in plain):
        return plain
    there = ", ".join(sorted(n.replace(_HIDDEN, "") for n in names))
    raise ValueError(f"{where}: variable {variable!r}; there are {there}")


def dims_of(array: Any, kind: str) -> Sequence[str] | None:
    if kind == "h5py":
        names = [_scale(d) for d in array.dims]
        return names if all(names) else None
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    return names if names and all(names) else None


def _scale(dim: Any) -> str:
    """The name of an HDF5 dim: its label, or that of its scale, as NetCDF 4 has it."""
    return dim.label or (dim[0].name.rsplit("/", 1)[-1] if len(dim) else "")


def _xarray(data: Any, variable: str | None) -> Source:
    if hasattr(data, "data_vars"):
        # coordinates can be named
        known = data.data_vars if variable is None else data.variables
        data = data[_chosen("dataset", list(map(str, known)), variable)]
    elif variable is not None and variable != data.name:
        data = data[_chosen(str(data.name), list(map(str, data.coords)), variable)]
    name, stored = str(getattr(data, "name", None) or "array"), np.dtype(data.dtype)
    if stored.kind in "fc" and {"scale_factor", "add_offset"} & set(data.attrs):
        raise ValueError(
            f"{name}: attributes say that it is packed, and it may be decoded already: give "
            "xr.decode_cf(...) of what is packed, or take scale_factor and add_offset out"
        )
    # what xarray has decoded it says no more; other arrays than of numbers are coordinates
    packed = packing(stored, data.attrs, name) if numbers(stored) else None
    return Source(
        name, data.shape, stored.newbyteorder("=") if packed is None else packed.dtype,
        _stored_chunks(data), tuple(map(str, data.dims)), dict(data.attrs),
        _Values(data), stored.itemsize, packing=packed, origin=(data, None),
    )  # fmt: skip


class _Values:
    """Blocks of a DataArray."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __call__(self, block: tuple[slice, ...]) -> Any:
        return self.data[block].values


@cache
def _let_go(process: int) -> None:
    """Have xarray open its files anew, once in a forked process, which shares positions in them."""
    files = sys.modules.get("xarray.backends.file_manager")
    if files is not None:
        files.FILE_CACHE.clear()


def _stored_chunks(data: Any) -> tuple[int, ...] | None:
    """What storage reads at once: by the names of dims, as some may be selected or moved."""
    known = data.encoding.get("preferred_chunks") or {}
    found = (known.get(d) for d in data.dims)
    return tuple(n if isinstance(n, int) else 1 for n in found) if known else None


def _value(value: Any) -> Any:
    """An attribute as Python has it: HDF5 stores text as bytes and numbers as arrays."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
