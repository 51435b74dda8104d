"""The files of a checkpoint: written with checksums, verified as they are read.

Beside the files of torch.distributed.checkpoint lies checksums.json: for each of them its bytes and
the CRC-32 of every block. A rank verifies the blocks that it reads, not the others. Checkpoints
without, of DCP or of earlier versions, are read as they are.
"""

from __future__ import annotations

import io
import json
import operator
import os
import re
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from .metadata import Place, parsed

METADATA, CHECKSUMS = ".metadata", "checksums.json"
FORMAT = (1, 0)  # (major, minor): a reader of one major reads any minor of it
# a checkpoint whose metadata have this mark is not complete without checksums
_MARK = "shardtensor.checksums"
_BLOCK = 1 << 20


class Sum(NamedTuple):
    """Of a file: its bytes, the bytes of a block, the CRC-32 of each block."""

    size: int
    block: int
    blocks: list[int]


# writing ------------------------------------------------------------------------------------------


class _Summed:
    """A file that is written from its beginning to its end, and the sums of its blocks."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self._done, self._sums = 0, list[int]()
        self.error: OSError | None = None  # of which torch's writer of archives says nothing
        self.tell, self.flush, self.fileno, self.close = raw.tell, raw.flush, raw.fileno, raw.close

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        at = 0
        while at < len(view):
            inside = (self._done + at) % _BLOCK
            part = view[at : at + _BLOCK - inside]
            if not inside:
                self._sums.append(0)
            self._sums[-1] = zlib.crc32(part, self._sums[-1])
            at += len(part)
        self._done += len(view)
        try:
            self._raw.write(view)
        except OSError as e:
            self.error = self.error or e
            raise
        return len(view)

    def sum(self) -> Sum:
        return Sum(self._done, _BLOCK, self._sums)


class _Files(FileSystem):
    """A folder, and the sums of what was written into it."""

    def __init__(self) -> None:
        self.sums: dict[str, Sum] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as raw:
            if mode != "wb":
                yield raw
                return
            stream = _Summed(raw)
            try:
                yield stream
            except Exception as e:
                raise stream.error or e from e.__cause__
            self.sums[Path(path).name] = stream.sum()

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _Written(list[Any]):
    """What a rank wrote, as DCP has it, and the sums of its files."""

    sums: dict[str, Sum]


class Writer(FileSystemWriter):
    """Writes checksums beside the files."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fs = self._files = _Files()

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id, modules=[_MARK])

    def write_data(self, *args: Any, **kwargs: Any) -> Future[list[Any]]:
        written = _Written(super().write_data(*args, **kwargs).value())
        written.sums = self._files.sums
        done: Future[list[Any]] = Future()
        done.set_result(written)
        return done

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        sums = {name: s for r in results if isinstance(r, _Written) for name, s in r.sums.items()}
        super().finish(metadata, results)
        sums[METADATA] = self._files.sums[METADATA]
        files = {
            name: {"bytes": s.size, "crc32": "".join(f"{b:08x}" for b in s.blocks)}
            for name, s in sums.items()
        }
        with open(Path(self.path) / CHECKSUMS, "w") as f:
            json.dump(_told({"format": FORMAT, "block": _BLOCK, "files": files}), f, indent=1)
            f.flush()
            os.fsync(f.fileno())


# what there is ------------------------------------------------------------------------------------


class Contents(NamedTuple):
    """What a checkpoint has. sums: of its files; empty where it was written without."""

    metadata: Metadata
    sums: dict[str, Sum]


def contents(path: Path) -> Contents:
    """What a checkpoint has. Raises ValueError that says what is wrong with it.

    Reads its metadata and the sizes of its files, each once.
    """
    data = _small(path, METADATA)
    try:
        metadata = parsed(data)
    except ValueError as e:
        raise ValueError(f"{METADATA} is not a checkpoint's: {e}") from e
    sums = _verified(path, data)
    if metadata.storage_meta is not None and _MARK in metadata.storage_meta.modules and not sums:
        raise ValueError(f"{CHECKSUMS} is missing")
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.file] = max(ends.get(place.file, 0), place.offset + place.length)
    for name, end in ends.items():
        if sums and (name not in sums or end > sums[name].size):
            raise ValueError(f"{CHECKSUMS} does not have {end} bytes of {name}")
        _sized(path, name, end)
    return Contents(metadata, sums)


def complete(path: Path) -> None:
    """Raises what `contents` raises for a checkpoint that is not complete; takes less time."""
    if not _verified(path, _small(path, METADATA)):
        contents(path)


def _verified(path: Path, metadata: bytes) -> dict[str, Sum]:
    """The sums of a checkpoint whose files have the sizes that they shall have."""
    if not (path / CHECKSUMS).exists():
        return {}
    sums = _sums(_small(path, CHECKSUMS))
    if METADATA not in sums:
        raise ValueError(f"{CHECKSUMS} has no {METADATA}")
    for name, want in sums.items():
        if name != os.path.basename(name):
            raise ValueError(f"{CHECKSUMS} has {name!r}, which is not a file of the checkpoint")
        _sized(path, name, want.size, want.size)
    _verify(METADATA, metadata, sums[METADATA])
    return sums


def _small(path: Path, name: str) -> bytes:
    if not path.is_dir():
        raise ValueError("there is no such folder")
    _sized(path, name, 0)
    return (path / name).read_bytes()


def _sized(path: Path, name: str, least: int, most: int | None = None) -> None:
    """Raises ValueError for a file that is missing or has too few bytes, or too many."""
    if not (path / name).is_file():
        raise ValueError(f"{name} is missing")
    if (path / name).resolve().parent != path.resolve():
        raise ValueError(f"{name} is a link that leads out of the checkpoint: put the file there")
    have = (path / name).stat().st_size
    if have < least or (most is not None and have > most):
        raise ValueError(f"{name} has {have} bytes of {least}")


def _told(found: dict[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in found.items() if k != "crc32"}
    return rest | {"crc32": f"{zlib.crc32(json.dumps(rest).encode()):08x}"}


def _sums(data: bytes) -> dict[str, Sum]:
    """The checksums in the bytes of their file, by name; ValueError if it is damaged."""
    try:
        found = json.loads(data)
        major, minor = map(operator.index, found.get("format", (0, 0)))
        if major and _told(found) != found:
            raise ValueError("its own checksum differs")
        if major > FORMAT[0]:
            raise NotImplementedError(f"format {major}.{minor}")
        block = found["block"]
        sums = {
            name: Sum(
                file["bytes"],
                block,
                [int(file["crc32"][i : i + 8], 16) for i in range(0, len(file["crc32"]), 8)],
            )
            for name, file in found["files"].items()
        }
        if type(block) is not int or not 0 < block <= 1 << 30:
            raise ValueError(f"blocks of {block}")
        for name, s in sums.items():
            if type(s.size) is not int or len(s.blocks) != -(-s.size // block):
                raise ValueError(f"{name} has {s.size} bytes and {len(s.blocks)} blocks")
    except NotImplementedError as e:
        raise ValueError(
            f"it is of {e}, and this version reads {FORMAT[0]}: a newer one does"
        ) from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{CHECKSUMS} is damaged ({type(e).__name__}: {e})") from e
    return sums


def _verify(name: str, data: bytes, want: Sum) -> None:
    if len(data) != want.size:
        raise ValueError(f"{name} has {len(data)} bytes of {want.size}")
    for i, crc in enumerate(want.blocks):
        if zlib.crc32(data[i * want.block : (i + 1) * want.block]) != crc:
            raise ValueError(_flaw(name, i, want))


def _flaw(name: str, i: int, want: Sum) -> str:
    end = min((i + 1) * want.block, want.size)
    return f"{name} is damaged: the checksum of bytes {i * want.block} to {end} differs"


# reading ------------------------------------------------------------------------------------------


class _Blocks:
    """An open file of a checkpoint; what it gives is verified. flaw: what was wrong with it."""

    def __init__(self, raw: Any, name: str, want: Sum | None) -> None:
        self._raw, self._name, self._want = raw, name, want
        self.flaw = ""
        # an archive is read at its end, then from its beginning
        self._recent: OrderedDict[int, memoryview] = OrderedDict()
        self._block = want.block if want else _BLOCK

    def from_(self, at: int) -> memoryview:
        """Bytes from a position to the end of its block."""
        i, inside = divmod(at, self._block)
        if i not in self._recent:
            self._raw.seek(i * self._block)
            data = self._raw.read(self._block)
            if self._want is not None and (
                i >= len(self._want.blocks) or zlib.crc32(data) != self._want.blocks[i]
            ):
                self.flaw = _flaw(self._name, i, self._want)
                raise ValueError(self.flaw)
            self._recent[i] = memoryview(data)
            while len(self._recent) > 4:
                self._recent.popitem(last=False)
        return self._recent[i][inside:]


class _Item(io.RawIOBase):
    """The bytes of one item, as a file of its own."""

    def __init__(self, blocks: _Blocks, place: Place) -> None:
        self._blocks, self._start, self._length, self._at = blocks, place.offset, place.length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = (0, self._at, self._length)[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, out: Any, /) -> int:
        view = memoryview(out).cast("B")
        n = min(len(view), max(0, self._length - self._at))
        done = 0
        while done < n:
            part = self._blocks.from_(self._start + self._at)[: n - done]
            if not part:
                break
            view[done : done + len(part)] = part
            done += len(part)
            self._at += len(part)
        return done


class Reader(FileSystemReader):
    """Reads items of a checkpoint whose contents are known; errors name the file and the key."""

    def __init__(self, path: Path, found: Contents) -> None:
        super().__init__(path)
        self._found = found

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._found.metadata

    def read_data(self, plan: Any, planner: Any) -> Future[None]:
        def place(request: ReadItem) -> Place:
            found: Place = self.storage_data[request.storage_index]
            return found

        for name, requests in groupby(sorted(plan.items, key=place), lambda r: place(r).file):
            _sized(Path(self.path), name, 0)
            want = self._found.sums[name] if self._found.sums else None
            with open(Path(self.path) / name, "rb") as raw:
                blocks = _Blocks(raw, name, want)
                for request in requests:
                    try:
                        self._read(request, _Item(blocks, place(request)), planner)
                    except Exception as e:
                        why = blocks.flaw or f"{type(e).__name__}: {e}"
                        raise ValueError(f"{request.storage_index.fqn} in {name}: {why}") from e
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, request: ReadItem, stream: _Item, planner: Any) -> None:
        """Give the planner what a request asks for."""
        value = loaded(stream)
        if request.type == LoadItemType.BYTE_IO:
            planner.put(request, value)
            return
        entry = self._found.metadata.state_dict_metadata[request.storage_index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        index = request.storage_index.index
        assert index is not None
        _expect(value, entry.properties.dtype, entry.chunks[index].sizes)
        at = zip(request.storage_offsets, request.lengths, strict=True)
        planner.fill(request, value[tuple(slice(a, a + n) for a, n in at)])


def loaded(stream: Any) -> Any:
    """What was saved with torch.save, of tensors, numbers, text and containers of them only.

    Raises for all else, and for an archive that would unfold to more than it is.
    """
    with zipfile.ZipFile(stream) as archive:
        if any(i.compress_type or i.file_size != i.compress_size for i in archive.infolist()):
            raise ValueError("its archive is compressed, which torch.save does not do")
    stream.seek(0)
    try:
        return torch.load(stream, map_location="cpu", weights_only=True)
    except UnpicklingError as e:
        # torch's own message says how to execute it
        name = re.search(r"GLOBAL (\S+)", str(e))
        why = f"{name[1]} is not loaded" if name else "more than tensors, numbers and text is in it"
        raise ValueError(why) from e


def _expect(x: Any, dtype: torch.dtype, size: torch.Size) -> None:
    if not isinstance(x, Tensor) or x.device.type != "cpu":
        raise ValueError(f"it is {type(x).__name__}, not a tensor with values")
    if x.dtype != dtype or x.shape != size:
        raise ValueError(
            f"it is {x.dtype} of {tuple(x.shape)}, the metadata have {dtype} of {tuple(size)}"
        )
