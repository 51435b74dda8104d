"""Where every element of a sharded tensor lives: pure values, equal on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import pairwise, product
from math import prod
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh

from . import picture
from .cuts import Cut, Kept, clipped, cut, nested_chunk_sizes, scaled, windows
from .later import dt

# not empty once some dim of this process lies in shards of which one has no rows
hollow: set[bool] = set()
# called when the first such dim is made
when_hollow: list[Callable[[], None]] = []
# the name of the first axis of a mesh whose ranks but this one, in the middle, do not run
ALONE = "_alone"


class _Dim(NamedTuple):
    size: int
    axes: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()


class Dim(_Dim):
    """One tensor dimension: its global size and how mesh axes shard it.

    axes: the mesh axes that shard it, outermost first (ascending); () when it is whole.
    sizes: the size of every shard, row-major over `axes`, as a `Cut`; () when it is whole.
    """

    __slots__ = ()

    def __new__(cls, size: int, axes: tuple[int, ...] = (), sizes: Iterable[int] = ()) -> Dim:
        if sizes:
            if type(sizes) is not Cut:
                sizes = cut(sizes)
            if size and not sizes.least and not hollow:
                hollow.add(True)
                for call in when_hollow:
                    call()
        return tuple.__new__(cls, (size, axes, sizes))

    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> Dim:  # type: ignore[override]
        return cls(*iterable)

    @classmethod
    def chunked(cls, size: int, axes: Sequence[int], mesh: DeviceMesh) -> Dim:
        """A dim that each mesh axis in turn chunks as `torch.chunk` does."""
        if not axes:
            return cls(size)
        return cls(size, tuple(axes), nested_chunk_sizes(size, [mesh.size(a) for a in axes]))

    @property
    def is_crowded(self) -> bool:
        """Whether a shard has more than twice its share of the rows."""
        return max(self.sizes, default=0) > 2 * -(-self.size // max(1, len(self.sizes)))

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where every shard starts, and the end: len(sizes) + 1 ascending integers."""
        return cut(self.sizes).offsets

    @property
    def edges(self) -> Any:
        """The offsets as a numpy array."""
        return cut(self.sizes).edges

    def windows(self, before: int = 0, after: int = 0) -> Kept[tuple[int, int]]:
        """The rows [start, stop) of every shard, with so many before and after them."""
        return windows(cut(self.sizes), before, after)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The rows [start, stop) of every shard; of a whole dim all rows."""
        return self.windows() if self.axes else ((0, self.size),)

    @property
    def is_cut(self) -> bool:
        """Whether it lies in several shards; mesh axes of size 1 cut nothing."""
        return len(self.sizes) > 1

    @property
    def whole(self) -> Dim:
        """The dim on every rank."""
        return Dim(self.size) if self.axes else self

    def cut_at(self, edges: Sequence[int]) -> Dim:
        """A dim that the same axes cut at `edges`: len(sizes) + 1, the last one its size.

        Of a whole dim only the size counts.
        """
        if not self.axes:
            return Dim(edges[-1])
        return Dim(edges[-1], self.axes, tuple(b - a for a, b in pairwise(edges)))

    def scaled(self, times: int, per: int = 1) -> Dim:
        """A dim with `times` rows in the place of each `per` rows."""
        sizes = scaled(cut(self.sizes), times, per) if self.axes else ()
        return Dim(self.size * times // per, self.axes, sizes)

    def clipped(self, start: int, stop: int) -> Dim:
        """The rows [start, stop); every shard keeps what it has of them."""
        if not self.axes:
            return Dim(stop - start)
        sizes = clipped(cut(self.sizes), start, stop)
        return Dim(sizes.offsets[-1], self.axes, sizes)


def whole_dims(shape: Sequence[int]) -> tuple[Dim, ...]:
    """The dims of a tensor that every rank has whole."""
    return tuple([Dim(n) for n in shape])


def axes_in(dims: Iterable[Dim]) -> tuple[int, ...]:
    """The mesh axes that shard any of the dims, ascending."""
    return tuple(sorted([a for d in dims for a in d.axes]))


@dataclass(frozen=True, eq=False, repr=False)
class Spec:
    """How one tensor lies on a mesh: frozen, hashable, the same on every rank.

    dims: one `Dim` for each tensor dimension.
    partial: (mesh axis, reduce op) for every axis along which ranks hold addends.
    """

    mesh: DeviceMesh
    dims: tuple[Dim, ...]
    partial: tuple[tuple[int, str], ...] = ()

    @classmethod
    def of(
        cls,
        mesh: DeviceMesh,
        placements: Sequence[dt.Placement],
        shape: Sequence[int],
        sizes: Mapping[int, Sequence[int]] | None = None,
    ) -> Spec:
        """The spec for torch placements, one for each mesh axis.

        sizes: for a sharded tensor dim, the sizes of all its shards (row-major over the mesh axes
        that shard it). A dim that is not named is cut as `torch.chunk` cuts.
        Raises ValueError where placements, shape, mesh and sizes do not fit each other.
        """
        ndim = len(shape)
        if isinstance(placements, dt.Placement):
            raise ValueError(f"placements {placements!r}: one for each mesh axis, in a list")
        if len(placements) != mesh.ndim:
            raise ValueError(f"{len(placements)} placements for a mesh of {mesh.ndim} axes")
        axes: list[list[int]] = [[] for _ in shape]
        partial = []
        for axis, placement in enumerate(placements):
            if type(placement) is dt.Shard:
                if not -ndim <= placement.dim < ndim:
                    raise ValueError(f"{placement} for a tensor of {ndim} dims")
                axes[placement.dim % ndim].append(axis)
            elif isinstance(placement, dt.Partial):
                partial.append((axis, str(placement.reduce_op)))
            elif not isinstance(placement, dt.Replicate):
                raise ValueError(f"placement {placement!r}: use Shard, Replicate or Partial")
        for d in sizes or ():
            if not -ndim <= d < ndim:
                raise ValueError(f"sizes for dim {d} of a tensor of {ndim} dims")
        given = {
            d % ndim if ndim else d: s if type(s) is Cut else cut(map(int, s))
            for d, s in (sizes or {}).items()
        }
        dims = []
        for d, (size, on) in enumerate(zip(shape, axes, strict=True)):
            if not on:
                if d in given:
                    raise ValueError(f"sizes for dim {d}, which no mesh axis shards")
                dims.append(Dim(int(size)))
                continue
            parts = [mesh.size(a) for a in on]
            known = given.get(d) or nested_chunk_sizes(int(size), parts)
            if len(known) != prod(parts) or known.offsets[-1] != size or known.least < 0:
                raise ValueError(
                    f"sizes {list(known)} for dim {d} of size {size}: "
                    f"expected {prod(parts)} sizes that add up to {size}"
                )
            dims.append(Dim(int(size), tuple(on), known))
        return cls(mesh, tuple(dims), tuple(partial))

    @classmethod
    def whole(cls, mesh: DeviceMesh, shape: Sequence[int]) -> Spec:
        """The spec of a tensor that every rank has whole."""
        return cls(mesh, whole_dims(shape))

    @cached_property
    def shape(self) -> torch.Size:
        """The global shape."""
        return torch.Size([d.size for d in self.dims])

    @cached_property
    def placements(self) -> tuple[dt.Placement, ...]:
        """Torch's placements, one for each mesh axis."""
        found: list[dt.Placement] = [dt.Replicate()] * self.mesh.ndim
        for i, d in enumerate(self.dims):
            for axis in d.axes:
                found[axis] = dt.Shard(i)
        for axis, op in self.partial:
            found[axis] = dt.Partial(op)
        return tuple(found)

    @cached_property
    def sizes(self) -> dict[int, tuple[int, ...]]:
        """For each sharded tensor dim the sizes of all its shards."""
        return {i: d.sizes for i, d in enumerate(self.dims) if d.axes}

    @cached_property
    def cuts(self) -> tuple[Dim, ...]:
        """The dims that mesh axes shard, in order."""
        return tuple([d for d in self.dims if d.axes])

    @cached_property
    def varying(self) -> tuple[int, ...]:
        """The mesh axes along which local tensors are shards, ascending."""
        return axes_in(self.dims)

    @cached_property
    def index(self) -> tuple[int, ...]:
        """This rank's shard number in each tensor dim (0 in a whole dim)."""
        return self.index_at(self.coordinate)

    def index_at(self, coordinate: Sequence[int]) -> tuple[int, ...]:
        """The shard number in each tensor dim of the rank at a mesh coordinate."""
        found = []
        for d in self.dims:
            i = 0
            for axis in d.axes:
                i = i * self.mesh.size(axis) + coordinate[axis]
            found.append(i)
        return tuple(found)

    @cached_property
    def coordinate(self) -> tuple[int, ...]:
        """This rank's place on the mesh."""
        place = self.mesh.get_coordinate()
        if place is None:
            raise ValueError("this rank is not part of the mesh")
        return tuple(place)

    @cached_property
    def alone(self) -> bool:
        """Whether there is nobody that has the rows beside this rank's: see `paged.alone`."""
        return (self.mesh.mesh_dim_names or ("",))[0] == ALONE

    @cached_property
    def offset(self) -> tuple[int, ...]:
        """The global index of this rank's first element in each dim."""
        return tuple(
            d.offsets[i] if d.axes else 0 for d, i in zip(self.dims, self.index, strict=True)
        )

    @cached_property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The rows [start, stop) of this rank's shard in each dim."""
        return self.spans_at(self.coordinate)

    @property
    def block(self) -> tuple[slice, ...]:
        """This rank's shard as an index of the whole tensor."""
        return tuple([slice(a, b) for a, b in self.spans])

    def spans_at(self, coordinate: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """The rows [start, stop) in each dim of the rank at a mesh coordinate."""
        index = self.index_at(coordinate)
        return tuple([d.spans[i] for d, i in zip(self.dims, index, strict=True)])

    def places(self, axes: Sequence[int]) -> list[tuple[int, ...]]:
        """The coordinates of all ranks that differ from this one along `axes` only, row-major.

        So `comm.group(mesh, axes)` numbers them.
        """
        ranges = [
            range(self.mesh.size(a)) if a in axes else (i,) for a, i in enumerate(self.coordinate)
        ]
        return list(product(*ranges))

    @cached_property
    def shard_numel(self) -> int:
        """The elements of a shard, on average."""
        return self.shape.numel() // prod([len(d.sizes) for d in self.dims if d.axes])

    @cached_property
    def thin(self) -> bool:
        """Whether some rank has less than two rows of a cut dim: its strides may tell nothing."""
        return any(len(d.sizes) > 1 and self._least(i) < 2 for i, d in enumerate(self.dims))

    @cached_property
    def vacant(self) -> bool:
        """Whether some rank has no elements of what has some."""
        empty = [i for i, d in enumerate(self.dims) if d.axes and not self._least(i)]
        return 0 not in self.shape and bool(empty)

    def _least(self, d: int) -> int:
        """The fewest rows of a cut dim on a rank that runs."""
        return self.dims[d].sizes[self.index[d]] if self.alone else cut(self.dims[d].sizes).least

    @cached_property
    def local_shape(self) -> torch.Size:
        """The shape of this rank's local tensor."""
        return self.local_shape_at(self.coordinate)

    def local_shape_at(self, coordinate: Sequence[int]) -> torch.Size:
        """The shape of the local tensor of the rank at a mesh coordinate."""
        index = self.index_at(coordinate)
        return torch.Size(
            [d.sizes[i] if d.axes else d.size for d, i in zip(self.dims, index, strict=True)]
        )

    @cached_property
    def cotangent(self) -> Spec:
        """The spec of a gradient of a tensor with this spec: Partial becomes Replicate."""
        return Spec(self.mesh, self.dims) if self.partial else self

    def replicated(self) -> Spec:
        """The spec of the same tensor whole on every rank."""
        return Spec(self.mesh, tuple([d.whole for d in self.dims]))

    def with_dims(self, dims: Iterable[Dim]) -> Spec:
        """Other dims on the same mesh, nothing partial."""
        return Spec(self.mesh, tuple(dims))

    def replace(self, dims: Mapping[int, Dim]) -> Spec:
        """Some dims replaced, by their number."""
        new = {d % len(self.dims): dim for d, dim in dims.items()}
        kept = tuple([new.get(i, d) for i, d in enumerate(self.dims)])
        return Spec(self.mesh, kept, self.partial)

    def insert(self, d: int, dim: Dim) -> Spec:
        """A new dim before dim d."""
        return Spec(self.mesh, (*self.dims[:d], dim, *self.dims[d:]), self.partial)

    def drop(self, dims: Iterable[int]) -> Spec:
        """Without some dims."""
        gone = {d % len(self.dims) for d in dims}
        kept = tuple([d for i, d in enumerate(self.dims) if i not in gone])
        return Spec(self.mesh, kept, self.partial)

    def whole_in(self, dims: Iterable[int]) -> Spec:
        """Some dims whole on every rank."""
        return self.replace({d: self.dims[d].whole for d in dims})

    @cached_property
    def _key(self) -> tuple[object, ...]:
        return (self.mesh, self.dims, self.partial)

    @cached_property
    def _hash(self) -> int:
        return hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Spec) and self._hash == other._hash and self._key == other._key

    def __repr__(self) -> str:
        mesh = "x".join(str(n) for n in self.mesh.shape)
        cuts = "".join(f", dim {i}: {list(s)}" for i, s in self.sizes.items())
        places = ", ".join(str(p) for p in self.placements)
        return f"Spec({tuple(self.shape)} on {mesh} mesh, [{places}]{cuts})"

    def _repr_html_(self, title: str = "Spec") -> str:
        """A picture of the cut, which notebooks show: the first two sharded dims."""
        cut = [d for d, dim in enumerate(self.dims) if dim.axes]
        # beside one sharded dim, the last whole one
        whole = [d for d in range(len(self.dims)) if d not in cut]
        shown = [*cut, *reversed(whole)][:2]
        ways = {place: self.index_at(place) for place in product(*map(range, self.mesh.shape))}
        held: dict[tuple[int, int], list[int]] = {}
        place = self.mesh.get_coordinate()
        own = None
        for at, index in ways.items():
            block = (*(index[d] for d in shown), 0, 0)[:2]
            held.setdefault((block[0], block[1]), []).append(int(self.mesh.mesh[at]))
            if place is not None and at == tuple(place):
                own = (block[0], block[1])
        sizes = [self.dims[d].sizes or (self.dims[d].size,) for d in shown]
        names = [f"dim {d}: {self.dims[d].size}" for d in shown]
        sizes, names = [*sizes, (1,), (1,)][:2], [*names, "", ""][:2]
        return (
            f"<div><code>{escape(title)}: {escape(repr(self))}</code><br>"
            f"{picture.cut(sizes[0], sizes[1], held, own, (names[0], names[1]))}</div>"
        )
