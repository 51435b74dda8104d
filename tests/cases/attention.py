"""Attention: batch, heads, queries, keys and features cut; causal, masked, of grouped heads."""

from functools import partial

import torch
import torch.nn.functional as F

from shardtensor.attention import strategy

from .table import D, case, cases, normal

B, H, L, S, NO = 2, 4, 9, 7, float("-inf")
some = torch.rand(B, H, L, S) > 0.5
some[0, :, 2] = False  # a query that sees nothing
some[..., 3:] &= torch.arange(L)[:, None] > 3  # blocks that some queries see nothing of
MASKS = {
    "bool": some, "bool of tokens": some[0, 0], "keys": some[:, :1, -1:], "queries": some[..., :1],
    "heads": some[:1, :, :1], "none": torch.zeros(L, S, dtype=torch.bool),
    "bias": normal(H, L, S), "bias of keys": normal(B, 1, 1, S),
    "inf": torch.zeros(L, S, dtype=D).masked_fill(~some[1, 0], NO),
}  # fmt: skip


def SDPA(*args, **kwargs):
    """Around a ring, as keys of more bytes go; `tests/test_attention_strategy.py` has the others."""
    with strategy("ring"):
        return F.scaled_dot_product_attention(*args, **kwargs)


WAYS = {
    "whole": SDPA,
    "causal": partial(SDPA, is_causal=True),
    "scaled": partial(SDPA, is_causal=True, scale=0.7),
}
SEQUENCES = [(2, 1, 0, 3)] * 3
q, k, v = normal(B, H, L, 8), normal(B, H, S, 8), normal(B, H, S, 8)
narrow = v[..., :5].clone()  # fewer features than keys have: the plain kernel
cases("attention", WAYS, q, k, v, dims=SEQUENCES)
cases("attention of narrow values", WAYS, q, k, narrow, dims=SEQUENCES)
cases("attention of itself", WAYS, k, k.flip(2), v, dims=SEQUENCES)
for i, (name, mask) in enumerate(MASKS.items()):
    own = tuple(d for d in range(mask.ndim - 1, -1, -1) if mask.shape[d] > 1)[:3]
    case("attention with a mask", q, k, v, mask, dims=[(2, 1), (2, 0), (2, 1), own], name=name,
         turn=(i % 2, 2))(SDPA)  # fmt: skip
for heads in ((2, 2), (1, 1), (4, 4), (2, 1)):
    grouped = {n: partial(f, enable_gqa=True) for n, f in WAYS.items() if n != "scaled"}
    cases(f"attention of {heads} heads", grouped, q, k[:, : heads[0]].clone(), v[:, : heads[1]].clone(),
          dims=[(2, 1), (2, 1), (2, 1)], share=2)  # fmt: skip
for shape in ((), (3,), (3, 2, 2)):
    n = len(shape)
    cases(f"attention of {n} leading dims", {x: WAYS[x] for x in ("whole", "causal")},
          normal(*shape, 5, 4), normal(*shape, 6, 4), normal(*shape, 6, 4), dims=[(n, *range(n))] * 3)  # fmt: skip
case("attention", q[:1].clone(), k, v, dims=[2, (2, 0), (2, 0)], name="one query of the batch")(
    SDPA
)
case(
    "attention", q, k[:1].clone(), v[:1].clone(), dims=[(2, 0), 2, 2], name="one key of the batch"
)(SDPA)
case("attention", q, k[0].clone(), v[0].clone(), dims=[(2, 0), 1, 1], name="keys without a batch")(
    SDPA
)
