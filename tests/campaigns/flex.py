"""flex_attention: modified and hidden scores, captured tensors, groups of heads, uneven and empty shards."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from flex import flex
from placing import Placed, placed
from torch import Tensor
from torch.nn.attention.flex_attention import (
    AuxRequest,
    and_masks,
    create_block_mask,
    or_masks,
)

D = torch.float64
SIDE = 32


def _causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return i >= j


def _window(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i - j).abs() <= 2


def _prefix(b: Any, h: Any, i: Any, j: Any) -> Any:
    return j < 3


# of a table of documents (L,), a table of numbers (H, 2 SIDE) and one number
Maker = Callable[[Tensor, Tensor, Tensor], Any]
MASKS: dict[str, Maker | None] = {
    "none": None,
    "causal": lambda d, t, c: _causal,
    "window": lambda d, t, c: _window,
    "late": lambda d, t, c: lambda b, h, i, j: (i > 4) & (j < 6),
    "prefix": lambda d, t, c: or_masks(_prefix, _causal),
    "documents": lambda d, t, c: lambda b, h, i, j: d[i] == d[j],
    "causal documents": lambda d, t, c: and_masks(_causal, lambda b, h, i, j: d[i] == d[j]),
    "dilated": lambda d, t, c: lambda b, h, i, j: (i - j) % 3 == 0,
    "by head": lambda d, t, c: lambda b, h, i, j: (i - j).abs() <= h * 2,
    "by batch": lambda d, t, c: lambda b, h, i, j: (j + b) % 2 == 0,
    "nothing": lambda d, t, c: lambda b, h, i, j: i < 0,
    "everything": lambda d, t, c: lambda b, h, i, j: i >= 0,
    "table": lambda d, t, c: lambda b, h, i, j: t[h, i + j] > 0,
}  # fmt: skip
MODS: dict[str, Maker | None] = {
    "none": None,
    "alibi": lambda d, t, c: lambda s, b, h, i, j: s - 0.1 * (h + 1) * (i - j).abs(),
    "softcap": lambda d, t, c: lambda s, b, h, i, j: 2 * torch.tanh(s / 2),
    "relative": lambda d, t, c: lambda s, b, h, i, j: s + t[h, i - j + SIDE],
    "scaled": lambda d, t, c: lambda s, b, h, i, j: s * (c * 2).exp() + t[h, 3],
    "absolute": lambda d, t, c: lambda s, b, h, i, j: torch.where(i > j, s + t[h, j], s * c),
    "bias of documents": lambda d, t, c: lambda s, b, h, i, j: s + c * (d[i] - d[j]),
    "gate": lambda d, t, c: lambda s, b, h, i, j: s * torch.sigmoid(t[0, i] + t[0, j]),
    "hides": lambda d, t, c: lambda s, b, h, i, j: torch.where(d[i] >= d[j], s, -float("inf")),
    "in place": lambda d, t, c: lambda s, b, h, i, j: s.clone().mul_(c).add_(b),
    "constant": lambda d, t, c: lambda s, b, h, i, j: t[h, j],
    "far": lambda d, t, c: lambda s, b, h, i, j: s + t[h, i * SIDE],
    "position": lambda d, t, c: lambda s, b, h, i, j: s + 0.01 * i * j + h - b,
}  # fmt: skip


def _call(q: Tensor, k: Tensor, v: Tensor, d: Tensor, t: Tensor, c: Tensor, **options: Any) -> Any:
    mask, mod, block, of = (options.pop(n) for n in ("mask", "mod", "block", "of"))
    mask_mod, score_mod = MASKS[mask], MODS[mod]
    found = None
    if mask_mod is not None:
        # made of plain tensors, as where a program has them before it distributes them
        plain = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in (d, t, c)]
        sizes = (of[0], of[1], q.shape[2], k.shape[2])
        found = create_block_mask(mask_mod(*plain), *sizes, device="cpu", BLOCK_SIZE=block)
        found.mask_mod = mask_mod(d, t.detach(), c)
    score = score_mod(d, t, c) if score_mod is not None else None
    out = flex(q, k, v, score, found, **options)
    if options.get("return_lse"):
        return out[0], out[1] if out[1] is None else out[1].clamp_min(-1e6)
    if options.get("return_aux"):
        return out[0], None if out[1].lse is None else out[1].lse.clamp_min(-1e6)
    return out


def draw(rng: random.Random) -> Placed:
    mod = rng.choice(list(MODS))
    mod = rng.choice(list(MODS)) if mod == "far" else mod
    mask = rng.choice(list(MASKS))
    dtype = rng.choice((D, D, D, D, torch.float32, torch.bfloat16))
    batch, heads = rng.choice((0, 1, 2, 2, 3)), rng.choice((1, 2, 4))
    rows = rng.choice((0, 1, rng.randint(2, 12), rng.randint(2, 12), rng.randint(2, 12)))
    keys = rows if rng.random() < 0.7 else rng.choice((0, 1, rng.randint(2, 12)))
    shared = rng.choice([n for n in (1, 2, 4) if heads % n == 0])
    grouped = shared != heads or rng.random() < 0.2
    few = 1 if batch > 1 and rows and mask != "none" and rng.random() < 0.1 else batch
    q = torch.randn(batch, heads, rows, 4).to(dtype)
    k = torch.randn(few, shared, keys, 4).to(dtype)
    v = torch.randn(few, shared, keys, rng.choice((4, 4, 3))).to(dtype)
    d = torch.randint(0, 3, (max(rows, keys),)).sort()[0]
    t, c = torch.randn(heads, 2 * SIDE).to(dtype), torch.randn(()).to(dtype)
    exact = dtype is D and few == batch
    if exact and rng.random() < 0.7:
        for x in (q, k, v):
            x.requires_grad_(rng.random() < 0.8)
    if exact and q.requires_grad:
        t.requires_grad_(rng.random() < 0.7)
        c.requires_grad_(rng.random() < 0.5)
    options: dict[str, Any] = {
        "mod": mod, "mask": mask, "enable_gqa": grouped,
        "block": rng.choice(((2, 3), (4, 4), (128, 128), (1, 2), (5, 1))),
        "of": (rng.choice((None, batch)) if few == batch else batch, rng.choice((None, heads))),
    }  # fmt: skip
    if rng.random() < 0.2:
        options["scale"] = rng.choice((0.5, 1.0, 0.0))
    # the formula that stands for torch where it has no gradients does not check these
    plain = not any(x.requires_grad for x in (q, k, v))
    stats = rng.random()
    if stats < 0.2:
        options["return_lse"] = True
    elif stats < 0.4:
        options["return_aux"] = AuxRequest(
            lse=rng.random() < 0.8, max_scores=plain and rng.random() < 0.1
        )
    if rng.random() < 0.1 and plain:
        options["kernel_options"] = rng.choice(({"BLOCK_M": 16}, {"BACKEND": "none"}))
    return placed(rng, "flex", _call, [q, k, v, d, t, c], **options)
