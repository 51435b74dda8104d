"""Which memory of tensors stays, of a budget: that which was used last; the rest is on a shelf."""

from __future__ import annotations

import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .. import _torch
from ..comm.define import Looking
from ..comm.observers import simulated_rank
from .shelf import Shelf

# what makes the address of a tensor's memory known to others
_ADDRESSES = {
    Tensor.numpy, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr,
    Tensor.untyped_storage, Tensor._typed_storage, Tensor.storage,
    Tensor.__cuda_array_interface__.__get__,
}  # fmt: skip
_PLAIN = (Tensor, Parameter)
# bytes of the smallest storage that is followed
LEAST = 2**16


@dataclass(slots=True)
class Page:
    """A storage: where it is, what is called at its end, its bytes, its copy on the shelf.

    rank: who used it last. before: the page that its maker made before it. coming: whether it was
    fetched for an op that has not come yet.
    """

    ref: Any
    end: Any
    nbytes: int
    rank: int | None
    before: int
    copy: Any = None
    coming: bool = False


@dataclass
class Paging:
    """What was moved, in bytes.

    peak: held in memory at once, of storages that are followed. spilled: copied to files or pinned
    memory, most: in copies at once. returned: touched again after they had gone.
    """

    peak: int = 0
    spilled: int = 0
    most: int = 0
    returned: int = 0


class Pager:
    """Storages of at least LEAST bytes; those used last stay in memory, `budget` bytes of them."""

    def __init__(self, budget: int, shelf: Shelf) -> None:
        self.budget, self.shelf = budget, shelf
        self.share = int(budget * shelf.share)
        # in memory, the one used longest ago first: all else; what was used before all these, and
        # is copied; what stays. And those that are on the shelf alone
        self.pages: OrderedDict[int, Page] = OrderedDict()
        self.clean: OrderedDict[int, Page] = OrderedDict()
        self.fixed: dict[int, Page] = {}
        self.gone: dict[int, Page] = {}
        # what each rank used, the last last, and made last
        self.recent: dict[int | None, OrderedDict[int, None]] = defaultdict(OrderedDict)
        self.made: dict[int | None, int] = {}
        # storages that nobody has any longer, as their ends say at any time, in any thread
        self.ended: list[int] = []
        # bytes in memory, of these in `clean`, fetched for ops to come, and copied
        self.resident = self.ready = self.coming = self.filed = 0
        self.done = Paging()

    def room(self, nbytes: int, used: Iterable[int] = ()) -> None:
        """Let those go that were used longest ago, until so many bytes fit; not the used ones."""
        if self.resident + nbytes <= self.budget:
            return
        self._sweep()
        kept = set(used)
        for among in (self.clean, self.pages):
            passed = set[int]()
            # looks at those that go and those in use, not at all: there may be many
            while among and self.resident + nbytes > self.budget:
                key = next(iter(among))
                if key in passed:
                    break
                # a mode around this one makes room for the copies of it, too
                if key not in kept:
                    self._let_go(key)
                if key in among:
                    passed.add(key)
                    among.move_to_end(key)

    def use(self, tensors: Iterable[Tensor], written: Iterable[Tensor] = ()) -> list[int]:
        """Bring what these lie in to memory, with room for it; the names of all storages.

        written: those of them whose memory changes.
        """
        storages = [x.untyped_storage() for x in tensors]
        found = [s._cdata for s in storages]
        came = None
        self.shelf.here()
        for key, storage in zip(found, storages, strict=True):
            if key in self.gone:
                self._bring(key, storage, found)
                came = self.pages[key]
            page = self._touched(key)
            if page is not None and page.copy is not None and not self.shelf.is_memory:
                self.shelf.ready(page.copy)
                came = page if page.coming else came
                self._came(page)
        for x in written:
            self._changed(x.untyped_storage()._cdata)
        if came is not None and self.share and _torch.graph_task() != -1:
            self._expect(came.before, found)
        return found

    def follow(self, tensors: Iterable[Tensor], used: Iterable[int]) -> None:
        """Know the storages of results; those of arguments are known, or not the pager's."""
        known, rank = set(used), simulated_rank()
        for x in tensors:
            storage = x.untyped_storage()
            key, n = storage._cdata, storage.nbytes()
            if n < LEAST or key in known or not self.shelf.takes(storage):
                continue
            if key in self.pages or key in self.gone or key in self.clean or key in self.fixed:
                continue
            if _torch.is_zero(x):
                continue
            end = weakref.ref(storage, partial(_ended, self.ended, key))
            page = Page(_torch.storage_ref(x), end, n, rank, self.made.get(rank, 0))
            self.pages[key] = page
            self.recent[rank][key] = None
            self.made[rank] = key
            self._hold(n)
        self._copy_ahead()

    def settle(self, x: Tensor) -> None:
        """Put the memory of x where it stays for as long as there is any."""
        key = x.untyped_storage()._cdata
        if self.shelf.is_memory:
            page = self.pages.get(key)
            if page is not None:
                self._copy(x.untyped_storage(), page)
        else:
            self.use([x], [x])
            page = self.pages.pop(key, None)
            if page is not None:
                self.fixed[key] = page

    def resume(self, rank: int) -> None:
        """Bring back what a rank that goes on used last, before it asks."""
        if not self.share:
            return
        self._sweep()
        wanted, left = [], self.share
        for key in reversed(self.recent[rank]):
            page = self.gone.get(key)
            left -= page.nbytes if page is not None else self._of(key).nbytes
            if left < 0:
                break
            if page is not None:
                wanted.append(key)
        with _torch.no_torch_function_at_all():
            self.shelf.here()
            for key in wanted:
                self._prefetch(key, wanted)

    @property
    def held(self) -> int:
        """Bytes of all storages that somebody has, in memory or not."""
        self._sweep()
        return self.resident + sum(p.nbytes for p in self.gone.values())

    def close(self) -> None:
        """Bring back what somebody has still, and leave the shelf."""
        # what is on its way back has nobody else
        self.shelf.join()
        alive = []
        for pages in (self.pages, self.clean, self.fixed, self.gone):
            for page in pages.values():
                if page.copy is None:
                    continue
                storage = _torch.storage_of(page.ref) if pages is self.gone else None
                if storage is None or self.shelf.is_memory:
                    self.shelf.drop(page.copy)
                else:
                    alive.append((storage, page.copy))
            pages.clear()
        with _torch.no_torch_function_at_all(), _torch.outside_modes():
            self.shelf.here()
            # one after the other: what each needs on the shelf, those before it have left
            for storage, copy in alive:
                self.shelf.fetch(storage, copy)
                self.shelf.ready(copy)
                self.shelf.drop(copy)

    def _of(self, key: int) -> Page:
        return next(t[key] for t in (self.pages, self.clean, self.fixed, self.gone) if key in t)

    def _touched(self, key: int) -> Page | None:
        """A page in memory, as used last."""
        if key in self.clean:
            page = self.pages[key] = self.clean.pop(key)
            self.ready -= page.nbytes
        else:
            if key not in self.pages:
                return None
            page = self.pages[key]
            self.pages.move_to_end(key)
        if self.share:
            rank = simulated_rank()
            if page.rank != rank:
                self.recent[page.rank].pop(key, None)
                page.rank = rank
            self.recent[rank][key] = None
            self.recent[rank].move_to_end(key)
        return page

    def _came(self, page: Page) -> None:
        self.coming -= page.nbytes if page.coming else 0
        page.coming = False

    def _changed(self, key: int) -> None:
        page = self.pages.get(key)
        if page is not None and page.copy is not None:
            self._drop(page)

    def _drop(self, page: Page) -> None:
        self.shelf.drop(page.copy)
        page.copy = None
        self.filed -= page.nbytes

    def _bring(self, key: int, storage: torch.UntypedStorage, used: Iterable[int]) -> None:
        page = self.gone[key]
        self.room(page.nbytes, used)
        with _torch.outside_modes():
            self.shelf.fetch(storage, page.copy)
        self.pages[key] = self.gone.pop(key)
        self.done.returned += page.nbytes
        self._hold(page.nbytes)

    def _prefetch(self, key: int, used: Iterable[int]) -> None:
        page = self.gone.get(key)
        storage = None if page is None else _torch.storage_of(page.ref)
        if page is not None and storage is not None:
            self._bring(key, storage, used)
            page.coming = True
            self.coming += page.nbytes

    def _expect(self, key: int, used: list[int]) -> None:
        """Fetch what backward reads next: what was made before, in turn."""
        while (page := self.gone.get(key)) and self.coming + page.nbytes <= self.share:
            used.append(key)
            self._prefetch(key, used)
            if key in self.gone:
                return
            key = page.before

    def _hold(self, nbytes: int) -> None:
        self.resident += nbytes
        self.done.peak = max(self.done.peak, self.resident)

    def _sweep(self) -> None:
        while self.ended:
            key = self.ended.pop()
            page = self._of(key)
            if self.gone.pop(key, None) is None:
                self.resident -= page.nbytes
                self.ready -= page.nbytes if self.clean.pop(key, None) else 0
                self.pages.pop(key, None)
                self.fixed.pop(key, None)
            self._came(page)
            self.recent[page.rank].pop(key, None)
            if page.copy is not None:
                self._drop(page)

    def _copy_ahead(self) -> None:
        """Begin to copy those that would go next, so that they can go at once."""
        if not self.share or self.resident - self.ready <= self.budget - self.share:
            return
        self._sweep()
        while self.pages and self.resident - self.ready > self.budget - self.share:
            key = next(iter(self.pages))
            storage = _torch.storage_of(self.pages[key].ref)
            if storage is None:
                return
            self._copy(storage, self.pages[key])
            page = self.clean[key] = self.pages.pop(key)
            self.ready += page.nbytes

    def _let_go(self, key: int) -> None:
        among = self.clean if key in self.clean else self.pages
        page = among[key]
        storage = _torch.storage_of(page.ref)
        if storage is None:
            return
        if not self.shelf.takes(storage):
            # others have seen it since
            self.fixed[key] = among.pop(key)
            self.ready -= page.nbytes if among is self.clean else 0
            return
        self._copy(storage, page)
        with _torch.outside_modes():
            self.shelf.free(storage, page.copy)
        self._came(page)
        self.gone[key] = among.pop(key)
        self.resident -= page.nbytes
        self.ready -= page.nbytes if among is self.clean else 0

    def _copy(self, storage: torch.UntypedStorage, page: Page) -> None:
        if page.copy is not None:
            return
        with _torch.outside_modes():
            page.copy = self.shelf.put(storage)
        self.filed += page.nbytes
        self.done.spilled += page.nbytes
        self.done.most = max(self.done.most, self.filed)


class Paged(Looking):
    """Inside, the pager follows what this thread's ops read and make."""

    def __init__(self, pager: Pager) -> None:
        super().__init__()
        self.pager = pager

    def op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _torch.TOUCH_NOTHING:
            return func(*args, **kwargs)
        given = _strided((args, kwargs))
        copied = not self.pager.shelf.is_memory
        changed = _strided(_torch.written_to(func, args, kwargs)) if copied else ()
        used = self.pager.use(given, changed)
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
    """The tensors whose memory those of a tree lie in."""
    found = [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]
    for x in found:
        if type(x) not in _PLAIN or x.layout is not torch.strided:
            return [y for x in found for y in _torch.dense_parts(x)]
    return found
