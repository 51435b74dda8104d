"""One way to run a task on some devices: a mesh, how it cuts, and options."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf, prod

import numpy as np

from ..cuts import Cut, chunk_sizes, cut
from ..train.options import Options


@dataclass(frozen=True)
class Layout:
    """A mesh and options. data: groups with other samples; cuts: ranks along each of dims; tensor:
    ranks that share weights (see `tensor_parallel`), which follow each other.

    near: the ranks of the data axis follow each other, so that it is within nodes as far as it
    goes; else those of the dims do. sizes: of the shards of each of dims, where they are not
    torch.chunk's. speeds: of the ranks, as shares of the device's.
    """

    data: int
    dims: tuple[int, ...]
    cuts: tuple[int, ...]
    options: Options = field(default_factory=Options)
    near: bool = False
    sizes: tuple[tuple[int, ...], ...] = ()
    speeds: tuple[float, ...] = ()
    tensor: int = 1

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.data * prod(self.cuts) * self.tensor

    @property
    def mesh(self) -> dict[str, int]:
        """Axes by name, in order."""
        data = {"data": self.data}
        dims = {f"dim{d}": n for d, n in zip(self.dims, self.cuts, strict=True)}
        tensor = {"tensor": self.tensor} if self.tensor > 1 else {}
        return (dims | data if self.near else data | dims) | tensor

    def place(self, rank: int) -> dict[str, int]:
        """Where a rank is along each axis of the mesh."""
        names, shape = list(self.mesh), tuple(self.mesh.values())
        return dict(zip(names, map(int, np.unravel_index(rank, shape)), strict=True))

    def cut(self, shape: Sequence[int]) -> dict[int, Cut]:
        """The sizes of the shards of each of dims."""
        given = dict(zip(self.dims, self.sizes, strict=False))
        return {
            d: cut(given[d]) if d in given else chunk_sizes(shape[d], n)
            for d, n in zip(self.dims, self.cuts, strict=True)
        }

    def rows(self, rank: int, shape: Sequence[int]) -> int:
        """How many of the elements of dims a rank holds."""
        at = self.place(rank)
        return prod(sizes[at[f"dim{d}"]] for d, sizes in self.cut(shape).items())

    def across(self, node: int) -> list[str]:
        """The axes along which ranks of several nodes meet, of so many ranks each."""
        found, span = [], 1
        for name, n in reversed(self.mesh.items()):
            if n > 1 and (span * n > node or node % (span * n)):
                found.append(name)
            span *= n
        return found[::-1] if self.ranks > node else []

    def __str__(self) -> str:
        axes = " x ".join(self._axis(k, n) for k, n in self.mesh.items() if n > 1) or "one device"
        extras = [
            f"fsdp={self.options.fsdp}" if self.options.fsdp else "",
            "checkpoint" if self.options.checkpoint else "",
            "offload" if self.options.offload else "",
            "data within nodes" if self.near else "",
            self.options.precision or "",
        ]
        return ", ".join([axes, *filter(None, extras)])

    def _axis(self, name: str, n: int) -> str:
        sizes = {f"dim{d}": list(s) for d, s in zip(self.dims, self.sizes, strict=False)}.get(name)
        told = "" if sizes is None else f" in {sizes}" if n <= 8 else " uneven"
        return f"{name} {n}{told}"


def looked_at(layout: Layout, shape: Sequence[int]) -> list[int]:
    """The ranks of which one holds most, and one takes longest."""
    axes = layout.mesh.values()
    middle = sum(s * (n // 2) for n, s in zip(axes, _strides(axes), strict=True))
    if layout.speeds or layout.sizes:
        speeds = layout.speeds or (1.0,) * layout.ranks
        rows = [layout.rows(r, shape) for r in range(layout.ranks)]
        busy = [n / s if s else inf if n else 0.0 for n, s in zip(rows, speeds, strict=True)]
        return sorted({rows.index(max(rows)), busy.index(max(busy))})
    even = all(shape[d] % n == 0 for d, n in zip(layout.dims, layout.cuts, strict=True))
    return [middle] if even else sorted({0, middle})


def _strides(sizes: Iterable[int]) -> list[int]:
    sizes = list(sizes)
    return [prod(sizes[i + 1 :]) for i in range(len(sizes))]
