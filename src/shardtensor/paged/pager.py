"""Memory of tensors beyond a budget lies in files, which the system reads when an op touches it.

A storage that has to go moves into a file that is mapped to memory, once; from then on letting it
go is one call, and coming back is what the system does at the first touch. So an access that the
pager does not see is not counted, but never wrong.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .. import _torch
from ..comm.define import Looking
from ..errors import UnsupportedOpError

# what makes the address of a tensor's memory known to others
_ADDRESSES = {
    Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr,
    Tensor.untyped_storage, Tensor._typed_storage, Tensor.storage,
}  # fmt: skip
# bytes of the smallest storage that is followed
LEAST = 2**16
_MALLOPT_MMAP_THRESHOLD, _MADV_WILLNEED, _MADV_DONTNEED = -3, 3, 4


@dataclass(slots=True)
class Page:
    """A storage: where it is, what is called at its end, its bytes, whether it has a file."""

    ref: Any
    end: Any
    nbytes: int
    filed: bool = False


@dataclass
class Paging:
    """What was moved, in bytes.

    peak: held in memory at once, of storages that are followed. spilled: moved to files, most: in
    files at once. returned: touched again after they had gone.
    """

    peak: int = 0
    spilled: int = 0
    most: int = 0
    returned: int = 0


class Pager:
    """Storages of at least LEAST bytes; those used last stay in memory, `budget` bytes of them."""

    def __init__(self, budget: int, folder: Path) -> None:
        self.budget, self.folder = budget, folder
        # in memory, the one used longest ago first; and those that are in files alone
        self.pages: OrderedDict[int, Page] = OrderedDict()
        self.gone: dict[int, Page] = {}
        # storages that nobody has any longer, as their ends say at any time, in any thread
        self.ended: list[int] = []
        self.resident = self.filed = 0
        self.done = Paging()
        _small_chunks()

    def room(self, nbytes: int, used: Iterable[int] = ()) -> None:
        """Let those go that were used longest ago, until so many bytes fit; not the used ones."""
        if self.resident + nbytes <= self.budget:
            return
        self._sweep()
        kept, passed = set(used), set[int]()
        # looks at those that go and those in use, not at all: there may be many
        while self.pages and self.resident + nbytes > self.budget:
            key = next(iter(self.pages))
            if key in passed:
                return
            # a mode around this one makes room for the copies of it, too
            if key not in kept:
                self._let_go(key)
            if key in self.pages:
                passed.add(key)
                self.pages.move_to_end(key)

    def use(self, tensors: Iterable[Tensor]) -> list[int]:
        """Count the storages of these as in memory, with room for them; the names of all."""
        storages = [x.untyped_storage() for x in tensors]
        found = [s._cdata for s in storages]
        for key, storage in zip(found, storages, strict=True):
            if key in self.pages:
                self.pages.move_to_end(key)
            elif key in self.gone:
                page = self.gone[key]
                self.room(page.nbytes, found)
                self.pages[key] = self.gone.pop(key)
                # read in large pieces, while the op is at what it got first; of the system's cache
                # that costs nothing
                _libc().madvise(storage.data_ptr(), storage.nbytes(), _MADV_WILLNEED)
                self.done.returned += page.nbytes
                self._hold(page.nbytes)
        return found

    def follow(self, tensors: Iterable[Tensor], used: Iterable[int]) -> None:
        """Know the storages of results; those of arguments are known, or not the pager's."""
        known = set(used)
        for x in tensors:
            storage = x.untyped_storage()
            key, n = storage._cdata, storage.nbytes()
            if n < LEAST or key in known or key in self.pages or key in self.gone:
                continue
            end = weakref.ref(storage, partial(_ended, self.ended, key))
            self.pages[key] = Page(_torch.storage_ref(x), end, n)
            self._hold(n)

    def settle(self, x: Tensor) -> None:
        """Put the memory of x where it stays for as long as there is any."""
        page = self.pages.get(x.untyped_storage()._cdata)
        if page is not None:
            self._file(x.untyped_storage(), page)

    def _hold(self, nbytes: int) -> None:
        self.resident += nbytes
        self.done.peak = max(self.done.peak, self.resident)

    def _sweep(self) -> None:
        while self.ended:
            key = self.ended.pop()
            page = self.pages.pop(key, None)
            if page is not None:
                self.resident -= page.nbytes
            else:
                page = self.gone.pop(key)
            self.filed -= page.nbytes if page.filed else 0

    def _let_go(self, key: int) -> None:
        page = self.pages[key]
        storage = _torch.storage_of(page.ref)
        if storage is None:
            return
        self._file(storage, page)
        if _libc().madvise(storage.data_ptr(), storage.nbytes(), _MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise of a file in " + str(self.folder))
        self.gone[key] = self.pages.pop(key)
        self.resident -= page.nbytes

    def _file(self, storage: torch.UntypedStorage, page: Page) -> None:
        if page.filed:
            return
        _torch.swap_memory(storage, self._copied(storage))
        page.filed = True
        self.filed += page.nbytes
        self.done.spilled += page.nbytes
        self.done.most = max(self.done.most, self.filed)

    def _copied(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """The same bytes in a file without a name, which goes with the memory."""
        fd, name = tempfile.mkstemp(dir=self.folder)
        try:
            # a full disk is an error here, at the first touch of a page it would end the process
            os.posix_fallocate(fd, 0, storage.nbytes())
            made = torch.UntypedStorage.from_file(name, True, storage.nbytes())
        finally:
            os.close(fd)
            os.unlink(name)
        return made.copy_(storage)


class Paged(Looking):
    """Inside, the pager follows what this thread's ops read and make."""

    def __init__(self, pager: Pager) -> None:
        super().__init__()
        self.pager = pager

    def op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _torch.TOUCH_NOTHING:
            return func(*args, **kwargs)
        given = _strided((args, kwargs))
        used = self.pager.use(given)
        # room for a result like the largest argument
        self.pager.room(max((x.numel() * x.element_size() for x in given), default=0), used)
        out = func(*args, **kwargs)
        self.pager.follow(_strided(out), used)
        return out


class Settled(TorchFunctionMode):
    """Inside, memory whose address this thread asks for, for numpy, say, keeps it."""

    def __init__(self, pager: Pager) -> None:
        super().__init__()
        self.pager = pager

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _ADDRESSES and type(args[0]) is Tensor:
            self.pager.settle(args[0])
        return func(*args, **(kwargs or {}))


def _ended(ended: list[int], key: int, _: Any) -> None:
    ended.append(key)


def _strided(tree: Any) -> list[Tensor]:
    return [
        x
        for x in pytree.tree_leaves(tree)
        if isinstance(x, Tensor) and x.layout is torch.strided and x.device.type == "cpu"
    ]


@cache
def _libc() -> Any:
    found = ctypes.CDLL(None, use_errno=True)
    found.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found


@cache
def _small_chunks() -> None:
    """Memory of 256 KiB or more goes back to the system when it is freed, not to a heap."""
    if sys.platform != "linux":
        raise UnsupportedOpError("tiled needs Linux: it maps files to the memory of tensors")
    if hasattr(_libc(), "mallopt"):
        _libc().mallopt(_MALLOPT_MMAP_THRESHOLD, 2**18)
