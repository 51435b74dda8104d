"""Attention against plain torch: every way to shard batch, heads, queries, keys; the modules."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.nn.attention import SDPBackend, sdpa_kernel

import shardtensor as st
from shardtensor import _torch
from shardtensor import testing as T
from shardtensor.attention import blocks
from shardtensor.attention.plan import hops, pieces
from shardtensor.measure import peak_bytes, saved_bytes

torch.manual_seed(0)
D = torch.float64
B, H, L, S, E = 2, 4, 9, 7, 8
q = torch.randn(B, H, L, E, dtype=D)
k, v = torch.randn(2, B, H, S, E, dtype=D)
narrow = v[..., :5].clone()  # fewer features than keys have: the plain kernel
NO = -math.inf


def sdpa(*args, **kwargs):
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


@pytest.mark.parametrize("causal", [False, True])
def test_queries_alone(causal):
    for cq in T.cuts(L):
        on, n = T.shard(-2, cq), (len(cq),)
        T.hold(sdpa, [q, k, v], [on, None, T.replicated()], n, kwargs=dict(is_causal=causal))


@pytest.mark.parametrize("places", [(0, 0, 0), (1, 1, 1), (0, None, None), (None, 1, None),
                                    (1, 2, 2), (2, 1, 1), (3, 3, 3), (0, 2, 1), (2, 0, 3)])  # fmt: skip
def test_other_dims(places):
    on = [None if d is None else T.shard(d) for d in places]
    for n in (2, 3):
        T.hold(sdpa, [q, k, v], on, (n,))
        T.hold(sdpa, [q, k, v], on, (n,), kwargs=dict(is_causal=True, scale=0.7))


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


some = torch.rand(B, H, L, S) > 0.5
some[0, :, 2] = False  # a query that sees nothing
some[..., 3:] &= torch.arange(L)[:, None] > 3  # blocks that some queries see nothing of
MASKS = {
    "bool": some, "bool of tokens": some[0, 0], "keys": some[:, :1, -1:], "queries": some[..., :1],
    "heads": some[:1, :, :1], "none": torch.zeros(L, S, dtype=torch.bool),
    "bias": torch.randn(H, L, S, dtype=D), "bias of keys": torch.randn(B, 1, 1, S, dtype=D),
    "inf": torch.zeros(L, S, dtype=D).masked_fill(~some[1, 0], NO),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks(name):
    mask = MASKS[name]
    args = [q, k, v, mask]
    for cq, ck in [((9,), (7,)), ((6, 3), (3, 4)), ((7, 0, 2), (3, 2, 2)), ((1, 6, 1, 1), (0, 1, 0, 6))]:  # fmt: skip
        on, n = ring(cq, ck)
        T.hold(sdpa, args, [*on, None], n)
        T.hold(sdpa, args, [None, *on[1:], None], n)
        T.hold(sdpa, args, [on[0], None, None, T.replicated()], n)
    if mask.ndim > 1:
        for d in (-2, -1):
            on, n = ring((6, 3), (3, 4))
            if mask.shape[d] > 1:
                T.hold(sdpa, args, [*on, T.shard(d)], n)
                T.hold(sdpa, args, [None, *on[1:], T.shard(d)], n)
                T.hold(sdpa, args, [None, None, None, T.shard(d)], n)
        T.hold(sdpa, args, [T.shard(1)] * 3 + [None], (3,))


def test_masks_without_gradient_take_the_fused_kernel():
    for mask in (MASKS["inf"], MASKS["bias"], torch.randn(L, 1, dtype=D)):
        for cq, ck in [((6, 3), (3, 4)), ((7, 0, 2), (3, 2, 2))]:
            T.hold(lambda *x, m=mask: sdpa(*x, m), [q, k, v], *ring(cq, ck))
    T.hold(lambda *x: sdpa(*x, some, is_causal=True), [q, k, v], *ring((6, 3), (3, 4)))


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


@pytest.mark.parametrize("heads", [(2, 2), (1, 1), (4, 4), (2, 1)], ids=str)
def test_grouped_queries(heads):
    key, value = k[:, : heads[0]].clone(), v[:, : heads[1]].clone()
    gqa = dict(enable_gqa=True)
    for cq, ck in [((9,), (7,)), ((6, 3), (3, 4)), ((1, 6, 1, 1), (3, 2, 0, 2))]:
        for causal in (False, True):
            T.hold(sdpa, [q, key, value], *ring(cq, ck), kwargs=dict(is_causal=causal, **gqa))
        T.hold(sdpa, [q, key, value[..., :3].clone()], *ring(cq, ck), kwargs=gqa)
        on, n = ring(cq, ck)
        T.hold(sdpa, [q, key, value, some], [None, *on[1:], None], n, kwargs=gqa)
    for n in (2, 3):
        T.hold(sdpa, [q, key, value], [T.shard(1)] * 3, (n,), kwargs=gqa)
        T.hold(sdpa, [q, key, value], [T.shard(1), None, None], (n,), kwargs=gqa)
        T.hold(sdpa, [q, key, value], [None, T.shard(1), None], (n,), kwargs=gqa)
    on = [T.On([Shard(1), Shard(2)])] * 3
    T.hold(sdpa, [q, key, value], on, (2, 2), kwargs=gqa)


@pytest.mark.parametrize("shape", [(), (3,), (3, 2, 2)])
def test_other_numbers_of_leading_dims(shape):
    a, b, c = (torch.randn(*shape, n, 4, dtype=D) for n in (5, 6, 6))
    for causal in (False, True):
        T.hold(sdpa, [a, b, c], *ring((4, 1), (2, 4)), kwargs=dict(is_causal=causal))
    T.hold(sdpa, [a, b, c, torch.rand(5, 6) > 0.4], [*ring((4, 1), (2, 4))[0], None], (2,))
    if shape:
        mask = torch.randn(*shape[:-1], 1, 5, 6, dtype=D)
        T.hold(sdpa, [a, b, c, mask], [*ring((4, 1), (2, 4))[0], None], (2,))


def test_broadcast_batch():
    for args in ([q[:1], k, v], [q, k[:1], v[:, :1]], [q[0], k, v], [q, k[0], v[0]]):
        args = [x.clone() for x in args]
        T.hold(sdpa, args, *ring((6, 3), (3, 4)))
        T.hold(sdpa, args, [None, T.shard(-2), T.shard(-2)], (3,))
    T.hold(sdpa, [q, k[:1].clone(), v[:1].clone()], [T.shard(0)] + [T.shard(2)] * 2, (2,))


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


# what it costs ------------------------------------------------------------------------------------


def test_pieces_are_the_causal_mask():
    for rows in range(6):
        for keys in range(6):
            for shift in (*range(-7, 8), None):
                seen = torch.zeros(rows, keys, dtype=torch.int)
                for p in pieces(rows, keys, shift):
                    part = seen[slice(*p.rows), slice(*p.keys)]
                    assert not p.triangle or part.shape[0] == part.shape[1]
                    part += torch.ones_like(part).tril() if p.triangle else 1
                want = torch.ones(rows, keys, dtype=torch.int)
                assert torch.equal(seen, want if shift is None else want.tril(shift))


def test_blocks_travel_only_to_who_needs_them():
    starts, sizes = (0, 4, 8, 12), (4, 4, 4, 4)
    assert hops(starts, sizes, starts, sizes, False) == (3, 3, 3, 3)
    assert hops(starts, sizes, starts, sizes, True) == (3, 2, 1, 0)
    assert hops((0, 4, 4, 8), (4, 0, 4, 4), starts, (4, 4, 0, 8), False) == (3, 3, 0, 3)


def sent(n, causal, places, grad=True):
    mesh = T.make_mesh((n,))
    made = [torch.randn(1, 2, 8 * n, 4, dtype=D) for _ in range(3)]
    x = [
        st.distribute_tensor(m, mesh, [p], src_data_rank=None).requires_grad_(grad)
        for m, p in zip(made, places, strict=True)
    ]
    with st.trace() as forward:
        out = sdpa(*x, is_causal=causal)
    with st.trace() as backward:
        out.sum().backward()
    return [[(s.collective, s.bytes, s.messages) for s in t.sent] for t in (forward, backward)]


@pytest.mark.parametrize("n", [2, 4])
def test_what_the_ring_sends(n):
    block = 2 * (2 * 8 * 4 * 8)  # keys and values of one rank
    for forward, backward in st.simulate(n, sent, n, False, [Shard(2)] * 3):
        assert forward == [("ring", block, 1)] * (n - 1)
        ring_back = [b for c, b, _ in backward if c == "ring"]
        assert sum(ring_back) == (2 * n - 1) * block
        assert {c for c, *_ in backward} <= {"ring", "all_reduce"}
    found = st.simulate(n, sent, n, True, [Shard(2)] * 3)
    assert sum(b for f, _ in found for _, b, _ in f) == n * (n - 1) // 2 * block


def test_what_merging_sends():
    for forward, backward in st.simulate(2, sent, 2, False, [Replicate(), Shard(2), Shard(2)]):
        rows = 2 * 16
        assert [(c, b) for c, b, _ in forward] == [
            ("all_reduce", rows * 8), ("all_reduce", rows * (4 + 1) * 8)
        ]  # fmt: skip
        # the gradient of the queries
        assert [(c, b) for c, b, _ in backward] == [("all_reduce", rows * 4 * 8)]


def kept(n):
    mesh = T.make_mesh((2,))
    x = [
        st.distribute_tensor(torch.randn(1, 1, n, 4), mesh, [Shard(2)]).requires_grad_()
        for _ in range(3)
    ]
    return saved_bytes(lambda: sdpa(*x))


def test_scores_are_not_kept():
    for n in (64, 512):
        # q, k, v, out and lse of this rank
        assert max(st.simulate(2, kept, n)) <= n // 2 * (4 * 4 + 1) * 4


def peak(n):
    mesh = T.make_mesh((2,))
    x = [
        st.distribute_tensor(torch.randn(1, 2, n, 16), mesh, [Shard(2)]).requires_grad_()
        for _ in range(3)
    ]
    for _ in range(2):
        found = peak_bytes(lambda: sdpa(*x).square().sum().backward())
    return found / (n // 2 * 2 * 16 * 4)


@pytest.mark.gloo
def test_memory_is_a_number_of_blocks():
    small, large = (max(T.run_workers(2, peak, n)) for n in (1024, 4096))
    assert large < 1.1 * small < 40, (small, large)  # scores of a block would be 64 and 256


def test_cuda_kernels_take_their_arguments():
    for kernel in (_torch._FLASH_CUDA, _torch._EFFICIENT_CUDA):
        query = torch.empty(2, 4, 33, 64, dtype=torch.bfloat16, device="meta")
        for groups in (2, 4):
            key = torch.empty(2, groups, 40, 64, dtype=torch.bfloat16, device="meta")
            out, lse = kernel.forward(query, key, key, None, False, 0.1)
            grads = kernel.backward(out, query, key, key, None, out, lse, False, 0.1)
            assert out.shape == query.shape and lse.shape == out.shape[:3]
            assert [g.shape for g in grads] == [query.shape, key.shape, key.shape]


# what is refused, and randomness ------------------------------------------------------------------


def second():
    mesh = T.make_mesh((2,))
    x = st.distribute_tensor(q, mesh, [Shard(2)]).requires_grad_()
    (g,) = torch.autograd.grad(sdpa(x, x, x).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        g.square().sum().backward()


def test_second_derivative_is_refused():
    st.simulate(2, second)


def refusals():
    mesh = T.make_mesh((2,))
    x = st.distribute_tensor(q, mesh, [Shard(2)])
    with st.trace() as t:
        for args in (
            [x, k, v[:, :, :3]], [x, k[..., :3], v], [x, k.float(), v], [x, k, v, some[..., :3]],
            [x, k[:, :3], v[:, :3]], [x, k, v, torch.zeros(L, S, dtype=torch.int)],
        ):  # fmt: skip
            with pytest.raises(RuntimeError):
                sdpa(*args)
    assert not t.sent


def test_shapes_that_do_not_fit():
    st.simulate(2, refusals)


def dropped(places, p):
    mesh = T.make_mesh((2,))
    eye = torch.eye(16, dtype=D).expand(1, 2, 16, 16).contiguous()
    g = torch.Generator().manual_seed(1)
    made = [torch.randn(1, 2, 16, 8, dtype=D, generator=g) for _ in range(2)]
    x = [
        st.distribute_tensor(m, mesh, [at], src_data_rank=None)
        for m, at in zip((*made, eye), places, strict=True)
    ]
    torch.manual_seed(5)
    weights = sdpa(*x, dropout_p=p).full_tensor()
    whole = sdpa(*made, eye)
    keep = weights != 0
    assert torch.allclose(weights, whole * keep / (1 - p), rtol=1e-12, atol=1e-15)
    assert abs(float(keep.double().mean()) - (1 - p)) < 0.1
    assert not torch.equal(keep[:, :, :8], keep[:, :, 8:])
    assert not torch.equal(keep[..., :8], keep[..., 8:])
    # the gradient is that of the same draw
    y = [z.detach().requires_grad_() for z in x]
    h = 1e-6

    def loss(*z):
        torch.manual_seed(5)
        return (sdpa(*z, dropout_p=p) * whole).sum()

    loss(*y).backward()
    for i in range(3):
        step = torch.randn(y[i].shape, dtype=D, generator=g)
        moved = [[z.detach() + (s * h * step if i == j else 0) for j, z in enumerate(y)] for s in (1, -1)]  # fmt: skip
        want = (loss(*moved[0]) - loss(*moved[1])) / (2 * h)
        got = (y[i].grad * step).sum()
        assert abs(float(want) - float(got)) < 1e-7 * max(1, abs(float(want))), (i, want, got)
    return keep


@pytest.mark.parametrize("places", [[S2, S2, S2], [R, S2, S2], [S2, R, R], [S1, S1, S1], [R, R, R]])
def test_dropout(places):
    first, other = st.simulate(2, dropped, places, 0.3)
    assert torch.equal(first, other)


# modules ------------------------------------------------------------------------------------------

tokens = torch.randn(3, 7, 8, dtype=D)
other = torch.randn(3, 5, 8, dtype=D)
upper = torch.ones(7, 7, dtype=torch.bool).triu(1)
padding = torch.zeros(3, 7, dtype=torch.bool)
padding[1, 5:] = True


class Attention(nn.Module):
    def __init__(self, first, weights, **how):
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.MultiheadAttention(8, 2, batch_first=first, dtype=D, **how)
        self.weights = weights

    def forward(self, x, mask=None, pad=None):
        out, w = self.inner(
            x, x, x, attn_mask=mask, key_padding_mask=pad, need_weights=self.weights
        )
        return (out, w) if self.weights else out


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_multihead_attention(first, weights):
    x = tokens if first else tokens.transpose(0, 1).contiguous()
    d = 1 if first else 0
    for module in (Attention(first, weights), Attention(first, weights).eval()):
        for cut in T.cuts(7):
            T.hold(module, [x], [T.shard(d, cut)], (len(cut),))
        T.hold(module, [x, upper, padding], [T.shard(d), None, None], (3,))
        T.hold(module, [x, None, padding], [T.shard(d), None, T.shard(1)], (3,))
        T.hold(module, [x], [T.shard(1 - d)], (2,))
        T.hold(module, [x], [T.On([Shard(d), Shard(1 - d)])], (2, 2))


class Plainly(nn.Module):
    """Runs without gradients, where torch has fused layers that must not be taken."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        with torch.no_grad():
            return self.inner(*args, **kwargs)


LAYER = dict(d_model=8, nhead=2, dim_feedforward=12, dtype=D)


@pytest.mark.parametrize("first", [False, True])
def test_transformer_layers(first):
    x, y = (t if first else t.transpose(0, 1).contiguous() for t in (tokens, other))
    on = T.shard(1 if first else 0, (3, 0, 4))
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        for fused in ("_native_multi_head_attention", "_transformer_encoder_layer_fwd"):
            patch.setattr(torch, fused, _never(getattr(torch, fused)))
        for p, mode in ((0.0, True), (0.1, False)):
            encoder = nn.TransformerEncoderLayer(**LAYER, dropout=p, batch_first=first).train(mode)
            decoder = nn.TransformerDecoderLayer(**LAYER, dropout=p, batch_first=first).train(mode)
            stack = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False).train(mode)
            T.hold(encoder, [x], [on], (3,))
            T.hold(stack, [x, upper, padding], [on, None, None], (3,))
            T.hold(decoder, [x, y], [on, T.shard(1 if first else 0)], (3,))
            T.hold(decoder, [x, y], [on, None], (3,))
            T.hold(Plainly(encoder), [x], [on], (3,), grad=False)
            T.hold(Plainly(stack), [x, None, padding], [on, None, None], (3,), grad=False)
            T.hold(Plainly(Attention(first, False)).eval(), [x], [on], (3,), grad=False)


def _never(fused):
    """The fused layer, for plain tensors only."""

    def run(*args, **kwargs):
        assert not any(isinstance(a, st.ShardTensor) for a in args)
        return fused(*args, **kwargs)

    return run


def trains():
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(**LAYER, batch_first=True)
    x = st.distribute_tensor(tokens, T.make_mesh((3,)), [Shard(1)])
    net(x).square().mean().backward()
    return [p.grad for p in net.parameters()]


def test_training_with_dropout_gives_equal_gradients():
    first, *rest = st.simulate(3, trains)
    for grads in rest:
        assert all(torch.equal(a, b) for a, b in zip(first, grads, strict=True))


# compiled -----------------------------------------------------------------------------------------


def compiled(causal):
    mesh = T.make_mesh((2,))
    found = []
    run = st.compile(lambda x, y: sdpa(x, y, y, is_causal=causal), backend="aot_eager")
    for fn in (lambda x, y: sdpa(x, y, y, is_causal=causal), run):
        x, y = (
            st.distribute_tensor(z, mesh, [Shard(2)], src_data_rank=None).requires_grad_()
            for z in (q, k)
        )
        out = fn(x, y)
        out.square().sum().backward()
        found.append([z.full_tensor() for z in (out, x.grad, y.grad)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("causal", [False, True])
def test_compiled(causal):
    st.simulate(2, compiled, causal)
