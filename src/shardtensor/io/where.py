"""Where arrays are: local files, URLs and chains of them, stores of other libraries."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any


def need(module: str) -> Any:
    """The module, or ImportError that names the extra."""
    try:
        return import_module(module)
    except ImportError as e:
        raise ImportError(f'{module} is needed: pip install "shardtensor[io]"') from e


def ending(url: str) -> str:
    """The part of a URL that says by its ending what it is, in lower case.

    Of a chain the first that is more than a protocol, as in simplecache::s3://bucket/a.h5.
    """
    links = url.split("::")
    return next((link for link in links if "://" in link), links[-1]).rstrip("/").lower()


def is_url(where: str) -> bool:
    """Whether fsspec has to open it."""
    return "://" in where or "::" in where


def has_magic(url: str) -> bool:
    """Whether a local file of any name is HDF5 or NetCDF 3."""
    if not os.path.isfile(url):
        return False
    with open(url, "rb") as f:
        return f.read(4) in (b"\x89HDF", b"CDF\x01", b"CDF\x02", b"CDF\x05")


def is_store(where: Any) -> bool:
    """Whether it is a store of Zarr, of any library."""
    kinds = {f"{c.__module__}.{c.__name__}" for c in type(where).__mro__}
    return "zarr.abc.store.Store" in kinds


def local_file(url: str) -> str:
    """The path of a local file, or of the local copy that fsspec keeps."""
    if not is_url(url):
        return url
    try:
        found: str = need("fsspec").open_local(url)
    except ValueError as e:
        raise ValueError(
            f"{url}: NetCDF 3 is read from local files: give simplecache::{url}, or copy it"
        ) from e
    return found


def only(where: str, name: str, variable: str | None) -> None:
    """Raise ValueError for the variable of one array that is not its own name."""
    own = name.strip("/")
    if variable is not None and variable.strip("/") not in (own, own.rpartition("/")[2]):
        raise ValueError(f"{where}: variable {variable!r} of one array, {own or 'without a name'}")


def several(given: Any, what: str) -> tuple[Any, ...]:
    """Names in a list. Raises ValueError for one that is in none, whose letters would be names."""
    if isinstance(given, str | os.PathLike):
        raise ValueError(f"{what} {os.fspath(given)!r}: give a list, [{os.fspath(given)!r}]")
    return tuple(given)
