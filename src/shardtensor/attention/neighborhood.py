"""Neighbourhood attention: every query attends to a window of its nearest keys, in 1 to 3 dims.

Hassani et al., arXiv 2204.07143; dilation: 2209.15001; causal: 2403.04690; stride: 2504.16922. The
windows are NATTEN's (compared with NATTEN 0.21.7 for every kernel size, stride and dilation up to
7, 7 and 3). Along each dim, for a kernel of k tokens:
- dilation d: a query sees tokens of its own residue class modulo d; what follows holds among these,
  counted p = 0 to n - 1;
- stride s: queries in a group of s share the window of the group's leader; the leader is token
  s // 2 of the group, or, if causal, the last one; in a group cut by the border, the last at most;
- the window is [leader - k // 2, leader - k // 2 + k), shifted inward at the border: it keeps its
  size;
- causal: the window is [leader - k + 1, p], cut at the border.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..settings import current
from .tiles import Line, attend

Fn = TypeVar("Fn", bound=Callable[..., Any])
Ints = int | Sequence[int]
Bools = bool | Sequence[bool]
NAME = "neighborhood_attention"
# where NATTEN has fused kernels; elsewhere it would make all scores
NATTEN_DEVICES = ("cuda",)


class Place(NamedTuple):
    """Local rows along one dim: where the queries and the keys start, and how many there are."""

    query: int
    key: int
    queries: int
    keys: int


# typed as what keeps the signature
_dispatched: Callable[[Fn], Fn] = cast(
    Any,
    torch.overrides.wrap_torch_function(lambda query, key, value, *_, **__: (query, key, value)),
)


@_dispatched
def neighborhood_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    *,
    stride: Ints = 1,
    dilation: Ints = 1,
    is_causal: Bools = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v over the window of each query, as natten.functional.na1d, na2d, na3d.

    query (batch, *spatial, heads, head_dim), spatial being 1 to 3 dims; key and value alike, value
    of any head_dim, both perhaps with fewer heads, each for a group of query heads. kernel_size,
    stride (at most kernel_size), dilation and is_causal: one for all spatial dims or one for each.
    scale: default head_dim ** -0.5. Differentiable, also twice.

    On ShardTensors the result is sharded as the query. Each rank fetches the rows of keys and
    values that windows of its queries reach beyond its own: per sharded spatial dim one exchange
    each way, keys and values in one message where their shapes are the same. Memory is that of the
    rank's share with these rows; the scores of some tiles exist at a time.

    NATTEN itself computes on CUDA devices where it is installed, in fp16, bf16 and fp32; torch
    elsewhere. Raises ValueError for shapes that do not fit and for kernel_size * dilation beyond
    the size of a dim.
    """
    lines = windows(query, key, value, kernel_size, stride, dilation, is_causal)
    places = [Place(0, 0, line.size, line.size) for line in lines]
    return compute(query, key, value, lines, places, scale, installed(query, value))


def windows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: Ints,
    stride: Ints,
    dilation: Ints,
    is_causal: Bools | None,
) -> tuple[Line, ...]:
    """The windows along every spatial dim; raises ValueError where arguments do not fit."""
    n = query.ndim - 3
    if not 1 <= n <= 3:
        raise ValueError(
            f"{NAME}: a query of shape {tuple(query.shape)}; expected (batch, *spatial, heads, "
            "head_dim) with 1 to 3 spatial dims"
        )
    shapes = [tuple(x.shape) for x in (query, key, value)]
    q, k, v = shapes
    if len({s[:-2] for s in shapes}) > 1 or q[-1:] != k[-1:] or k[:-1] != v[:-1]:
        raise ValueError(f"{NAME}: query, key and value of shapes {q}, {k}, {v} do not fit")
    if k[-2] == 0 or q[-2] % k[-2]:
        raise ValueError(f"{NAME}: {q[-2]} query heads do not share {k[-2]} key heads")
    if len({x.dtype for x in (query, key, value)}) > 1 or not query.is_floating_point():
        raise ValueError(f"{NAME}: query, key and value must be of one floating-point dtype")
    options = zip(
        q[1:-2], *(_each(x, n) for x in (kernel_size, stride, dilation, is_causal)), strict=True
    )
    lines = tuple(Line(size, int(a), int(s), int(d), bool(c)) for size, a, s, d, c in options)
    for line in lines:
        if (
            min(line[1:4]) < 1
            or line.stride > line.kernel
            or line.kernel * line.dilation > line.size
        ):
            raise ValueError(
                f"{NAME}: {line}: kernel, stride and dilation must be positive, stride at most "
                "kernel, kernel * dilation at most size"
            )
    return lines


def _each(x: Any, n: int) -> Sequence[Any]:
    if isinstance(x, Sequence):
        if len(x) != n:
            raise ValueError(f"{NAME}: {x} for {n} spatial dims")
        return x
    return [x or 0] * n


def compute(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lines: Sequence[Line],
    places: Sequence[Place],
    scale: float | None,
    natten: Callable[..., Tensor] | None,
) -> Tensor:
    """The result for some queries, whose windows lie within the given keys and values.

    natten: a function of NATTEN's that computes it where it can, of whole tensors.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if natten is None or not all(map(_stands_alone, lines, places)):
        return attend(query, key, value, lines, [p[:2] for p in places], scale)
    # a whole problem has a query for every key, and as many keys as a kernel
    pads: list[int] = []
    for p in places:
        pads = [p.query - p.key, p.key + p.keys - p.query - p.queries, *pads]
    options = [[line[i] for line in lines] for i in range(1, 5)]
    kernel, stride, dilation, causal = map(tuple, options)
    out = natten(
        F.pad(query, [0, 0, 0, 0, *pads]) if any(pads) else query,
        key,
        value,
        kernel_size=kernel,
        stride=stride,
        dilation=dilation,
        is_causal=causal,
        scale=scale,
    )
    for d, p in enumerate(places, 1):
        out = out.narrow(d, p.query - p.key, p.queries)
    return out


def _stands_alone(line: Line, p: Place) -> bool:
    """Whether windows are the same if the keys given are all there are.

    They are shifted by the border where they were before, since no window goes beyond the keys
    given. Groups of a stride must start where they did, and their leaders be there.
    """
    if not p.queries or p.keys < line.kernel * line.dilation:
        return False
    whole = p.key == 0 and p.keys == line.size
    aligned = p.key % (line.stride * line.dilation) == 0 and not line.causal
    return p.query + p.queries <= p.key + p.keys and (whole or line.stride == 1 or aligned)


def installed(query: Tensor, value: Tensor) -> Callable[..., Tensor] | None:
    """NATTEN's function for such tensors, None where it is not installed or has no kernel.

    Nor where memory is paged: it is no op of torch, so it would find memory that was put away.
    """
    fits = query.shape[-1] == value.shape[-1] and query.dtype is not torch.float64
    if current("paged", False):
        return None
    if query.device.type not in NATTEN_DEVICES or not fits:
        return None
    try:
        module = importlib.import_module("natten.functional")
    except ImportError:
        return None
    return getattr(module, f"na{query.ndim - 3}d", None)
