"""Blocks of arrays straight into ShardTensors: each rank reads only what it holds."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import get_worker_info

from ..errors import UnsupportedOpError
from ..later import dt
from ..spec import Spec
from ..tensor import ShardTensor, wrap
from .ahead import Forked
from .chunks import Cut, chunked, heed
from .source import Range, Source, numbers, open_array

Index = Mapping[str | int, int | slice]


def read(
    source: Source | Any,
    mesh: DeviceMesh,
    placements: Sequence[dt.Placement],
    *,
    index: Index | None = None,
    sizes: Mapping[int, Sequence[int]] | None = None,
    dtype: torch.dtype | None = None,
) -> ShardTensor:
    """An array, or a part of it, as a ShardTensor on the mesh's device; nothing is communicated.

    source: or what `open_array` takes. index: for some dims, by name or number, one row (the dim
    goes away) or a slice of step 1, for instance {"time": 3}. placements, sizes: of what is left;
    `aligned_sizes` gives cuts at the borders of chunks. dtype: default the file's. The first rank
    warns, once for arrays that are stored and cut alike, where some rank reads 64 KiB or more of
    chunks and 1.5 times what it wants. Raises ValueError for a placement that is Partial, a dim
    that is not there, and sizes that do not fit, IndexError for a row that is not there,
    UnsupportedOpError in a worker of torch's DataLoader.
    """
    source = source if isinstance(source, Source) else open_array(source)
    spec = spec_of(source, mesh, placements, index, sizes)
    local = read_block(source, spec, index=index, dtype=dtype)
    _, kept = _kept(source, index)
    ranges = _ranges(source, spec, index, None)
    cuts = {i: Cut(*kept[i], sizes) for i, sizes in spec.sizes.items()}
    heed(source.name, source.shape, source.chunks, source.item, ranges, cuts)
    return placed(local, spec)


def placed(local: Tensor, spec: Spec) -> ShardTensor:
    """This rank's block, from the CPU, as a ShardTensor on the mesh's device.

    In a process of a Loader it stays on the CPU; the loader moves it.
    """
    worker = get_worker_info()
    if worker is not None and isinstance(worker.dataset, Forked):
        return wrap(local, spec)
    if worker is not None:
        raise UnsupportedOpError(
            f"a ShardTensor of {spec} in a worker of torch's DataLoader: processes send each other "
            "plain tensors only. Give the dataset to io.Loader(workers=...), or return "
            "io.read_block and wrap it outside with ShardTensor.from_local"
        )
    return wrap(local.to(torch.device(spec.mesh.device_type)), spec)


def read_block(
    source: Source,
    spec: Spec,
    *,
    index: Index | None = None,
    halo: Mapping[int, tuple[int, int]] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """This rank's block of the array as a plain tensor on the CPU; nothing is sent.

    halo: for some dims of the spec, how many rows more before and after; fewer come at the ends of
    the array, where there are none. Raises ValueError for a spec of another shape than the array's
    (what `index` leaves of it) and for values that are no numbers, IndexError for a row that is not
    there.
    """
    picked, kept = _kept(source, index)
    shape = tuple(b - a for _, (a, b) in kept)
    if shape != spec.shape:
        raise ValueError(f"{source.name}: a spec of {tuple(spec.shape)} for an array of {shape}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {dtype!r}: give one of torch, such as torch.float32")
    block = source.read(_ranges(source, spec, index, halo))
    whole = block.reshape([n for d, n in enumerate(block.shape) if d not in picked])
    if not numbers(whole.dtype):
        raise ValueError(f"{source.name}: {whole.dtype} is not a dtype of numbers")
    found = torch.from_numpy(whole)
    return found if dtype is None else found.to(dtype)


def spec_of(
    source: Source,
    mesh: DeviceMesh,
    placements: Sequence[dt.Placement],
    index: Index | None = None,
    sizes: Mapping[int, Sequence[int]] | None = None,
) -> Spec:
    """The spec of what `read` gives; nothing is read or sent.

    Raises ValueError for an index or sizes that do not fit the array, and for Partial; IndexError
    for a row that is not there.
    """
    _, kept = _kept(source, index)
    spec = Spec.of(mesh, placements, [b - a for _, (a, b) in kept], sizes)
    if spec.partial:
        raise ValueError(f"{source.name}: an array is not read into {spec.placements}")
    return spec


def aligned_sizes(
    source: Source,
    mesh: DeviceMesh,
    placements: Sequence[dt.Placement],
    *,
    index: Index | None = None,
) -> dict[int, tuple[int, ...]]:
    """Sizes of shards that end where chunks end, as equal as chunks allow: for `read`.

    So no chunk is read by two ranks. With fewer chunks than ranks some shards are empty. Nothing is
    sent: the same array gives the same sizes. Raises ValueError and IndexError as `spec_of` does.
    """
    spec = spec_of(source, mesh, placements, index)
    _, kept = _kept(source, index)
    found: dict[int, tuple[int, ...]] = {}
    for d, cuts in spec.sizes.items():
        at, (start, stop) = kept[d]
        chunk = source.chunks[at] if source.chunks else 1
        found[d] = chunked(start, stop, chunk, len(cuts))
    return found


@dataclass(frozen=True)
class Report:
    """What this rank reads. wanted: bytes of its block. touched: bytes of the chunks it meets.

    aligned: sizes of shards with which no chunk is read twice.
    """

    wanted: int
    touched: int
    aligned: dict[int, tuple[int, ...]]

    @property
    def amplification(self) -> float:
        """touched / wanted; 1 for a rank that holds nothing."""
        return self.touched / self.wanted if self.wanted else 1.0


def report(source: Source, spec: Spec, *, index: Index | None = None) -> Report:
    """What this rank would read of the array: nothing is read or sent.

    Raises ValueError for a spec of another shape than what `index` leaves, IndexError for a row
    that is not there.
    """
    ranges = _ranges(source, spec, index, None)
    wanted = prod(b - a for a, b in ranges) * source.item
    aligned = aligned_sizes(source, spec.mesh, spec.placements, index=index)
    return Report(wanted, source.touched(ranges) if wanted else 0, aligned)


def _kept(source: Source, index: Index | None) -> tuple[set[int], list[tuple[int, Range]]]:
    """The dims that go away, and for the others (dim, rows)."""
    rows: list[Range] = [(0, n) for n in source.shape]
    picked, seen = set(), set()
    if not isinstance(index or {}, Mapping):
        raise ValueError(f"{source.name}: index {index!r}; give a dict of dims, such as {{0: 3}}")
    for key, at in (index or {}).items():
        d = source.dim(key)
        n = source.shape[d]
        if d in seen:
            raise ValueError(f"{source.name}: index {index!r} names dim {d} twice")
        seen.add(d)
        try:
            if isinstance(at, slice):
                start, stop, step = at.indices(n)
            else:
                row = _whole(at)
        except TypeError:
            raise ValueError(
                f"{source.name}: {at!r} of dim {key}; give a row or a slice of step 1, and take "
                "others from what is read, or give a selection of xarray"
            ) from None
        if isinstance(at, slice):
            if step != 1:
                raise ValueError(f"{source.name}: {at} of dim {key}; only steps of 1 are read")
            rows[d] = start, max(start, stop)
        else:
            if not -n <= row < n:
                raise IndexError(f"{source.name}: row {row} of dim {key}, which has {n}")
            rows[d] = row % n, row % n + 1
            picked.add(d)
    return picked, [(d, r) for d, r in enumerate(rows) if d not in picked]


def _ranges(
    source: Source, spec: Spec, index: Index | None, halo: Mapping[int, tuple[int, int]] | None
) -> list[Range]:
    """The rows of the array, in all its dims, that are this rank's block."""
    picked, kept = _kept(source, index)
    more: dict[int, tuple[int, int]] = {}
    for i, (before, after) in (halo or {}).items():
        if not -len(kept) <= i < len(kept) or min(before, after) < 0:
            raise ValueError(
                f"{source.name}: a halo of {(before, after)} rows for dim {i} of {len(kept)}"
            )
        more[i % len(kept)] = before, after
    found: list[Range] = [(0, 0)] * len(source.shape)
    for key, at in (index or {}).items():
        d = source.dim(key)
        if d in picked:
            row = _whole(at) % source.shape[d]
            found[d] = row, row + 1
    for i, (d, (start, stop)) in enumerate(kept):
        a = start + spec.offset[i]
        before, after = more.get(i, (0, 0))
        b = a + spec.local_shape[i]
        found[d] = (max(start, a - before), min(stop, b + after)) if a < b else (a, a)
    return found


def _whole(at: Any) -> int:
    """A number of a row. Raises TypeError for what is none; True and False are none."""
    if isinstance(at, bool | np.bool_) or np.ndim(at):
        raise TypeError
    return operator.index(at)
