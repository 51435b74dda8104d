"""Where shards go when a tensor takes another shape: plans of the blocks of its dims.

Input and output dims fall into blocks of equal products. A shard of a leading dim is a contiguous
part of the flattened block, so it survives any reshape of the block once its edges lie on whole
rows of the output. Shards of other dims of a block move to the leading dim first, but where that
has too few rows for all ranks: they go around it then, by another block (see `_around`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod
from typing import NamedTuple

from ...cache import cached
from ...cuts import chunk_sizes
from ...spec import Dim, Spec, axes_in, whole_dims
from ...tensor import recut

# the largest shard over the mean of all from which on a cut is uneven
UNEVEN = 1.25
# windows a rank below which one more is much
FEW = 4


class Block(NamedTuple):
    """Runs of dims of the input and of the output with equal products.

    lead, out: the first dims of more than one row. rows, per_row: elements of a row of these.
    """

    ins: list[int]
    outs: list[int]
    lead: int
    out: int
    rows: int
    per_row: int

    @classmethod
    def of(cls, ins: list[int], outs: list[int], a: Sequence[int], b: Sequence[int]) -> Block:
        lead, out = _lead(ins, a), _lead(outs, b)
        rows, per_row = prod(a[d] for d in ins if d > lead), prod(b[d] for d in outs if d > out)
        return cls(ins, outs, lead, out, rows, per_row)

    def on_rows(self, dim: Dim) -> Dim:
        """The leading dim with its cuts where whole rows of the output begin."""
        return on_multiples(dim, self.per_row // gcd(self.per_row, self.rows))

    def along(self, spec: Spec, axes: tuple[int, ...]) -> Dim:
        """The leading dim cut by these mesh axes."""
        return self.on_rows(Dim.chunked(spec.dims[self.lead].size, axes, spec.mesh))


def _runs(a: Sequence[int], b: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Pairs of runs of input and output dims with equal products; numel is not zero."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) or j < len(b):
        left = a[i] if i < len(a) else 1
        right = b[j] if j < len(b) else 1
        if i < len(a) and left == 1 and (right != 1 or j >= len(b)):
            found.append(([i], []))
            i += 1
            continue
        if j < len(b) and right == 1 and (left != 1 or i >= len(a)):
            found.append(([], [j]))
            j += 1
            continue
        ins, outs = [i], [j]
        while left != right:
            if left < right:
                i += 1
                ins.append(i)
                left *= a[i]
            else:
                j += 1
                outs.append(j)
                right *= b[j]
        i, j = i + 1, j + 1
        found.append((ins, outs))
    return found


def _lead(dims: Sequence[int], sizes: Sequence[int]) -> int:
    return next((d for d in dims if sizes[d] > 1), dims[0])


def gathered_on_lead(spec: Spec, ins: Sequence[int], lead: int) -> Dim:
    """The leading dim of a block, sharded by all axes that shard any dim of the block."""
    dim = spec.dims[lead]
    axes = axes_in([spec.dims[d] for d in ins])
    if axes == dim.axes:
        return dim
    if dim.axes and axes[: len(dim.axes)] == dim.axes:
        # keep the outer cut, so that only the inner axes move
        inner = prod(spec.mesh.size(a) for a in axes[len(dim.axes) :])
        return Dim(dim.size, axes, tuple(s for n in dim.sizes for s in chunk_sizes(n, inner)))
    return Dim.chunked(dim.size, axes, spec.mesh)


def on_multiples(dim: Dim, q: int) -> Dim:
    """The dim with its cuts moved to the nearest multiples of q.

    Of few that end in padding, which is all the last rank's, nearest to even cuts: the last rank
    would have more at one level of windows after the other, and as much is sent.
    """
    if q == 1 or all(o % q == 0 for o in dim.offsets):
        return dim
    n, (first, *rest) = len(dim.sizes), dim.sizes
    padded = rest and rest[-1] > first and set(rest[:-1]) <= {first}
    if padded and dim.size % q == 0 and n < dim.size // q < FEW * n:
        return dim.cut_at([round(i * (dim.size // q) / n) * q for i in range(n + 1)])
    return dim.cut_at([*(min(dim.size, (o + q // 2) // q * q) for o in dim.offsets[:-1]), dim.size])


@cached
def plan(spec: Spec, shape: tuple[int, ...]) -> tuple[tuple[Dim, ...], Spec, Spec | None]:
    """(the dims in which the local reshape is right, the spec of its result, where that goes then).

    The last is None where it stays.
    """
    a = spec.shape
    before, after = list(spec.dims), list(whole_dims(shape))
    cut, whole = [], []
    for ins, outs in _runs(a, shape):
        if not any(spec.dims[d].axes for d in ins):
            if ins and outs:
                whole.append(Block.of(ins, outs, a, shape))
        elif outs:
            cut.append(Block.of(ins, outs, a, shape))
        else:
            before[ins[0]] = Dim(1)
    then: dict[int, Dim] = {}
    for block in cut:
        dim = block.on_rows(gathered_on_lead(spec, block.ins, block.lead))
        for d in block.ins:
            before[d] = Dim(a[d])
        way = _around(spec, shape, block, dim, whole) if a.numel() >= recut.WHOLE else None
        if way is not None:
            whole.remove(way.by)
            block, dim = way.by, way.dim
            then |= way.then
        before[block.lead] = dim
        after[block.out] = dim.scaled(block.rows, block.per_row)
    found = Spec(spec.mesh, tuple(after), spec.partial)
    return tuple(before), found, found.replace(then) if then else None


class Way(NamedTuple):
    """A whole block along which shards are cut instead, how, and where rows go after that."""

    by: Block
    dim: Dim
    then: dict[int, Dim]


def _around(
    spec: Spec, shape: Sequence[int], block: Block, dim: Dim, whole: Sequence[Block]
) -> Way | None:
    """The way around a leading dim of too few rows; None where it has as good a cut as any.

    Where another block in front has rows for all, shards stay there: its rows are samples. Else
    they come back to a dim of their own block that has rows for all; if none has, they stay along
    the first block that has.
    """
    axes = dim.axes
    bound = _uneven(dim) / UNEVEN
    if prod([_uneven(spec.dims[d]) for d in block.ins if spec.dims[d].axes]) >= bound:
        return None
    ways = [Way(b, b.along(spec, axes), {}) for b in whole]
    ways = [w for w in ways if _uneven(w.dim) <= min(bound, UNEVEN)]
    if not ways:
        return None
    front = [w for w in ways if w.by.lead < block.lead]
    if front:
        return max(front, key=lambda w: w.dim.size)
    for d in block.outs:
        own = Dim.chunked(shape[d], axes, spec.mesh)
        if _uneven(own) <= min(bound, UNEVEN):
            way = max(ways, key=lambda w: w.dim.size)
            return way._replace(then={way.by.out: Dim(shape[way.by.out]), d: own})
    return ways[0]


def _uneven(dim: Dim) -> float:
    """The largest shard over the mean of all."""
    return max(dim.sizes) * len(dim.sizes) / max(1, dim.size)
