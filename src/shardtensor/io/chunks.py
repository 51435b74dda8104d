"""Chunks of storage beside what ranks read of them: cuts that fit, and a warning where none is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from typing import NamedTuple

import torch.distributed as dist

from ..cache import cached
from ..caller import caller

# bytes touched over bytes wanted from which on a warning is due
AMPLIFIED = 1.5
# bytes of chunks below which a read takes as long, whatever is wanted of it
SMALL = 2**16
# how much larger than the mean the largest shard may be that is advised
EVEN = 1.25
# what arrays were told of: those that lie alike, as the variables of a store do, are told of once
_warned: set[tuple[object, ...]] = set()


class Cut(NamedTuple):
    """A dim that ranks share: its number in the array, the rows of it that are cut, their sizes."""

    dim: int
    rows: tuple[int, int]
    sizes: tuple[int, ...]


def chunked(start: int, stop: int, chunk: int, parts: int) -> tuple[int, ...]:
    """Sizes of `parts` shards of the rows [start, stop) that end at multiples of `chunk`."""
    first, last = start // chunk, -(-stop // chunk)
    ends = [first + (last - first) * i // parts for i in range(parts + 1)]
    rows = [min(max(e * chunk, start), stop) for e in ends]
    return tuple(b - a for a, b in pairwise(rows))


def covered(
    shape: Sequence[int], chunks: Sequence[int], ranges: Sequence[tuple[int, int]]
) -> list[int]:
    """For each dim, the rows of the chunks that a block of (start, stop) meets."""
    return [
        min(n, -(-b // c) * c) - a // c * c if a < b else 0
        for (a, b), n, c in zip(ranges, shape, chunks, strict=True)
    ]


def heed(
    name: str,
    shape: Sequence[int],
    chunks: Sequence[int] | None,
    item: int,
    ranges: Sequence[tuple[int, int]],
    cuts: Mapping[int, Cut],
) -> None:
    """Warn, on the first rank, of an array of whose chunks some rank reads much more than it wants.

    Once for all arrays of one shape that are stored and cut alike. cuts: by the dim of the sample
    that is cut.
    """
    if not chunks or (dist.is_initialized() and dist.get_rank()):
        return
    torn = {c.dim: _most_torn(c, chunks[c.dim]) for c in cuts.values()}
    ranges = [torn.get(d, r) for d, r in enumerate(ranges)]
    wanted = [b - a for a, b in ranges]
    if not prod(wanted):
        return
    kind = (*shape, *chunks, item, *cuts.items())
    if kind in _warned:
        return
    touched = covered(shape, chunks, ranges)
    times = prod(touched) / prod(wanted)
    if times <= AMPLIFIED or prod(touched) * item < SMALL:
        return
    _warned.add(kind)
    whole = ", ".join(
        f"{n} of {m} rows in its dim {d}"
        for d, (n, m) in enumerate(zip(wanted, touched, strict=True))
        if n < m
    )
    frame = caller()
    warnings.warn_explicit(
        f"{name}: a rank wants {prod(wanted) * item / 1e6:.3g} MB of chunks {tuple(chunks)} "
        f"that have {prod(touched) * item / 1e6:.3g} MB ({times:.1f} times as many: {whole}). "
        + _advice(chunks, wanted, touched, cuts)
        + f"tore chunks of at most {_better(wanted, cuts)}",
        UserWarning,
        frame.f_code.co_filename if frame else name,
        frame.f_lineno if frame else 1,
    )


@cached
def _most_torn(cut: Cut, chunk: int) -> tuple[int, int]:
    """The rows of the rank that reads the most for what it wants of the dim; none: (0, 0)."""
    edges = accumulate(cut.sizes, initial=cut.rows[0])
    held = [(a, b) for a, b in pairwise(edges) if a < b]
    return max(
        held, key=lambda r: (-(-r[1] // chunk) - r[0] // chunk) / (r[1] - r[0]), default=(0, 0)
    )


def _advice(
    chunks: Sequence[int], wanted: Sequence[int], touched: Sequence[int], cuts: Mapping[int, Cut]
) -> str:
    """Cuts that end where chunks do, if they leave ranks about as much each; up to "or s"."""
    torn = {d: c for d, c in cuts.items() if touched[c.dim] > wanted[c.dim]}
    fit, uneven = {}, []
    for d, c in torn.items():
        sizes = chunked(*c.rows, chunks[c.dim], len(c.sizes))
        if max(sizes) * len(sizes) <= EVEN * sum(sizes):
            fit[d] = sizes
        else:
            uneven.append(f"{sizes} of the sample's dim {d}")
    if fit:
        return f"Cut where chunks end (sizes={fit}, see io.aligned_sizes), or s"
    told = f"Cuts where chunks end leave ranks uneven, {' and '.join(uneven)}: s"
    return told if uneven else "S"


def _better(wanted: Sequence[int], cuts: Mapping[int, Cut]) -> tuple[int, ...]:
    """Chunks of which one rank's block is made of whole ones, or of the fewest."""
    found = [max(1, n) for n in wanted]
    for c in cuts.values():
        held = [n for n in c.sizes if n] or [1]
        # as torch.chunk cuts: all alike but the last
        alike = len(set(held[:-1])) <= 1 and held[-1] <= held[0]
        found[c.dim] = held[0] if alike else min(held)
    return tuple(found)
