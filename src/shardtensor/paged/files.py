"""Files that are mapped to memory, which the system reads when an op touches it.

A storage that has to go moves into such a file, once; from then on letting it go is one call, and
coming back is what the system does at the first touch. So an access that the pager does not see is
not counted, but never wrong.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from .. import _torch
from ..errors import UnsupportedOpError
from .shelf import Shelf

# of control groups of either version: the limit, what is used, and what of that are files' pages
_FIRST = (
    "memory.limit_in_bytes", "memory.usage_in_bytes", "total_active_file", "total_inactive_file",
)  # fmt: skip
_SECOND = "memory.max", "memory.current", "active_file", "inactive_file"
_MALLOPT_MMAP_THRESHOLD, _MADV_WILLNEED, _MADV_DONTNEED = -3, 3, 4


class Files(Shelf):
    """For storages of the CPU."""

    device = torch.device("cpu")
    is_memory = True

    def __init__(self, folder: Path) -> None:
        if sys.platform != "linux":
            raise UnsupportedOpError("tiled needs Linux: it maps files to the memory of tensors")
        self.folder = folder
        _small_chunks()
        # as long as files fit into what the system has free, nothing is read from the disk
        self.cached = min(_free(), shutil.disk_usage(folder).free)

    def put(self, storage: torch.UntypedStorage) -> Any:
        made = mapped(self.folder, storage.nbytes())
        _torch.swap_memory(storage, made.copy_(storage))
        return True

    def free(self, storage: torch.UntypedStorage, copy: Any) -> None:
        let_go(storage)

    def fetch(self, storage: torch.UntypedStorage, copy: Any) -> None:
        # read in large pieces, while the op is at what it got first; of the system's cache that
        # costs nothing
        ask_for(storage)


def mapped(folder: Path, nbytes: int) -> torch.UntypedStorage:
    """Memory of a file without a name, which goes with the memory."""
    fd, name = tempfile.mkstemp(dir=folder)
    try:
        # a full disk is an error here, at the first touch of a page it would end the process
        os.posix_fallocate(fd, 0, nbytes)
        made: Any = torch.UntypedStorage.from_file(name, True, nbytes)
    finally:
        os.close(fd)
        os.unlink(name)
    return made


def let_go(storage: torch.UntypedStorage) -> None:
    """Leave what is mapped to its file."""
    if _libc().madvise(storage.data_ptr(), storage.nbytes(), _MADV_DONTNEED):
        raise OSError(ctypes.get_errno(), "madvise of a file that is mapped")


def ask_for(storage: torch.UntypedStorage) -> None:
    """Let the system read what is mapped."""
    _libc().madvise(storage.data_ptr(), storage.nbytes(), _MADV_WILLNEED)


@cache
def _libc() -> Any:
    found = ctypes.CDLL(None, use_errno=True)
    found.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found


def _free(root: Path = Path("/")) -> int:
    """Bytes of memory that files may take, of the machine and of this process's containers."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    free = next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable")) * 1024
    return max(0, min([free, *_left(root)]))


def _left(root: Path) -> Iterator[int]:
    """What each container around this process may still take: pages of files make room."""
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, kind, place = line.split(":", 2)
        if kind and "memory" not in kind.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("memory" if kind else "")
        names = _FIRST if kind else _SECOND
        own = top / place.strip("/")
        # what a container sees at the top is often its own, whatever its place
        for at in (own, *own.parents):
            if not at.is_relative_to(top) or not (at / names[0]).exists():
                continue
            limit, used = ((at / name).read_text().strip() for name in names[:2])
            stat = dict(x.split() for x in (at / "memory.stat").read_text().splitlines())
            if limit.isdigit():
                yield int(limit) - int(used) + sum(int(stat.get(name, 0)) for name in names[2:])


@cache
def _small_chunks() -> None:
    """Memory of 256 KiB or more goes back to the system when it is freed, not to a heap."""
    if hasattr(_libc(), "mallopt"):
        _libc().mallopt(_MALLOPT_MMAP_THRESHOLD, 2**18)
