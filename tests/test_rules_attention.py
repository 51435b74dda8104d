"""Attention against plain torch: every way to shard batch, heads, queries, keys; the modules."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases.attention import MASKS, some
from raising import raised
from torch.distributed.tensor import Replicate, Shard
from torch.nn.attention import SDPBackend, sdpa_kernel

import shardtensor as st
from shardtensor import testing as T
from shardtensor.attention import blocks, chosen, strategy
from shardtensor.rules.attention.sdpa import _refusal

torch.manual_seed(0)
D = torch.float64
B, H, L, S, E = 2, 4, 9, 7, 8
q = torch.randn(B, H, L, E, dtype=D)
k, v = torch.randn(2, B, H, S, E, dtype=D)
narrow = v[..., :5].clone()  # fewer features than keys have: the plain kernel
NO = -math.inf


def sdpa(*args, **kwargs):
    """Around a ring, as keys of more bytes go, if no other strategy is forced."""
    with strategy("ring" if chosen() == "auto" else chosen()):
        return F.scaled_dot_product_attention(*args, **kwargs)


def alike(a, b):
    return [(x, y) for x in T.cuts(a) for y in T.cuts(b) if len(x) == len(y)]


def ring(cq, ck):
    return [T.shard(-2, cq), T.shard(-2, ck), T.shard(-2, ck)], (len(cq),)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("value", [v, narrow], ids=["fused", "plain"])
def test_ring(causal, value):
    for cq, ck in alike(L, S):
        spec = T.hold(sdpa, [q, k, value], *ring(cq, ck), kwargs=dict(is_causal=causal))[0]
        assert spec.dims[2].sizes == cq
        T.hold(sdpa, [k, k, value], *ring(ck, ck), kwargs=dict(is_causal=causal))


@pytest.mark.parametrize("causal", [False, True])
def test_keys_alone(causal):
    for ck in T.cuts(S):
        on, n = T.shard(-2, ck), (len(ck),)
        for place in (None, T.replicated()):
            (spec,) = T.hold(sdpa, [q, k, v], [place, on, on], n, kwargs=dict(is_causal=causal))
            assert not spec.varying
        # one of the two follows the other
        T.hold(sdpa, [q, k, v], [None, on, None], n, kwargs=dict(is_causal=causal))
        T.hold(sdpa, [q, k, v], [None, T.shard(-2), on], n, kwargs=dict(is_causal=causal))


R, S0, S1, S2 = Replicate(), Shard(0), Shard(1), Shard(2)


@pytest.mark.parametrize("axes", [
    ([S1, S2], [S1, S2]), ([S2, S1], [S2, S1]), ([S0, S2], [S0, S2]), ([S2, S2], [S2, S2]),
    ([R, S2], [R, S2]), ([S2, R], [R, S2]), ([S2, R], [S2, S2]), ([R, S2], [S2, S2]),
    ([S2, S2], [S2, R]), ([S2, S2], [R, S2]), ([R, R], [S2, S2]), ([S2, S1], [S1, S2]),
    ([S1, R], [S2, S2]),
])  # fmt: skip
def test_two_axes(axes):
    on = [T.On(axes[0]), T.On(axes[1]), T.On(axes[1])]
    mask = torch.randn(B, 1, L, S, dtype=D)
    for causal in (False, True):
        T.hold(sdpa, [q, k, v], on, (2, 2), kwargs=dict(is_causal=causal))
    T.hold(sdpa, [q, k, v, mask], [*on, None], (2, 2))


def test_masks_without_gradient_take_the_fused_kernel():
    for mask in (MASKS["inf"], MASKS["bias"], torch.randn(L, 1, dtype=D)):
        for cq, ck in [((6, 3), (3, 4)), ((7, 0, 2), (3, 2, 2))]:
            T.hold(lambda *x, m=mask: sdpa(*x, m), [q, k, v], *ring(cq, ck))
    if raised(lambda: sdpa(q, k, v, some, is_causal=True)) is None:
        T.hold(lambda *x: sdpa(*x, some, is_causal=True), [q, k, v], *ring((6, 3), (3, 4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, D])
@pytest.mark.parametrize("learnt", [False, True])
def test_a_mask_of_single_precision_beside_other_queries(learnt, dtype):
    """It keeps its digits, which queries of half precision would not have."""
    qkv = [x.to(dtype) for x in (q, k, v)]
    bias = torch.randn(B, 1, L, S, generator=torch.Generator().manual_seed(4)) + 30.3
    args = [*qkv, bias] if learnt else qkv
    run = sdpa if learnt else lambda *x: sdpa(*x, bias)
    rtol = {D: 1e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    on, n = ring((4, 0, 5), (3, 4, 0))
    for places in (on, [None, *on[1:]], [on[0], None, None]):
        T.hold(run, args, [*places, *[None] * learnt], n, rtol=rtol)


@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", ["min", -1e9, NO])
def test_rows_that_a_mask_hides_from_all_keys(low, dtype):
    """Their weights are even, whatever number hides them, and however many ranks hold the keys."""
    qkv = [x.to(dtype) for x in (q, k, v)]
    mask = torch.zeros(B, 1, L, S, dtype=dtype)
    low = torch.finfo(dtype).min if low == "min" else low
    mask[:, :, 1], mask[0, :, 5, :4], mask[1, ..., 4:], mask[1, :, 3] = low, low, low, low
    rtol = {D: None, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    on, n = ring((4, 0, 5), (3, 4, 0))
    for places in (on, [None, *on[1:]]):
        # torch's fused kernel for CPUs has gradients of its own in these rows, and so have we
        T.hold(lambda *x: sdpa(*x, mask), qkv, places, n, rtol=rtol)
        with sdpa_kernel(SDPBackend.MATH):
            T.hold(lambda *x: sdpa(*x, mask), qkv, places, n, rtol=rtol)
            T.hold(sdpa, [*qkv, mask], [*places, None], n, rtol=rtol)
    T.hold(sdpa, [*qkv, mask], [*on, T.shard(3)], n, rtol=rtol, grad=False)
    three = [x[:, 0] for x in qkv]
    T.hold(lambda *x: sdpa(*x, mask[:, 0]), three, on, n, rtol=rtol)


@pytest.mark.parametrize("causal", [False, True])
def test_large_scores_that_are_equal(causal):
    """The number of keys that share the weight counts where the scores have many digits."""
    big = [x.float() for x in (q[:, :, :S].abs() * 300, torch.ones_like(k) * 300, v)]
    for kind in ("ring", "gather", "zigzag"):
        if kind != "zigzag" or causal:

            def run(*args, kind=kind):
                with strategy(kind):
                    return sdpa(*args, is_causal=causal)

            with sdpa_kernel(SDPBackend.MATH):
                T.hold(run, big, *ring((4, 3), (4, 3)), rtol=2e-5)


def test_a_mask_beside_is_causal():
    """As torch: together only where its fused kernel takes them."""
    on, n = ring((6, 3), (3, 4))
    bias = torch.randn(L, S, dtype=D)
    if raised(lambda: sdpa(q, k, v, bias, is_causal=True)) is None:
        T.hold(lambda *x: sdpa(*x, bias, is_causal=True), [q, k, v], on, n)

    def refused():
        a, b, c = sharded_on_two()
        with pytest.raises(RuntimeError, match="should not be set when is_causal"):
            sdpa(a[0], b[0], c[0], bias, is_causal=True)
        with pytest.raises(RuntimeError, match=r"a mask of torch\.float16 for a query"):
            sdpa(a, b, c, bias.half())
        return True

    assert all(st.simulate(2, refused))
    three = [x[0] for x in (q, k, v)]
    with pytest.raises(RuntimeError, match="should not be set when is_causal"):
        sdpa(*three, bias, is_causal=True)


def sharded_on_two():
    mesh = T.make_mesh((2,))
    return [st.distribute_tensor(x, mesh, [Shard(-2)], src_data_rank=None) for x in (q, k, v)]


def test_a_mask_beside_is_causal_where_torch_takes_them_nowhere(monkeypatch):
    """As torch 2.14, whose message it is."""
    call, bias = F.scaled_dot_product_attention, torch.randn(L, S, dtype=D)

    def strict(q, k, v, mask=None, *args, is_causal=False, **kwargs):
        if mask is not None and is_causal:
            raise RuntimeError("not both, says this torch")
        return call(q, k, v, mask, *args, is_causal=is_causal, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", strict)
    _refusal.cache_clear()
    try:
        found = st.simulate(
            2, lambda: raised(lambda: call(*sharded_on_two(), bias, is_causal=True))
        )
    finally:
        _refusal.cache_clear()
    assert [str(e) for e in found] == ["not both, says this torch"] * 2


def test_extreme_scores():
    steep = torch.tensor([-1e4, 1e4, 0, 1e4 - 1, -1e4, 1e4 + 1, 1e4], dtype=D)
    huge = torch.where(torch.arange(S) % 2 == 1, 0.0, -1e30).to(D)[None]
    for cq, ck in alike(L, S):
        on, n = ring(cq, ck)
        for place in (on, [None, *on[1:]]):
            for value in (v, narrow):
                T.hold(sdpa, [q, k * steep[:, None], value], place, n, grad=False)
            T.hold(lambda *x: sdpa(*x, steep[None]), [q, k, v], place, n, rtol=1e-11)
            T.hold(sdpa, [q, k, v, huge], [*place, None], n)


def test_no_keys_or_queries():
    none = torch.randn(B, H, 0, E, dtype=D)
    T.hold(sdpa, [q, none, none], *ring((6, 3), (0, 0)))
    T.hold(sdpa, [none, k, v], *ring((0, 0), (3, 4)))


def test_chunks_of_rows(monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK", 100)
    with sdpa_kernel(SDPBackend.MATH):
        for causal in (False, True):
            T.hold(sdpa, [q, k, v], *ring((6, 3), (3, 4)), kwargs=dict(is_causal=causal))
        for name in ("bool", "bias", "bias of keys"):
            T.hold(sdpa, [q, k, v, MASKS[name]], [*ring((6, 3), (3, 4))[0], None], (2,))


def test_other_dtypes():
    single = [x.float() for x in (q, k, v)]
    for causal in (False, True):
        T.hold(sdpa, single, *ring((7, 0, 2), (3, 2, 2)), kwargs=dict(is_causal=causal))
    T.hold(sdpa, [single[0], single[1], narrow.float()], *ring((6, 3), (3, 4)))
    for dtype in (torch.bfloat16, torch.float16):
        half = [x.to(dtype) for x in single]
        T.hold(sdpa, half, *ring((7, 0, 2), (3, 2, 2)), rtol=0.02)
        T.hold(sdpa, [*half, some], [None, *ring((6, 3), (3, 4))[0][1:], None], (2,), rtol=0.02)


def test_autocast():
    def cast(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return sdpa(*args)

    single = [x.float() for x in (q, k, v)]
    T.hold(cast, single, *ring((6, 3), (3, 4)), rtol=0.02)
    T.hold(cast, [single[0], single[1].bfloat16(), single[2]], *ring((6, 3), (3, 4)), rtol=0.02)
    T.hold(
        cast, [*single, MASKS["bias"].float()], [*ring((6, 3), (3, 4))[0], None], (2,), rtol=0.02
    )


@pytest.mark.gloo
def test_over_gloo():
    for causal in (False, True):
        for cq, ck in [((6, 3), (3, 4)), ((7, 0, 2), (3, 2, 2))]:
            way = dict(kwargs=dict(is_causal=causal), run=T.run_workers)
            T.hold(sdpa, [q, k, v], *ring(cq, ck), **way)
            T.hold(sdpa, [q, k, v], [None, *ring(cq, ck)[0][1:]], (len(cq),), **way)
