"""Windows of rows that depend on values: which rows each shard needs, known to all ranks.

The ranks tell each other the first and last row that they need, in one small all-gather.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import comm
from ..spec import Spec

Window = tuple[int, int]


def extent(rows: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The first of the wanted row numbers and the one after the last; larger first: none."""
    far = torch.iinfo(torch.int64).max
    if not rows.numel():
        return wanted.new_full((), far, dtype=torch.int64), wanted.new_zeros((), dtype=torch.int64)
    rows = rows.long()
    return rows.where(wanted, far).min(), rows.where(wanted, -far).max() + 1


def tell(
    mine: Sequence[tuple[Tensor, Tensor]], spec: Spec, axes: Sequence[int]
) -> list[list[Window]]:
    """The extents of every rank along mesh axes, row-major; waits for them."""
    group = comm.group(spec.mesh, tuple(axes))
    comm.check_values(group)
    flat = torch.stack([n for pair in mine for n in pair])
    known = comm.gather(flat[None], 0, [1] * comm.size(group), group).tolist()
    return [list(zip(row[::2], row[1::2], strict=True)) for row in known]


def by_shard(
    known: Sequence[Sequence[Window]], spec: Spec, axes: Sequence[int], d: int, i: int, none: Window
) -> tuple[Window, ...]:
    """Extent i for every shard of dim d: of all the ranks that hold it, so that these agree.

    none: the window of a shard that needs no rows.
    """
    found: list[list[Window]] = [[] for _ in spec.dims[d].sizes]
    for place, windows in zip(spec.places(axes), known, strict=True):
        if windows[i][0] < windows[i][1]:
            found[spec.index_at(place)[d]].append(windows[i])
    return tuple((min(a for a, _ in w), max(b for _, b in w)) if w else none for w in found)
