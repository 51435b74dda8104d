"""Scaled dot-product attention over batch, heads, queries and keys, however they are sharded.

- A batch or head dim that is sharded stays so, and an operand that has it is cut alike.
- Mesh axes that shard keys and queries: a ring, in which keys travel and queries stay; or, along
  the innermost of them, an all-to-all of tokens for heads (see `shardtensor.attention.strategy`).
- Mesh axes that shard keys alone: each rank attends to its keys, then the results are merged.
- Mesh axes that shard queries alone: keys whole on each of them.
- The embedding is made whole.

`multi_head_attention_forward` and the modules above it run as they are written: they come down to
`linear`, views and this.
"""

from __future__ import annotations

from itertools import product
from math import lcm, prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import comm
from ..attention import all_to_all_pays, attend, chosen, strategy
from ..cache import cached
from ..errors import UnsupportedOpError
from ..random import generator_for
from ..redistribute import fit, like, reduced, to_dims
from ..registry import rule
from ..spec import Dim, Spec, nested_chunk_sizes
from ..tensor import ShardTensor, wrap

Known = Spec | torch.Size
Dims = tuple[Dim, ...]
NAME = "scaled_dot_product_attention"


class Plan(NamedTuple):
    """Where operands are wanted, and between which ranks keys travel or results are merged."""

    spec: Spec  # of the result
    wanted: tuple[Dims, Dims, Dims, Dims | None]
    keys: Dim
    varying: tuple[int, ...]
    ring: tuple[int, ...]
    merged: tuple[int, ...]
    shifted: bool  # this rank's queries need not be the first


@rule(NAME)
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> ShardTensor:
    query, key, value = (_whole_sums(x) for x in (query, key, value))
    if attn_mask is not None:
        attn_mask = _whole_sums(attn_mask)
    _check(query, key, value, attn_mask)
    if enable_gqa and not _heads_fit(_known(query), _known(key), _known(value)):
        key, value = (_repeated(x, query.shape[-3] // x.shape[-3]) for x in (key, value))
    given = (query, key, value, attn_mask)
    known = _known(query), _known(key), _known(value)
    masked = None if attn_mask is None else _known(attn_mask)
    p = plan(*known, masked, enable_gqa)
    dealt = _deal(p, known, attn_mask is None, dropout_p, is_causal)
    if dealt is not None:
        options = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return _by_heads(p, (query, key, value), dealt, options)
    q, k, v, mask = fit(p.spec.mesh, p.varying, *zip(given, p.wanted, strict=True))
    assert q is not None and k is not None and v is not None
    if not (p.ring or p.merged or (is_causal and p.shifted) or dropout_p or q.numel() == 0):
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return wrap(out, p.spec)
    lead = p.spec.local_shape[:-2]
    q, k, v = _heads_apart(_autocast(q), _autocast(k), _autocast(v), lead)
    q_spans, k_spans = spans(p)
    out = attend(
        q,
        k,
        v,
        None if mask is None else _mask_apart(_autocast(mask), lead),
        q_spans=q_spans,
        k_spans=k_spans,
        mask_start=0 if p.ring or not p.merged else k_spans[0][0],
        causal=is_causal,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        drop=dropout_p,
        seed=_seed(p, q.device) if dropout_p else 0,
        group=comm.group(p.spec.mesh, p.ring),
        merged=comm.group(p.spec.mesh, p.merged),
    )
    return wrap(out.reshape(p.spec.local_shape), p.spec)


# all-to-all --------------------------------------------------------------------------------------


def _deal(
    p: Plan, known: tuple[Known, Known, Known], unmasked: bool, drop: float, causal: bool
) -> int | None:
    """The mesh axis whose ranks exchange tokens for heads; None where keys travel instead."""
    kind = chosen()
    if kind == "ring" or not p.ring:
        return None
    axis = _innermost(p, *known)
    if axis is None or not unmasked or drop:
        if kind == "all_to_all":
            raise UnsupportedOpError(
                f"{NAME}: strategy('all_to_all') with a mask, with dropout, or for heads of "
                f"{[tuple(d.size for d in _dims(x)) for x in known]}, which cannot be dealt "
                f"to the ranks along mesh axes {p.ring}; leave the choice to 'auto'"
            )
        return None
    if kind == "all_to_all":
        return axis
    n = p.spec.mesh.size(axis)
    queries, keys, values = [prod(d.size for d in _dims(x)) for x in known]
    output = queries // max(1, _dims(known[0])[-1].size) * _dims(known[2])[-1].size
    return axis if all_to_all_pays(n, queries, keys, values, output, causal) else None


@cached
def _innermost(p: Plan, q: Known, k: Known, v: Known) -> int | None:
    """The last mesh axis of queries and keys, if its ranks can share the heads out among them."""
    queries, heads = p.spec.dims[-2], p.spec.dims[-3] if len(p.spec.dims) > 2 else None
    if heads is None or heads.axes or min(len(_dims(x)) for x in (q, k, v)) < 3:
        return None
    axis = queries.axes[-1]
    if axis != p.keys.axes[-1:][0] or axis not in p.ring:
        return None
    n = p.spec.mesh.size(axis)
    every = [_dims(x)[-3].size for x in (q, k, v)]
    alike = len(set(every)) == 1 and every[0] >= n
    return axis if alike or all(h % n == 0 for h in every) else None


def _by_heads(
    p: Plan, operands: tuple[Tensor, ...], axis: int, options: dict[str, Any]
) -> ShardTensor:
    """Tokens of all ranks along the axis and heads of this one, then back."""
    mesh, n = p.spec.mesh, p.spec.mesh.size(axis)

    def dims(x: Tensor, tokens: Dim) -> Dims:
        own = _dims(_known(x))
        outer = Dim(tokens.size, tokens.axes[:-1], _merged_sizes(tokens, n))
        heads = Dim(own[-3].size, (axis,), tuple(nested_chunk_sizes(own[-3].size, [n])))
        lead = _cut_alike(own[:-3], p.spec.dims[:-3])
        return (*lead, heads, outer if outer.axes else Dim(tokens.size), Dim(own[-1].size))

    tokens = (p.spec.dims[-2], p.keys, p.keys)
    wanted = [dims(x, t) for x, t in zip(operands, tokens, strict=True)]
    if len({x.shape for x in operands}) == 1 and len(set(tokens)) == 1:
        # one message instead of three
        given = [like(x, Spec(mesh, w)) for x, w in zip(operands, p.wanted[:3], strict=True)]
        together = torch.stack([_autocast(x) for x in given])
        assert isinstance(together, ShardTensor)
        moved = to_dims(together, [Dim(3), *wanted[0]]).unbind(0)
    else:
        moved = tuple(like(x, Spec(mesh, w)) for x, w in zip(operands, wanted, strict=True))
    with strategy("ring"):
        out = scaled_dot_product_attention(*moved, **options)  # type: ignore[arg-type]
    return to_dims(out, p.spec.dims)


def _merged_sizes(tokens: Dim, n: int) -> tuple[int, ...]:
    """Sizes of a nested dim without its innermost axis."""
    return tuple(sum(tokens.sizes[i : i + n]) for i in range(0, len(tokens.sizes), n))


def _whole_sums(x: Tensor) -> Tensor:
    return reduced(x) if isinstance(x, ShardTensor) else x


def _known(x: Tensor) -> Known:
    return x._spec if isinstance(x, ShardTensor) else x.shape


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    if min(x.ndim for x in (q, k, v)) < 2:
        raise RuntimeError(f"{NAME}: query, key and value must be at least 2-D")
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise RuntimeError(
            f"{NAME}: shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)} do not fit"
        )
    if len({_dtype(x) for x in (q, k, v)}) > 1 or not q.is_floating_point():
        raise RuntimeError(f"{NAME}: query, key and value must be of one floating-point dtype")
    if mask is not None:
        if mask.dtype is not torch.bool and not mask.is_floating_point():
            raise RuntimeError(f"{NAME}: a mask of {mask.dtype}; use bool or a floating dtype")
        if mask.ndim < 2:
            raise RuntimeError(
                f"{NAME}: a mask of shape {tuple(mask.shape)}; it has 2 dims or more"
            )
        if mask.ndim > max(x.ndim for x in (q, k, v)):
            raise UnsupportedOpError(f"{NAME}: a mask with more dims than query; reshape it first")


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype in which autocast would compute with x."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point():
        return x.dtype if x.dtype is torch.float64 else torch.get_autocast_dtype(device)
    return x.dtype


def _autocast(x: Tensor) -> Tensor:
    return x.to(_dtype(x))


# heads -------------------------------------------------------------------------------------------


@cached
def _heads_fit(q: Known, k: Known, v: Known) -> bool:
    """Whether every shard of the heads holds whole groups of query heads that share a key head."""
    heads = [_dims(x)[-3] for x in (q, k, v)]
    if heads[1].size != heads[2].size or heads[0].size % max(1, heads[1].size):
        return False
    times = heads[0].size // max(1, heads[1].size)
    return heads[1].size == 1 or all(s % times == 0 for s in heads[0].sizes)


def _repeated(x: Tensor, times: int) -> Tensor:
    """x with each head `times` times."""
    if times == 1:
        return x
    return x.unsqueeze(-3).expand(*x.shape[:-2], times, *x.shape[-2:]).flatten(-4, -3)


def _heads_apart(q: Tensor, k: Tensor, v: Tensor, lead: torch.Size) -> list[Tensor]:
    """Local q, k, v of any leading dims as (B, H, L, E), (B, G, S, E), (B, G, S, F)."""
    outer, heads = lead[:-1], prod(lead[-1:])
    shared = {x.shape[-3] if x.ndim > 2 else 1 for x in (k, v)}
    groups = shared.pop() if len(shared) == 1 else heads
    found = []
    for x, n in ((q, heads), (k, groups), (v, groups)):
        full = [*outer, n] if lead else []
        found.append(x.expand(*full, *x.shape[-2:]).reshape(prod(outer), n, *x.shape[-2:]))
    return found


def _mask_apart(mask: Tensor, lead: torch.Size) -> Tensor:
    """A local mask as (B or 1, H or 1, L or 1, S or 1)."""
    mask = mask[(None,) * (max(2, len(lead)) + 2 - mask.ndim)]
    if mask.shape[:-3].numel() > 1:
        mask = mask.expand(*lead[:-1], *mask.shape[-3:])
    return mask.flatten(0, -4)


# the plan ----------------------------------------------------------------------------------------


def _dims(x: Known) -> Dims:
    return x.dims if isinstance(x, Spec) else tuple(Dim(n) for n in x)


@cached
def plan(q: Known, k: Known, v: Known, mask: Known | None, grouped: bool) -> Plan:
    """Batch and heads keep their mesh axes; queries and keys get theirs of what is left."""
    known = [x for x in (q, k, v, mask) if x is not None]
    meshes = {x.mesh for x in known if isinstance(x, Spec)}
    if len(meshes) > 1:
        raise UnsupportedOpError(f"{NAME} of tensors on different meshes: {known}")
    (mesh,) = meshes
    operands = [_dims(x) for x in known]
    used: set[int] = set()
    lead = max(len(dims) for dims in operands) - 2
    batch = [
        _batch_dim(operands, i - lead - 2, grouped and i == lead - 1, used) for i in range(lead)
    ]
    queries = _tokens(operands[0][-2], operands[3:], used)
    keys = _tokens(operands[1][-2], [operands[2]], used)
    apart = [a for a in keys.axes if mesh.size(a) > 1]
    ring = tuple(a for a in apart if a in queries.axes)
    merged = tuple(a for a in apart if a not in ring)
    tokens = [queries, keys, keys]
    wanted: list[Dims | None] = []
    for own, at in zip(operands[:3], tokens, strict=True):
        first = _cut_alike(own[:-2], batch)
        wanted.append((*first, at, Dim(own[-1].size)))
    if mask is None:
        wanted.append(None)
    else:
        own = operands[3]
        shape = [d.size for d in (*batch, queries, keys)]
        if any(d.size not in (1, n) for d, n in zip(own[::-1], shape[::-1], strict=False)):
            raise RuntimeError(f"{NAME}: a mask of {[d.size for d in own]} for scores of {shape}")
        last = keys if merged and not ring else Dim(keys.size)
        wanted.append((*_cut_alike(own[:-2], batch), *_cut_alike(own[-2:], [queries, last])))
    return Plan(
        Spec(mesh, (*batch, queries, Dim(operands[2][-1].size))),
        tuple(wanted),  # type: ignore[arg-type]
        keys,
        tuple(sorted(used.union(queries.axes, keys.axes))),
        ring,
        merged,
        any(mesh.size(a) > 1 for a in queries.axes),
    )


def _batch_dim(operands: list[Dims], at: int, heads: bool, used: set[int]) -> Dim:
    """A leading dim of the result; takes the mesh axes of the first operand that shards it."""
    own = [dims[at] for dims in operands if len(dims) >= -at]
    size = 0 if any(d.size == 0 for d in own) else max(d.size for d in own)
    if any(d.size not in (1, size) and (not heads or size % d.size) for d in own):
        raise RuntimeError(f"{NAME}: leading dims {[d.size for d in own]} do not broadcast")
    # sizes of heads must suit every operand: whole groups that share a key head
    times = lcm(*(size // d.size for d in own if d.size > 1))
    for d in own:
        here = tuple(s * (size // d.size) for s in d.sizes) if d.size > 1 else d.sizes
        fits = d.size == size or (heads and d.size > 1)
        if d.axes and fits and used.isdisjoint(d.axes) and all(s % times == 0 for s in here):
            used.update(d.axes)
            return Dim(size, d.axes, here)
    return Dim(size)


def _cut_alike(own: Dims, wanted: list[Dim] | Dims) -> Dims:
    """An operand's dims cut as those of the result: fewer heads in proportion, size 1 whole."""
    found = []
    for d, w in zip(own, wanted[len(wanted) - len(own) :], strict=True):
        if d.size == w.size:
            found.append(w)
        elif d.size == 1:
            found.append(Dim(1))
        else:
            found.append(Dim(d.size, w.axes, tuple(s * d.size // w.size for s in w.sizes)))
    return tuple(found)


def _tokens(own: Dim, others: list[Dims], used: set[int]) -> Dim:
    """Queries or keys, sharded as the first operand that shards them by free axes."""
    for d in (own, *(dims[-2] for dims in others)):
        if d.axes and d.size == own.size and used.isdisjoint(d.axes):
            return d
    return Dim(own.size)


@cached
def spans(p: Plan) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """(start, size) of the queries and of the keys of every rank of this rank's ring."""
    mesh = p.spec.mesh
    both = Spec(mesh, (p.spec.dims[-2],)), Spec(mesh, (p.keys,))
    place = list(p.spec.coordinate)
    found: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for ring in product(*(range(mesh.size(a)) for a in p.ring)):
        for axis, i in zip(p.ring, ring, strict=True):
            place[axis] = i
        for spec, into in zip(both, found, strict=True):
            (dim,), (i,) = spec.dims, spec.index_at(place)
            into.append((dim.offsets[i], dim.sizes[i]) if dim.axes else (0, dim.size))
    return tuple(found[0]), tuple(found[1])


def _seed(p: Plan, device: torch.device) -> int:
    """A seed for this rank's scores; the same on ranks that hold the same."""
    scores = Spec(p.spec.mesh, (*p.spec.dims, Dim(p.keys.size, p.merged)))
    return generator_for(scores, device).initial_seed()
