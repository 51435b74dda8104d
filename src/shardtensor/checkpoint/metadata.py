"""The metadata of a checkpoint, which are a pickle, read as data: nothing of it is called.

torch.distributed.checkpoint pickles a few dataclasses. Here each stands for a record that only
keeps what it is given; what comes out is checked and becomes objects of DCP made anew. Python's
own `pickle.Unpickler` would do with a list of classes too, but takes memory as a file tells it.
"""

from __future__ import annotations

import io
import os
import pickle
from math import prod
from typing import Any, ClassVar, NamedTuple

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)


class Place(NamedTuple):
    """Where an item lies: bytes of a file of the checkpoint."""

    file: str
    offset: int
    length: int


def parsed(data: bytes) -> Metadata:
    """DCP's metadata. Raises ValueError for anything else than what DCP writes."""
    try:
        found = _Reader(io.BytesIO(data)).load()
    except ValueError:
        raise
    except Exception as e:
        raise ValueError(f"cut or damaged ({type(e).__name__}: {e})") from e
    return _metadata(found)


class _Fixed(type):
    """A class that a pickle cannot change."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise ValueError(f"it sets {name} of a class")


class _Record(metaclass=_Fixed):
    """What a pickle gives to a class: the arguments, and the state."""

    __slots__ = ("args", "state")
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Any:
        self = object.__new__(cls)
        self.args, self.state = args, None
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Index(_Record):
    __slots__ = ()


class _Storage(_Record):
    __slots__ = ()


class _Whole(_Record):
    __slots__ = ()


class _Tensor(_Record):
    __slots__ = ()


class _Bytes(_Record):
    __slots__ = ()


class _Properties(_Record):
    __slots__ = ()


class _Chunk(_Record):
    __slots__ = ()


class _Size(_Record):
    __slots__ = ()


class _Origin(_Record):
    __slots__ = ()


class _Unread(_Record):
    """What says nothing that a reader needs."""

    __slots__ = ()


_OF_DCP = "torch.distributed.checkpoint.metadata"
# every name that a checkpoint's metadata may have
_KNOWN: dict[tuple[str, str], Any] = {
    (_OF_DCP, "Metadata"): _Whole,
    (_OF_DCP, "MetadataIndex"): _Index,
    (_OF_DCP, "TensorStorageMetadata"): _Tensor,
    (_OF_DCP, "BytesStorageMetadata"): _Bytes,
    (_OF_DCP, "TensorProperties"): _Properties,
    (_OF_DCP, "ChunkStorageMetadata"): _Chunk,
    (_OF_DCP, "StorageMeta"): _Origin,
    (_OF_DCP, "_MEM_FORMAT_ENCODING"): _Unread,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Storage,
    ("torch", "Size"): _Size,
    ("torch.serialization", "_get_layout"): _Unread,
    # how some versions of Python name a member of an enumeration
    ("builtins", "getattr"): _Unread,
    ("pathlib", "PosixPath"): _Unread,
    ("pathlib", "WindowsPath"): _Unread,
    ("pathlib._local", "PosixPath"): _Unread,
    ("pathlib._local", "WindowsPath"): _Unread,
    **{("torch", k): v for k, v in vars(torch).items() if isinstance(v, torch.dtype)},
}

_OPCODES = """
    PROTO FRAME STOP MARK MEMOIZE BINGET LONG_BINGET BINPUT LONG_BINPUT GLOBAL STACK_GLOBAL NEWOBJ
    REDUCE BUILD EMPTY_DICT EMPTY_LIST EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 APPEND APPENDS
    SHORT_BINUNICODE BINUNICODE BININT BININT1 BININT2 LONG1 NONE NEWTRUE NEWFALSE
"""
_READ = {getattr(pickle, name)[0] for name in _OPCODES.split()}


class _Reader(pickle._Unpickler):  # the one in Python: no memory is taken before there are data
    """Reads the opcodes that DCP's metadata consist of."""

    stack: list[Any]
    pop_mark: Any

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise ValueError(f"{module}.{name} is not loaded") from None

    def _set(self) -> None:
        self._pairs([self.stack.pop(-2), self.stack.pop()])

    def _set_all(self) -> None:
        self._pairs(self.pop_mark())

    def _pairs(self, items: list[Any]) -> None:
        into = self.stack[-1]
        # tuples in tuples would take for ever to hash
        if type(into) is not dict or any(type(k) not in (str, _Index) for k in items[::2]):
            raise ValueError("a dict has keys that are no text")
        into.update(zip(items[::2], items[1::2], strict=True))

    def _unknown(self) -> None:
        raise ValueError("it has opcodes that no checkpoint has")

    dispatch: ClassVar[dict[int, Any]] = {
        **dict.fromkeys(range(256), _unknown),
        **{code: do for code, do in pickle._Unpickler.dispatch.items() if code in _READ},
        pickle.SETITEM[0]: _set,
        pickle.SETITEMS[0]: _set_all,
    }


# from records to objects --------------------------------------------------------------------------


def _is(x: Any, kind: type, what: str) -> Any:
    # bool is no int here
    if type(x) is not kind:
        raise ValueError(f"{what} is no {kind.__name__.strip('_').lower()}")
    return x


def _fields(x: Any, kind: type[_Record], what: str) -> dict[str, Any]:
    found: dict[str, Any] = _is(_is(x, kind, what).state, dict, f"the state of {what}")
    return found


def _count(x: Any, what: str) -> int:
    if _is(x, int, what) < 0 or x >= 2**63:
        raise ValueError(f"{what} is {x}")
    return int(x)


def _size(x: Any, what: str) -> torch.Size:
    args = _is(x, _Size, what).args
    numbers = _is(args[0] if len(args) == 1 else None, tuple, what)
    found = torch.Size([_count(n, what) for n in numbers])
    _count(prod(found), f"the number of elements of {what}")
    return found


def _metadata(x: Any) -> Metadata:
    """A parsed metadata file, every chunk of which is in some file; else ValueError."""
    fields = _fields(x, _Whole, "the whole")
    entries = _is(fields.get("state_dict_metadata"), dict, "its table of keys")
    stored = _is(fields.get("storage_data"), dict, "its table of files")
    paths = fields.get("planner_data")
    found = Metadata(
        {_is(k, str, "a key"): _entry(k, v) for k, v in entries.items()},
        None if paths is None else {k: _path(k, v) for k, v in _is(paths, dict, "paths").items()},
        dict(_storage(k, v) for k, v in stored.items()),
        _origin(fields.get("storage_meta")),
    )
    if len(found.storage_data) != len(stored):
        raise ValueError("a chunk is stored twice")
    for key, entry in found.state_dict_metadata.items():
        chunks = entry.chunks if isinstance(entry, TensorStorageMetadata) else [None]
        for chunk in chunks:
            index = MetadataIndex(key, chunk.offsets if chunk else None)
            if index not in found.storage_data:
                raise ValueError(f"{key} has a part that is in no file")
    return found


def _entry(key: str, x: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if type(x) is _Bytes:
        return BytesStorageMetadata()
    fields = _fields(x, _Tensor, key)
    properties = _is(fields.get("properties"), _Properties, f"the properties of {key}").state
    dtype = properties[0] if type(properties) is tuple and properties else None
    size = _size(fields.get("size"), f"the size of {key}")
    chunks = []
    for c in _is(fields.get("chunks"), list, f"the chunks of {key}"):
        chunk = _fields(c, _Chunk, f"a chunk of {key}")
        at, n = (_size(chunk.get(k), f"a chunk of {key}") for k in ("offsets", "sizes"))
        if not len(at) == len(n) == len(size) or any(
            a + b > s for a, b, s in zip(at, n, size, strict=True)
        ):
            raise ValueError(f"{key} of size {tuple(size)} has a chunk {tuple(n)} at {tuple(at)}")
        chunks.append(ChunkStorageMetadata(at, n))
    return TensorStorageMetadata(
        TensorProperties(_is(dtype, torch.dtype, f"the dtype of {key}")), size, chunks
    )


def _path(key: str, x: Any) -> tuple[str | int, ...]:
    steps = _is(x, tuple, f"the path of {key}")
    for step in steps:
        _is(step, str if isinstance(step, str) else int, f"a step to {key}")
    if not steps or ".".join(map(str, steps)) != key:
        raise ValueError(f"the path of {key} leads elsewhere")
    return tuple(steps)


def _storage(k: Any, v: Any) -> tuple[MetadataIndex, Place]:
    index, info = _fields(k, _Index, "an index"), _fields(v, _Storage, "a place")
    key = _is(index.get("fqn"), str, "a key")
    offset = index.get("offset")
    name = _is(info.get("relative_path"), str, "the name of a file")
    if name != os.path.basename(name) or "\\" in name or not name.strip(".") or "\0" in name:
        raise ValueError(f"{key} is in {name!r}, which is not a file of the checkpoint")
    if info.get("transform_descriptors"):
        raise ValueError(f"{key} is stored by an extension of DCP, which is not read")
    at, length = (_count(info.get(n), f"the {n} of {key}") for n in ("offset", "length"))
    place = None if offset is None else _size(offset, f"the offset of {key}")
    return MetadataIndex(key, place), Place(name, at, length)


def _origin(x: Any) -> StorageMeta:
    modules = _fields(x, _Origin, "its origin").get("modules") if x is not None else None
    known = type(modules) is list and all(type(m) is str for m in modules)
    return StorageMeta(modules=list(modules) if known and modules else [])
