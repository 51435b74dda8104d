"""Convolutions on the active sites of a grid, whose features are sharded.

Sites are integer coordinates (N, D), features (N, C), sharded alike along dim 0 in any sizes and
any order. A rulebook says which site meets which weight (Graham et al., 2018, "3D Semantic
Segmentation with Submanifold Sparse Convolutional Networks", section 3): it is made once for a set
of coordinates and kept while they live. A convolution is then one all-to-all of the rows that other
ranks need, each once, a product for each offset of the kernel, and a sum.

Weights are (prod(kernel_size), C_in, C_out), offsets in row-major order. A batch is a coordinate
more, with kernel size 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import torch
from torch import Tensor

from .. import comm
from ..cache import of_tensor
from ..comm.observers import simulated_rank
from ..comm.route import Route, arrivals, find
from ..comm.rows import exchange_rows, requests
from ..errors import UnsupportedOpError
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from ..tensor.redistribute import fit

__all__ = ["sparse_conv", "submanifold_conv"]

Many = int | Sequence[int]


@dataclass(frozen=True)
class _Rulebook:
    """coords: of this rank's output sites; None: the input's. sites: how they lie. route: to the
    inputs that they meet.

    pairs: for each offset of the kernel (place of the input among those that arrive, output row).
    """

    coords: Tensor | None
    sites: Dim
    route: Route | None
    pairs: tuple[tuple[Tensor, Tensor], ...]


def submanifold_conv(
    features: ShardTensor,
    coords: ShardTensor,
    weight: Tensor,
    kernel_size: Many,
    dilation: Many = 1,
    bias: Tensor | None = None,
) -> ShardTensor:
    """A convolution whose output sites are its input sites: (N, C_in) to (N, C_out).

    As a dense convolution of odd kernel sizes, padded to the size of its input, at active sites.
    Sends the rows of features that other ranks' sites neighbour, each once; backward their summed
    gradients, and an all-reduce of the weight's. Memory: features of all pairs of neighbours of own
    sites. Raises ValueError for shapes that do not fit, even kernels and sites that occur twice,
    UnsupportedOpError for features and coordinates that are not sharded along dim 0 alike.
    """
    d = coords.shape[1]
    kernel, dilate = _many(kernel_size, d), _many(dilation, d)
    if any(k % 2 == 0 for k in kernel):
        raise ValueError(f"submanifold_conv with kernel {kernel}: use odd sizes")
    padding = tuple(a * (k // 2) for k, a in zip(kernel, dilate, strict=True))
    sizes = (kernel, (1,) * d, padding, dilate)
    return _convolved(features, coords, weight, bias, sizes, None, True)[0]


def sparse_conv(
    features: ShardTensor,
    coords: ShardTensor,
    weight: Tensor,
    kernel_size: Many,
    stride: Many = 1,
    padding: Many = 0,
    dilation: Many = 1,
    bias: Tensor | None = None,
    *,
    shape: Sequence[int] | None = None,
) -> tuple[ShardTensor, ShardTensor]:
    """A convolution at every output site that an active site reaches: (features, coordinates).

    Input site stride * o - padding + dilation * k reaches output o through offset k of the kernel.
    shape: of the dense grid, which bounds the outputs as in a dense convolution; None: the grid has
    no bounds. An output site lies on the first rank that reaches it, sorted there.
    Cost as of `submanifold_conv`; the first call with some coordinates also exchanges the numbers
    of output sites that several ranks may reach. Raises ValueError for shapes that do not fit and
    sites that occur twice, UnsupportedOpError for rows that are not sharded along dim 0 alike.
    """
    d = coords.shape[1]
    sizes = (_many(kernel_size, d), _many(stride, d), _many(padding, d), _many(dilation, d))
    bounds = None if shape is None else _many(shape, d)
    return _convolved(features, coords, weight, bias, sizes, bounds, False)


Sizes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _many(n: Many, d: int) -> tuple[int, ...]:
    found = (n,) * d if isinstance(n, int) else tuple(n)
    if len(found) != d:
        raise ValueError(f"{found} for coordinates of {d} dims")
    return found


def _convolved(
    features: ShardTensor,
    coords: ShardTensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: Sizes,
    shape: tuple[int, ...] | None,
    same: bool,
) -> tuple[ShardTensor, ShardTensor]:
    """(features, coordinates) of the sites of the result: every offset's pairs, added up."""
    spec, at = features._spec, coords._spec
    mesh, sites = spec.mesh, spec.dims[0]
    if at.dims != (sites, Dim(len(sizes[0]))) or not sites.axes or spec.partial or at.partial:
        raise UnsupportedOpError(f"features on {spec}, coordinates on {at}: shard both along dim 0")
    if coords.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"coordinates of {coords.dtype}; expected int64 or int32")
    if weight.ndim != 3 or tuple(weight.shape[:2]) != (prod(sizes[0]), spec.shape[1]):
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)}: expected ({prod(sizes[0])}, "
            f"{spec.shape[1]}, C_out)"
        )
    book = of_tensor(
        coords._local,
        (simulated_rank(), _Rulebook, at, sizes, shape, same),
        lambda: _rulebook(coords._local.long(), at, sizes, shape, same),
    )
    x, w, b = fit(
        mesh, sites.axes,
        (features, [sites, Dim(spec.shape[1])]), (weight, None), (bias, None),
    )  # fmt: skip
    if book.route is not None:
        x = arrivals(x, book.route)
    sites_here = book.sites.sizes[comm.rank(comm.group(mesh, sites.axes))]
    out = x.new_zeros(sites_here, w.shape[2])
    # every offset, also without pairs: the ranks meet in backward
    for k, (source, target) in enumerate(book.pairs):
        out = out.index_add(0, target, x.index_select(0, source) @ w[k])
    out = out if b is None else out + b
    dims = (book.sites, Dim(weight.shape[2]))
    found = coords
    if book.coords is not None:
        found = wrap(book.coords.to(coords.dtype), Spec(mesh, (book.sites, at.dims[1])))
    return wrap(out, Spec(mesh, dims)), found


# rulebooks ---------------------------------------------------------------------------------------


def _rulebook(
    own: Tensor, spec: Spec, sizes: Sizes, shape: tuple[int, ...] | None, same: bool
) -> _Rulebook:
    """Which input site (coords of this rank: own) meets which output site through which offset."""
    sites = spec.dims[0]
    group = comm.group(spec.mesh, sites.axes)
    _, stride, padding, dilation = (own.new_tensor(s) for s in sizes)
    offsets = own.new_tensor(list(product(*(range(k) for k in sizes[0])))) * dilation - padding
    grid = _Grid(own, offsets.abs().amax(0), sites, group)
    out = own if same else _reached(own, offsets, stride, shape, sizes, grid)
    n = comm.counts(len(out), out, group)
    found = sites if same else Dim(sum(n), sites.axes, n)
    # for each offset the global number of the input site that each output site meets, or -1
    asked = (out * stride + offsets[:, None]).reshape(-1, own.shape[1])  # (K * M, D)
    number = grid.rows(asked).reshape(len(offsets), -1)
    met = number >= 0
    route, place = None, number
    if comm.size(group) > 1:
        route = find(number[met], sites.sizes, group)
        place = torch.full_like(number, -1)
        # pairs pick from what arrives
        assert route.place is not None
        place[met] = route.place
        route = route._replace(place=None)
    pairs = tuple((p[m], m.nonzero().reshape(-1)) for p, m in zip(place, met, strict=True))
    # the coordinates themselves would keep alive what the rulebook is kept with
    return _Rulebook(None if same else out, found, route, pairs)


class _Grid:
    """Sites by coordinate: a directory whose entries are dealt out to the ranks by their key.

    A rank finds its own sites itself, and asks the directory only where the bounds of another
    rank's sites hold the coordinate.
    """

    def __init__(self, own: Tensor, reach: Tensor, sites: Dim, group: str) -> None:
        self.group, self.n = group, len(sites.sizes)
        far = 2**62
        low = own.amin(0) if len(own) else torch.full_like(reach, far)
        high = own.amax(0) if len(own) else torch.full_like(reach, -far)
        bounds = comm.gather(torch.stack([low, high])[None], 0, [1] * self.n, group)
        self.low, self.high = bounds[:, 0], bounds[:, 1]  # (ranks, D)
        self.first = self.low.amin(0) - reach if sites.size else torch.zeros_like(reach)
        span = self.high.amax(0) + reach + 1 - self.first if sites.size else torch.ones_like(reach)
        self.span = [int(s) for s in span]
        if prod(self.span) >= 2**62:
            raise ValueError(
                f"coordinates that span {self.span}: their keys need more than 62 bits"
            )
        self.block = -(-prod(self.span) // self.n)
        key = self.key(own)
        start = sites.offsets[comm.rank(group)]
        self.own, order = key.sort()
        self.number = order + start
        if self.n > 1:
            at, entry = comm.asked(self.dealt(key), [self.block] * self.n, sites.sizes, group)
            self.kept, order = at.sort()
            self.entry = entry[order]
        twice = self.own if self.n == 1 else self.kept
        if any(comm.counts(int(bool((twice[1:] == twice[:-1]).any())), own, group)):
            raise ValueError("coordinates: a site occurs more than once")

    def key(self, at: Tensor) -> Tensor:
        """A number for each site in bounds: row-major."""
        key = torch.zeros(len(at), dtype=torch.int64, device=at.device)
        for d, n in enumerate(self.span):
            key = key * n + (at[:, d] - self.first[d])
        return key

    def dealt(self, key: Tensor) -> Tensor:
        """Where a key lies in the directory: neighbours on different ranks, so all have a share."""
        return key % self.n * self.block + key // self.n

    def rows(self, at: Tensor) -> Tensor:
        """The global row of each site, -1 where there is none."""
        inside = [((at >= self.low[r]) & (at <= self.high[r])).all(1) for r in range(self.n)]
        me = comm.rank(self.group)
        out = torch.full((len(at),), -1, dtype=torch.int64, device=at.device)
        out[inside[me]] = _found(self.own, self.number, self.key(at[inside[me]]))
        if self.n > 1:
            others = torch.stack([inside[r] for r in range(self.n) if r != me]).any(0) & (out < 0)
            wanted, back = torch.unique(self.key(at[others]), return_inverse=True)
            keys = self.dealt(wanted)
            out[others] = _answered(
                keys,
                [self.block] * self.n,
                self.group,
                lambda rows: _found(self.kept, self.entry, rows),
            )[back]
        return out


def _answered(
    keys: Tensor, sizes: Sequence[int], group: str, answer: Callable[[Tensor], Tensor]
) -> Tensor:
    """answer(local keys) of the rank that has each key."""
    order, counts, asked, rows = requests(keys, sizes, group)
    out = torch.empty_like(keys)
    out[order] = exchange_rows(answer(rows), asked, counts, group, "take")
    return out


def _found(keys: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """values where keys (sorted) are wanted, else -1."""
    if not len(keys):
        return torch.full_like(wanted, -1)
    at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return torch.where(keys[at] == wanted, values[at], -1)


def _reached(
    own: Tensor,
    offsets: Tensor,
    stride: Tensor,
    shape: tuple[int, ...] | None,
    sizes: Sizes,
    grid: _Grid,
) -> Tensor:
    """This rank's output sites: reached from its inputs, and from no lower rank's."""
    at = (own - offsets[:, None]).reshape(-1, own.shape[1])
    at = at[(at % stride == 0).all(1)].div(stride, rounding_mode="floor")
    if shape is not None:
        last = [
            (n + 2 * p - a * (k - 1) - 1) // s for n, k, s, p, a in zip(shape, *sizes, strict=True)
        ]
        at = at[((at >= 0) & (at <= own.new_tensor(last))).all(1)]
    at = torch.unique(at, dim=0)
    if grid.n == 1:
        return at
    # scaled back, an output site is within the reach of an input site: its key is in bounds
    keys = grid.dealt(grid.key(at * stride))
    return at[_answered(keys, [grid.block] * grid.n, grid.group, _first).bool()]


def _first(rows: Tensor) -> Tensor:
    """1 where a row is named for the first time, else 0."""
    ascending, order = rows.sort(stable=True)
    new = torch.ones_like(rows)
    new[1:] = ascending[1:] != ascending[:-1]
    return torch.empty_like(rows).scatter_(0, order, new)
