"""Pinned memory of the host, to which a GPU's storages go while it computes.

Copies are ordered by events: one begins after what the computing streams have got so far, and
memory is given up, or read, once the stream that needs it waits for the copy's event. So the memory
of a storage stays until its copy has ended, and the host waits for files alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import ask_for, let_go, mapped
from .shelf import Shelf
from .streams import Streams

# bytes of the smallest piece
_LEAST = 4096


class Pool:
    """Pieces of pinned memory, kept for the next who needs one of the same size.

    Sizes are powers of two, to which CUDA's allocator rounds up anyway. bound: bytes of all; None:
    of those that are kept for nothing as many as were in use at once.
    """

    def __init__(self, streams: Streams, bound: int | None) -> None:
        self.streams, self.bound = streams, bound
        self.unused: dict[int, list[torch.UntypedStorage]] = defaultdict(list)
        # bytes of those in use, the most of them so far, and bytes of those that are kept
        self.used = self.most = self.kept = 0

    def take(self, nbytes: int) -> list[torch.UntypedStorage]:
        """Pieces for so many bytes."""
        return [self._piece(n) for n in pieces(nbytes)]

    def fits(self, nbytes: int) -> bool:
        """Whether the bound allows that many more in use."""
        return self.bound is None or self.used + sum(pieces(nbytes)) <= self.bound

    def give(self, taken: list[torch.UntypedStorage]) -> None:
        """Give pieces back: what is copied to them next comes after what was copied from them."""
        for piece in taken:
            self.unused[piece.nbytes()].append(piece)
            self.used -= piece.nbytes()
            self.kept += piece.nbytes()

    def _piece(self, nbytes: int) -> torch.UntypedStorage:
        self.used += nbytes
        self.most = max(self.most, self.used)
        if self.unused[nbytes]:
            self.kept -= nbytes
            return self.unused[nbytes].pop()
        self._trim((2 * self.most if self.bound is None else self.bound) - self.used)
        return self.streams.pinned(nbytes)

    def _trim(self, allowed: int) -> None:
        """Let go what is kept beyond so many bytes, the largest pieces first."""
        for size in sorted(self.unused, reverse=True):
            while self.unused[size] and self.kept > allowed:
                self.unused[size].pop()
                self.kept -= size


def pieces(nbytes: int) -> list[int]:
    """Up to three powers of two that hold so many bytes."""
    found: list[int] = []
    while nbytes > 0:
        n = 1 << nbytes.bit_length() - 1
        if len(found) == 2 and n < nbytes:
            n *= 2
        found.append(max(n, _LEAST))
        nbytes -= found[-1]
    return found


class Copy:
    """Of one storage: its pieces or its file, and the end of what was copied last.

    known: the streams whose next ops come after that. held: the storage, until one of them does.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.pieces: list[torch.UntypedStorage] = []
        self.file: torch.UntypedStorage | None = None
        self.event: Any = None
        self.known: list[Any] = []
        self.held: torch.UntypedStorage | None = None


class Pinned(Shelf):
    """For storages of a GPU: beyond `bound` bytes those copied longest ago go on to files."""

    share = 0.25

    def __init__(self, streams: Streams, folder: Path | None, bound: int | None) -> None:
        self.streams, self.device, self.folder = streams, streams.device, folder
        self.pool = Pool(streams, bound)
        # with pieces, the one copied longest ago first
        self.copies: dict[Copy, None] = {}
        self.computing: list[Any] = []

    def __reduce__(self) -> tuple[Any, ...]:
        # one's own for a copy of its owner
        return _anew, (type(self.streams), self.device, self.folder, self.pool.bound)

    def takes(self, storage: torch.UntypedStorage) -> bool:
        return storage.device == self.device and storage.resizable()

    def put(self, storage: torch.UntypedStorage) -> Copy:
        copy = Copy(storage.nbytes())
        copy.pieces = self._pieces(copy.nbytes)
        self.copies[copy] = None
        self._copied(copy, [(to, x) for x, to in self._pairs(storage, copy)])
        return copy

    def free(self, storage: torch.UntypedStorage, copy: Copy) -> None:
        if len(self.computing) > 1:
            # whoever read it may still do so
            copy.event, copy.known = self.streams.copy((), self.computing), []
        for stream in self.computing:
            if stream not in copy.known:
                self.streams.wait(stream, copy.event)
                copy.known.append(stream)
        copy.held = None
        storage.resize_(0)

    def fetch(self, storage: torch.UntypedStorage, copy: Copy) -> None:
        if not copy.pieces:
            self._read(copy)
        storage.resize_(copy.nbytes)
        self._copied(copy, list(self._pairs(storage, copy)))
        # were it gone before a stream knows of the copy, its memory would be given to others
        copy.held = storage

    def ready(self, copy: Copy) -> None:
        stream = self.streams.current()
        if stream not in copy.known:
            self.streams.wait(stream, copy.event)
            copy.known.append(stream)
        copy.held = None

    def here(self) -> None:
        stream = self.streams.current()
        if stream not in self.computing:
            self.computing.append(stream)

    def drop(self, copy: Copy) -> None:
        if copy.pieces:
            del self.copies[copy]
            self.pool.give(copy.pieces)
        copy.pieces, copy.file, copy.held = [], None, None

    def join(self) -> None:
        self.streams.wait(self.streams.current(), self.streams.copy((), ()))

    def _copied(self, copy: Copy, pairs: list[tuple[Tensor, Tensor]]) -> None:
        copy.event, copy.known = self.streams.copy(pairs, self.computing), []

    def _pairs(self, storage: torch.UntypedStorage, copy: Copy) -> Iterator[tuple[Tensor, Tensor]]:
        """The storage's bytes and the copy's, a piece at a time."""
        at = 0
        for piece in copy.pieces:
            n = min(piece.nbytes(), copy.nbytes - at)
            yield _bytes(storage, at, n), _bytes(piece, 0, n)
            at += n

    def _pieces(self, nbytes: int) -> list[torch.UntypedStorage]:
        while self.copies and not self.pool.fits(nbytes):
            self._write(next(iter(self.copies)))
        return self.pool.take(nbytes)

    def _write(self, copy: Copy) -> None:
        """Move a copy to a file, unless it has one; here the host waits."""
        assert self.folder is not None
        self.streams.finish(copy.event)
        if copy.file is None:
            made = mapped(self.folder, copy.nbytes)
            for to, x in self._pairs(made, copy):
                to.copy_(x)
            let_go(made)
            copy.file = made
        del self.copies[copy]
        self.pool.give(copy.pieces)
        copy.pieces = []

    def _read(self, copy: Copy) -> None:
        assert copy.file is not None
        ask_for(copy.file)
        copy.pieces = self._pieces(copy.nbytes)
        # what was copied from these pieces before
        self.streams.finish(self.streams.copy((), ()))
        for x, to in self._pairs(copy.file, copy):
            to.copy_(x)
        let_go(copy.file)
        self.copies[copy] = None


def _anew(streams: Any, device: torch.device, *rest: Any) -> Pinned:
    return Pinned(streams(device), *rest)


def _bytes(storage: torch.UntypedStorage, at: int, n: int) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, at, (n,), (1,))
