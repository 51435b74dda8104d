"""Ring attention: what travels and is kept, what is refused, dropout, compiled."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Replicate, Shard
from torch.nn.attention import SDPBackend, sdpa_kernel

import shardtensor as st
from shardtensor import testing as T
from shardtensor._torch import Block
from shardtensor._torch import attention as kernels
from shardtensor.attention import blocks, ring, strategy
from shardtensor.attention.schedule import laid, pieces
from shardtensor.comm.define import lowered
from shardtensor.ranks.measure import peak_bytes, saved_bytes

torch.manual_seed(0)
D = torch.float64
B, H, L, S, E = 2, 4, 9, 7, 8
q = torch.randn(B, H, L, E, dtype=D)
k, v = torch.randn(2, B, H, S, E, dtype=D)
some = torch.rand(B, H, L, S) > 0.5
R, S1, S2 = Replicate(), Shard(1), Shard(2)
sdpa = F.scaled_dot_product_attention


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
    assert laid(4, starts, sizes, starts, sizes, False).hops == (3, 3, 3, 3)
    assert laid(4, starts, sizes, starts, sizes, True).hops == (3, 2, 1, 0)
    assert laid(4, (0, 4, 4, 8), (4, 0, 4, 4), starts, (4, 4, 0, 8), False).hops == (3, 3, 0, 3)


def sent(n, causal, places, grad=True, dtype=D):
    mesh = T.make_mesh((n,))
    made = [torch.randn(1, 2, 8 * n, 4, dtype=dtype) for _ in range(3)]
    x = [
        st.distribute_tensor(m, mesh, [p], src_data_rank=None).requires_grad_(grad)
        for m, p in zip(made, places, strict=True)
    ]
    with st.trace() as forward, strategy("ring"):
        out = sdpa(*x, is_causal=causal)
    with st.trace() as backward:
        out.sum().backward()
    return [[(s.collective, s.bytes, s.messages) for s in t.sent] for t in (forward, backward)]


@pytest.mark.parametrize("dtype", [D, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_what_the_ring_sends(n, dtype):
    """Keys go to all others, and what these find for them comes home, in the keys' own dtype."""
    block = 2 * (2 * 8 * 4 * dtype.itemsize)  # keys and values of one rank
    for forward, backward in st.simulate(n, sent, n, False, [Shard(2)] * 3, True, dtype):
        assert forward == [("ring", block, 1)] * (n - 1)
        ring_back = [b for c, b, _ in backward if c == "ring"]
        assert sum(ring_back) == 2 * (n - 1) * block
        # the gradients of a step leave with the keys of the next
        assert len(ring_back) == (n + 1 if n > 2 else 2)
        assert {c for c, *_ in backward} <= {"ring", "all_reduce"}
    found = st.simulate(n, sent, n, True, [Shard(2)] * 3, True, dtype)
    seen = n * (n - 1) // 2 * block
    assert sum(b for f, _ in found for _, b, _ in f) == seen
    assert sum(b for _, back in found for c, b, _ in back if c == "ring") == 2 * seen


def errors(n):
    """The errors of a ring's and one device's dk and dv in bf16 over their root mean square."""
    g = torch.Generator().manual_seed(6)
    x = [torch.randn(1, 2, 512, 32, generator=g).bfloat16() for _ in range(4)]
    wide = [y.to(D).requires_grad_() for y in x[:3]]
    want = torch.autograd.grad(sdpa(*wide), wide[1:], x[3].to(D))
    one = [y.clone().requires_grad_() for y in x[:3]]
    alone = torch.autograd.grad(sdpa(*one), one[1:], x[3])
    mesh = T.make_mesh((n,))
    *cut, gs = (st.distribute_tensor(y, mesh, [Shard(2)], src_data_rank=None) for y in x)
    with strategy("ring"):
        found = torch.autograd.grad(sdpa(*(y.requires_grad_() for y in cut)), cut[1:], gs)
    found = [y.full_tensor() for y in found]
    return [
        [float((y - w).square().mean().sqrt() / w.square().mean().sqrt()) for y, w in pair]
        for pair in (zip(found, want, strict=True), zip(alone, want, strict=True))
    ]


@pytest.mark.parametrize("n", [4, 8])
def test_gradients_in_bf16_are_as_good_as_those_of_one_device(n):
    found, alone = st.simulate(n, errors, n)[0]
    assert all(a < 1.15 * b for a, b in zip(found, alone, strict=True)), (found, alone)


def test_what_merging_sends():
    for forward, backward in st.simulate(2, sent, 2, False, [Replicate(), Shard(2), Shard(2)]):
        rows = 2 * 16
        assert [(c, b) for c, b, _ in forward] == [
            ("all_reduce", rows * 8),
            ("all_reduce", rows * (4 + 1) * 8),
        ]
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
        # q, k, v, out and two sums a row of this rank
        assert max(st.simulate(2, kept, n)) <= n // 2 * (4 * 4 + 2) * 4


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
    for kernel in (kernels._FLASH_CUDA, kernels._EFFICIENT_CUDA, kernels._CUDNN):
        for groups, head, width in ((2, 64, 64), (4, 64, 64), (4, 20, 12), (4, 8, 24)):
            meta = {"dtype": torch.bfloat16, "device": "meta"}
            query = torch.empty(2, 4, 33, head, **meta)
            key, value = (torch.empty(2, groups, 40, n, **meta) for n in (head, width))
            biases = [None] if kernel is kernels._FLASH_CUDA else [None, query.new_empty(33, 40)]
            for block in (Block(0.1, bias) for bias in biases):
                out, lse = kernel.forward(query, key, value, block)
                grads = kernel.backward(out, query, key, value, out, lse, block, False)[:3]
                assert out.shape == (2, 4, 33, width) and lse.shape == out.shape[:3]
                assert [g.shape for g in grads] == [query.shape, key.shape, value.shape]


@pytest.mark.parametrize("head, width", [(5, 3), (8, 12), (16, 16)])
def test_heads_of_any_width_are_padded(head, width):
    torch.manual_seed(0)
    query, key = (torch.randn(2, 3, 7, head, dtype=D, requires_grad=True) for _ in range(2))
    value, g = (torch.randn(2, 3, 7, width, dtype=D, requires_grad=True) for _ in range(2))
    whole = sdpa(query, key, value)
    wanted = torch.autograd.grad(whole, (query, key, value), g)
    with torch.no_grad():
        kernel = kernels._padded(kernels._FLASH_CPU)
        block = Block(head**-0.5)
        out, lse = kernel.forward(query, key, value, block)
        found = kernel.backward(g, query, key, value, out, lse, block, False)[:3]
    for a, b in zip((out, *found), (whole, *wanted), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_of_one_number_merge(causal, monkeypatch):
    monkeypatch.setattr(blocks, "_looked_at", lambda lse: False)
    torch.manual_seed(0)
    x = [torch.randn(2, 3, 7, 4, dtype=D) for _ in range(3)]
    for cut in ((4, 3), (3, 0, 4), (1, 1, 4, 1)):
        with strategy("ring"):
            T.hold(lambda *x: sdpa(*x, is_causal=causal), x, [T.shard(2, cut)] * 3, (len(cut),))


# what is refused, and randomness ------------------------------------------------------------------


def second(drop):
    mesh = T.make_mesh((2,))
    x = st.distribute_tensor(q, mesh, [Shard(2)]).requires_grad_()
    (g,) = torch.autograd.grad(sdpa(x, x, x, None, drop).sum(), x, create_graph=True)
    with pytest.raises(st.UnsupportedOpError, match="second derivative of attention"):
        g.square().sum().backward()


def test_second_derivative_with_dropout_is_refused():
    st.simulate(2, second, 0.5)


def penalty(*args, **options):
    out = sdpa(*args, **options)
    wanted = [x for x in args if x is not None and x.requires_grad]
    return out, *torch.autograd.grad(out.square().sum(), wanted, create_graph=True)


def test_second_derivatives():
    torch.manual_seed(3)
    with sdpa_kernel(SDPBackend.MATH):
        for cut in ((3, 4), (1, 4, 0, 2)):
            place, n = T.shard(2, cut), (len(cut),)
            x = torch.randn(3, 2, 2, 7, 4, dtype=D)
            mask = torch.randn(2, 7, 7, dtype=D).masked_fill(torch.rand(7, 7) < 0.4, -math.inf)
            mask[:, 2] = torch.finfo(D).min
            T.hold(penalty, [*x, mask], [place] * 3 + [None], n)
            T.hold(penalty, [*x, mask > 0], [None, place, place, None], n, rtol=1e-11)
            T.hold(penalty, [x[0], *x[1:, :, :1]], [place] * 3, n, kwargs={"enable_gqa": True})
            for kind in ("ring", "zigzag", "all_to_all")[: 4 - n[0] // 2]:
                with strategy(kind):
                    T.hold(penalty, x, [place] * 3, n, kwargs={"is_causal": True})
        both = T.On([Shard(2), Shard(2)], {2: [3, 0, 2, 2]})
        T.hold(penalty, x, [T.On([Shard(2), Replicate()]), both, both], (2, 2))


def empty_part(x):
    mesh = T.make_mesh((2,))
    y = [st.distribute_tensor(a, mesh, [Shard(0)], sizes={0: (2, 0)}) for a in x]
    _, g = penalty(y[0].requires_grad_(), *y[1:])
    with pytest.raises(RuntimeError, match="not implemented"):
        g.sum().backward()


def test_second_derivative_where_a_rank_has_no_samples():
    """Ranks with samples and without take one kernel of torch's, and return or raise alike."""
    x = torch.randn(3, 2, 2, 5, 4, dtype=D, generator=torch.Generator().manual_seed(4))
    with sdpa_kernel(SDPBackend.MATH):
        mask = torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()
        T.hold(penalty, [*x, mask], [T.shard(0, (2, 0))] * 4, (2,))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        st.simulate(2, empty_part, x)


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
        moved = [
            [z.detach() + (s * h * step if i == j else 0) for j, z in enumerate(y)] for s in (1, -1)
        ]
        want = (loss(*moved[0]) - loss(*moved[1])) / (2 * h)
        got = (y[i].grad * step).sum()
        assert abs(float(want) - float(got)) < 1e-7 * max(1, abs(float(want))), (i, want, got)
    return keep


@pytest.mark.parametrize("places", [[S2, S2, S2], [R, S2, S2], [S2, R, R], [S1, S1, S1], [R, R, R]])
def test_dropout(places):
    first, other = st.simulate(2, dropped, places, 0.3)
    assert torch.equal(first, other)


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


@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(4, 4), (5, 0, 3), (8,)])
def test_results_lie_in_memory_as_compilers_are_told(sizes, causal, dtype, monkeypatch):
    """Inductor's code reads them by the strides of the fake kernels."""

    fakes = {ring.attention_op: ring._fake, ring.backward_op: ring._fake_backward}

    def told(op, *args):
        args = lowered(args)
        found = op(*args)
        for x, like in zip(found, fakes[op](*args), strict=True):
            assert x.shape == like.shape and x.dtype == like.dtype
            if x.numel():
                strides = [
                    [s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1]
                    for t in (x, like)
                ]
                assert strides[0] == strides[1], (x.shape, strides)
        return found

    monkeypatch.setattr(ring, "run", told)

    def run():
        mesh = T.make_mesh((len(sizes),))
        # heads beside each other in memory, as projections give them
        x = torch.randn(3, 2, 8, 4, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        x = [st.distribute_tensor(t.transpose(1, 2), mesh, [S2], sizes={2: list(sizes)}) for t in x]
        with strategy("ring"):
            sdpa(*[t.detach().requires_grad_() for t in x], is_causal=causal).sum().backward()

    st.simulate(len(sizes), run)
