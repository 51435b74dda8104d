"""flex_attention over batch, heads, queries and keys, however they are sharded.

`score_mod` and `mask_mod` see global indices. What they capture is whole on every rank, and its
gradient is summed over the ranks. Keys lie and travel as for `scaled_dot_product_attention`
(`plan`), but only those that the mask lets a rank's queries see (`attention.flex`).

Numbers are those of torch's call outside of torch.compile: what is seen, the block mask's
`mask_mod` says, and not its lists of blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from ... import _torch, comm
from ...attention import flex
from ...attention.modified import Job, tiles
from ...attention.mods import Recording
from ...attention.needs import Needs, everything
from ...attention.strategy import chosen
from ...cache import of_tensor
from ...dispatch.rule import rule
from ...errors import UnsupportedOpError
from ...tensor import ShardTensor, wrap
from ...tensor.apart import told
from ...tensor.redistribute import fit, reduced
from ..labels import known
from ..operands import lifted
from .plan import Plan, plan, spans
from .sdpa import autocast, heads_apart, heads_fit, repeated

MODULE = "torch.nn.attention.flex_attention"


@rule(f"{MODULE}.flex_attention", captured=True)
def flex_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Callable[..., Tensor] | None = None,
    block_mask: Any = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: dict[str, Any] | None = None,
    *,
    return_aux: Any = None,
) -> Any:
    """Local where keys are whole; else around a ring, or merged."""
    asked = _torch.flex.asked(query, key, value, return_lse, kernel_options, return_aux)
    _check(query, key, value, block_mask, enable_gqa)
    if scale is None:
        scale = 1.0 / query.shape[-1] ** 0.5
    query, key, value = (autocast(reduced(x)) for x in (query, key, value))
    if key.dtype != query.dtype or value.dtype != query.dtype or not query.is_floating_point():
        raise UnsupportedOpError(
            f"flex_attention of ShardTensors of {query.dtype}, {key.dtype} and {value.dtype}: "
            "cast them to one floating-point dtype"
        )
    _refuse()
    score, mask = _recordings(query, score_mod, block_mask)
    captured = [*(score.captured if score else ()), *(mask.captured if mask else ())]
    query, key, value = _on_mesh([query, key, value], captured)
    if enable_gqa and not heads_fit(known(query), known(key), known(value)):
        times = query.shape[1] // max(1, key.shape[1])
        key, value = repeated(key, times), repeated(value, times)
    p = plan(known(query), known(key), known(value), None, enable_gqa)
    if not key.shape[-2]:
        raise IndexError("max(): Expected reduction dim 3 to have non-zero size.")
    q, k, v, *rest = fit(
        p.spec.mesh, p.varying,
        *zip((query, key, value), p.wanted[:3], strict=True), *((x, None) for x in captured),
    )  # fmt: skip
    seen = _needs(p, query, block_mask, mask, captured, rest[len(rest) - _count(mask) :])
    (b, h, *_), q_spans, k_spans = p.spec.spans, *spans(p)
    job = Job(
        score, mask, seen, scale, (b[0], b[1] - b[0]), (h[0], h[1] - h[0]), tuple(q_spans),
        tuple(k_spans), comm.group(p.spec.mesh, p.ring), comm.group(p.spec.mesh, p.merged),
    )  # fmt: skip
    q, k, v = heads_apart(q, k, v, p.spec.local_shape[:-2])
    out, lse, top = flex.attend(job, q, k, v, rest)
    _agree(job, p, query)
    rows = p.spec.with_dims(p.spec.dims[:-1])
    if score is not None and score.dtype is not None and score.dtype.is_floating_point:
        lse, top = lse.to(score.dtype), top.to(score.dtype)
    stats = [wrap(x, rows) if rows.shape.numel() else None for x in (lse, top)]
    return asked(wrap(out, p.spec), *stats)


@rule(f"{MODULE}.create_block_mask", f"{MODULE}.create_mask", captured=True)
def create_mask(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As torch, of a mask_mod or score_mod with its captured ShardTensors whole on each rank."""
    if args:
        mod, args = args[0], args[1:]
    else:
        name = next(n for n in ("mask_mod", "mod_fn") if n in kwargs)
        mod, kwargs = kwargs[name], {k: x for k, x in kwargs.items() if k != name}
    original = function.__wrapped__
    scores = _torch.flex.takes_scores(mod)
    like = torch.empty(0, device=_torch.flex.device_of(original, args, kwargs))
    recording = _recorded(mod, like, scores)
    whole = [x.full_tensor() if isinstance(x, ShardTensor) else x for x in recording.captured]
    found = original(recording.function(whole), *args, **kwargs)
    if hasattr(found, "mask_mod"):
        found.mask_mod = mod
    return found


create_mask.takes_function = True  # type: ignore[attr-defined]


def _on_mesh(operands: list[Tensor], captured: list[Tensor]) -> list[Tensor]:
    """The operands; as ShardTensors where only captured tensors are some."""
    if any(isinstance(x, ShardTensor) for x in operands):
        return operands
    return [lifted(x, *captured) for x in operands]


def _count(recording: Recording | None) -> int:
    return len(recording.captured) if recording else 0


def _check(q: Tensor, k: Tensor, v: Tensor, block_mask: Any, grouped: bool) -> None:
    """Raise for what torch refuses."""
    if not q.ndim == k.ndim == v.ndim == 4:
        raise NotImplementedError("NYI: query, key, and value must be 4D tensors")
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2] or k.shape[:2] != v.shape[:2]:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        raise ValueError(f"flex_attention: shapes {shapes} of query, key and value do not fit")
    if not grouped and q.shape[1] != k.shape[1]:
        raise ValueError(
            f"flex_attention: {q.shape[1]} heads of queries and {k.shape[1]} of keys; set "
            "enable_gqa=True"
        )
    if grouped and (not k.shape[1] or q.shape[1] % k.shape[1]):
        raise ValueError(
            f"flex_attention: {q.shape[1]} heads of queries are no multiple of {k.shape[1]}"
        )
    if q.shape[0] != k.shape[0]:
        alike = block_mask is not None and block_mask.kv_num_blocks.shape[0] == q.shape[0]
        if not alike or k.shape[0] != 1:
            raise ValueError(
                f"flex_attention: batches of {q.shape[0]} queries and {k.shape[0]} keys do not fit"
            )
    if block_mask is not None and not _torch.flex.is_endless(block_mask):
        lengths = tuple(block_mask.shape[-2:])
        if lengths != (q.shape[-2], k.shape[-2]):
            raise ValueError(
                f"flex_attention: a block mask for {lengths[0]} queries and {lengths[1]} keys, but "
                f"got {q.shape[-2]} and {k.shape[-2]}: make one for all of the sequence"
            )


def _refuse() -> None:
    if _torch.transforming():
        raise UnsupportedOpError(
            "torch.func or forward mode through flex_attention of ShardTensors: use "
            "F.scaled_dot_product_attention with a mask"
        )
    if _torch.is_tracing():
        raise UnsupportedOpError(
            "flex_attention of ShardTensors in a compiled program: leave it out of st.compile, or "
            "use F.scaled_dot_product_attention with a mask"
        )
    if chosen() not in ("auto", "ring"):
        raise UnsupportedOpError(
            f"strategy({chosen()!r}) for flex_attention of ShardTensors, whose keys go around a "
            "ring: leave the choice to 'auto'"
        )


def _recordings(
    query: Tensor, score_mod: Any, block_mask: Any
) -> tuple[Recording | None, Recording | None]:
    """What score_mod and mask_mod do; None where they do nothing."""
    score = mask = None
    if score_mod is not None and not _torch.flex.is_identity(score_mod):
        score = _recorded(score_mod, query, True)
    if block_mask is not None and not _torch.flex.is_noop(block_mask.mask_mod):
        mask = _recorded(block_mask.mask_mod, query, False)
        if any(x.requires_grad for x in mask.captured):
            raise AssertionError(
                "Captured buffers from mask mod that require grad are not supported."
            )
    return score, mask


def _recorded(mod: Callable[..., Tensor], like: Tensor, scores: bool) -> Recording:
    """What a score_mod or mask_mod does of numbers like those of a tensor."""
    at = [torch.zeros(1, dtype=torch.int64, device=like.device) for _ in range(4)]
    if not scores:
        return Recording(mod, "mask_mod", at, _stand_in)
    dtype = torch.float64 if like.dtype is torch.float64 else torch.float32
    example = torch.zeros(1, 1, 1, 1, dtype=dtype, device=like.device)
    return Recording(mod, "score_mod", [example, *at], _stand_in)


def _stand_in(x: Tensor) -> Tensor:
    """A plain tensor of a captured one's form."""
    if not isinstance(x, ShardTensor):
        return x
    return torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)


class Now:
    """A tensor as it is now: equal until it is written to."""

    def __init__(self, x: Tensor) -> None:
        self.x = x._local if isinstance(x, ShardTensor) else x
        self.version = self.x._version

    def __hash__(self) -> int:
        return hash((id(self.x), self.version))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Now) and self.x is other.x and self.version == other.version


def _needs(
    p: Plan,
    query: Tensor,
    block_mask: Any,
    mask: Recording | None,
    captured: list[Tensor],
    given: list[Tensor],
) -> Needs:
    """Which tiles of the scores the mask shows, found once for a block mask."""
    group, shape = comm.group(p.spec.mesh, p.varying), (*p.spec.shape[:3], p.keys.size)
    if mask is None or _torch.flex.is_endless(block_mask) or not prod(shape):
        return everything()
    if comm.spreads(group, "the mask is taken to show all") or not comm.knows_values(group):
        return everything()
    tile = tuple(block_mask.BLOCK_SIZE)

    def find() -> Needs:
        return tiles(mask, given, shape, tile, query.device)

    own = captured[len(captured) - _count(mask) :]
    if any(x.is_inference() for x in own):
        return find()
    key = mask.key, shape, tile, tuple(map(Now, own))
    return of_tensor(block_mask.kv_indices, key, find)


def _agree(job: Job, p: Plan, query: Tensor) -> None:
    """Raise on all ranks an index out of range of some; devices other than CPUs do not raise."""
    free = job.score is not None or (job.mask is not None and job.needs is everything())
    if query.device.type == "cpu" and free and p.varying:
        group = comm.group(p.spec.mesh, p.varying)
        if comm.knows_values(group):
            failed = comm.counts(int(job.error is not None), query, group)
            if any(failed) and job.error is None:
                job.error = IndexError(
                    f"flex_attention: an index of score_mod or mask_mod out of range on "
                    f"{sum(map(bool, failed))} other ranks"
                )
    if job.error is not None:
        raise told(job.error)
