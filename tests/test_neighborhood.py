"""Neighbourhood attention against its definition, written as loops; NATTEN's names."""

import itertools

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor._torch.world import silent_world
from shardtensor.attention import tiles
from shardtensor.ranks.measure import peak_bytes, saved_bytes
from shardtensor.rules.attention import neighborhood_strips
from shardtensor.spec import Spec
from shardtensor.tensor import wrap

torch.manual_seed(0)
D = torch.float64
R, S0, S1, S2, S3, S4 = Replicate(), Shard(0), Shard(1), Shard(2), Shard(3), Shard(4)


# the definition ----------------------------------------------------------------------------------


def seen(i, n, kernel, stride, dilation, causal):
    """The tokens of n that token i attends to."""
    own = [j for j in range(n) if j % dilation == i % dilation]
    groups = [own[a : a + stride] for a in range(0, len(own), stride)]
    group = next(g for g in groups if i in g)
    if causal:
        until = own[: own.index(group[-1]) + 1]
        return [j for j in until[-kernel:] if j <= i]
    start = own.index(group[min(stride // 2, len(group) - 1)]) - kernel // 2
    while start < 0:
        start += 1
    while start + kernel > len(own):
        start -= 1
    return own[start : start + kernel]


def mask_of(shape, kernel, stride, dilation, causal):
    """(queries, keys) over all tokens of the grid."""
    whole = torch.ones(1, 1, dtype=torch.bool)
    for n, *options in zip(shape, kernel, stride, dilation, causal, strict=True):
        own = torch.zeros(n, n, dtype=torch.bool)
        for i in range(n):
            own[i, seen(i, n, *options)] = True
        whole = torch.kron(whole.long(), own.long()).bool()
    return whole


def each(x, n):
    return tuple(x) if isinstance(x, list | tuple) else (x,) * n


def reference(q, k, v, kernel_size, stride=1, dilation=1, is_causal=False, scale=None):
    n = q.ndim - 3
    mask = mask_of(q.shape[1:-2], *(each(x, n) for x in (kernel_size, stride, dilation, is_causal)))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    times = q.shape[-2] // k.shape[-2]
    a, b, c = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    b, c = (x.repeat_interleave(times, 1) for x in (b, c))
    weights = (a @ b.mT * scale).masked_fill(~mask, -torch.inf).softmax(-1)
    return (weights @ c).transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])


def na(q, k, v, **options):
    """Ours on ShardTensors, the definition on plain tensors."""
    ours = any(isinstance(x, st.ShardTensor) for x in (q, k, v))
    return (st.neighborhood_attention if ours else reference)(q, k, v, **options)


def tokens(*spatial, batch=1, heads=2, width=4):
    return list(torch.randn(3, batch, *spatial, heads, width, dtype=D))


def check(x, places, mesh_shape, **options):
    return T.hold(
        na, x, [places] * 3 if not isinstance(places, list) else places, mesh_shape, kwargs=options
    )[0]


OPTIONS = [
    dict(kernel_size=k, stride=s, dilation=d, is_causal=c)
    for k, s, d, c in itertools.product((2, 3, 4, 5), (1, 2, 3), (1, 2, 3), (False, True))
    if s <= k and k * d <= 13
]


# plain tensors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [2, 64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_plain(options, least, monkeypatch):
    monkeypatch.setitem(tiles.LEAST, 1, least)
    tiles._tiles.cache_clear()
    x = tokens(13, batch=2)
    x = [y.requires_grad_() for y in x]
    g = torch.randn(x[0].shape, dtype=D)
    got, want = (fn(*x, **options) for fn in (st.neighborhood_attention, reference))
    T.same(got, want.detach(), "value")
    for a, b in zip(*(torch.autograd.grad(y, x, g) for y in (got, want)), strict=True):
        T.same(a, b, "gradient")
    tiles._tiles.cache_clear()


def test_second_derivative():
    x = [y.requires_grad_() for y in tokens(7, heads=1, width=2)]
    torch.autograd.gradgradcheck(lambda *x: st.neighborhood_attention(*x, 3), x)


@pytest.mark.parametrize("entries", [1, 100])
def test_large_tiles_are_halved(entries, monkeypatch):
    monkeypatch.setattr(tiles, "MASK", entries)
    monkeypatch.setattr(tiles, "CHUNK", 100)
    tiles._tiles.cache_clear()
    x = tokens(11, 9)
    T.same(st.neighborhood_attention(*x, (7, 3)), reference(*x, (7, 3)), "value")
    tiles._tiles.cache_clear()


def test_scores_are_not_kept():
    x = [y.requires_grad_() for y in tokens(512, heads=1)]
    # q, k, v and the result are of one size, the log-sum-exp of a quarter of it
    assert saved_bytes(lambda: st.neighborhood_attention(*x, 63)) <= 4.25 * 512 * 4 * 8


def test_memory_is_a_number_of_inputs():
    found = []
    for n in (8192, 32768):
        x = [y.requires_grad_() for y in tokens(n)]
        step = lambda x=x: st.neighborhood_attention(*x, 31).sum().backward()  # noqa: E731
        found.append(peak_bytes(step) / (x[0].numel() * 8))
    # the gradients among them; what does not grow is that of CHUNK scores
    assert found[1] < found[0] and found[1] < 12, found


def test_shapes_that_do_not_fit():
    q, k, v = tokens(6, 6)
    for args, options in (
        ((q, k, v), dict(kernel_size=7)),
        ((q, k, v), dict(kernel_size=3, dilation=(1, 3))),
        ((q, k, v), dict(kernel_size=2, stride=3)),
        ((q, k, v), dict(kernel_size=(3, 3, 3))),
        ((q, k, v), dict(kernel_size=0)),
        ((q, k[:, :5], v), dict(kernel_size=3)),
        ((q, k[..., :2], v), dict(kernel_size=3)),
        ((q, k.float(), v), dict(kernel_size=3)),
        ((q[0, 0], k[0, 0], v[0, 0]), dict(kernel_size=3)),
        ((q, *torch.cat([k, v[..., :1, :]], -2).expand(2, -1, -1, -1, -1, -1)), dict(kernel_size=3)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="neighborhood_attention"):
            st.neighborhood_attention(*args, **options)


# shards ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_one_dim(options):
    x = tokens(13)
    for cut in T.cuts(13):
        assert check(x, T.shard(1, cut), (len(cut),), **options).dims[1].sizes == cut


@pytest.mark.parametrize("options", [
    dict(kernel_size=3), dict(kernel_size=(4, 3), dilation=(2, 1)), dict(kernel_size=(2, 5), is_causal=(True, False)),
    dict(kernel_size=(3, 4), stride=(2, 3), scale=0.3), dict(kernel_size=3, dilation=(3, 2), is_causal=True),
], ids=str)  # fmt: skip
def test_two_dims(options):
    x = tokens(9, 8)
    for cut in T.cuts(9):
        check(x, T.shard(1, cut), (len(cut),), **options)
    check(x, T.shard(2, (5, 0, 3)), (3,), **options)
    for at in ([S1, S2], [S2, S1], [S1, S1], [S2, R]):
        check(x, T.On(at), (2, 2), **options)
    check(x, T.On([S1, S2], {1: (8, 1), 2: (0, 8)}), (2, 2), **options)


def test_three_dims():
    x = tokens(5, 4, 6, heads=1, width=2)
    options = dict(
        kernel_size=(3, 2, 3), dilation=(1, 2, 2), stride=(2, 1, 1), is_causal=(False, True, False)
    )
    for cut in T.cuts(5):
        check(x, T.shard(1, cut), (len(cut),), kernel_size=(3, 4, 2))
    check(x, T.shard(3, (1, 4, 0, 1)), (4,), **options)
    for at in ([S1, S2], [S3, S1], [S2, S3]):
        check(x, T.On(at), (2, 2), **options)


def test_batch_heads_and_embedding():
    x = tokens(7, 6, batch=3, heads=4)
    for d in (0, 3, 4):
        for n in (2, 3):
            spec = check(x, T.shard(d), (n,), kernel_size=3)
            assert bool(spec.dims[d].axes) == (d < 4)
    for at in ([S0, S1], [S1, S3], [S3, S2], [S0, S3], [S4, S1], [R, S2]):
        check(x, T.On(at), (2, 2), kernel_size=(3, 4))


def test_operands_that_lie_otherwise():
    x = tokens(7, 6, heads=2)
    cut, other = T.shard(1, (4, 3)), T.shard(1, (1, 6))
    for places in ([cut, other, cut], [cut, None, None], [None, cut, None], [T.shard(2), cut, other],
                   [T.replicated(), None, cut], [cut, T.shard(3), T.shard(0)]):  # fmt: skip
        check(x, places, (2,), kernel_size=3)
    narrow = [*x[:2], x[2][..., :3].clone()]
    check(narrow, T.shard(1, (1, 5, 1)), (3,), kernel_size=3)


def test_heads_that_share_keys():
    q = tokens(7, heads=4)[0]
    k, v = tokens(7, heads=2)[:2]
    check([q, k, v], T.shard(1, (3, 4)), (2,), kernel_size=3)
    check([q, k, v], T.shard(2), (2,), kernel_size=3)
    places = [T.shard(2, (1, 3)), T.shard(2), T.shard(2)]
    with pytest.raises(st.RankError, match="multiples of 2"):
        check([q, k, v], places, (2,), kernel_size=3)


@pytest.mark.gloo
def test_processes():
    x = tokens(9, 8)
    places = [T.On([S1, S2], {1: (7, 2)})] * 3
    T.hold(na, x, places, (2, 2), kwargs=dict(kernel_size=(5, 3)), run=T.run_workers)


def second_of_sharded(cut):
    mesh = T.make_mesh((2,))
    x = torch.randn(1, 7, 1, 2, dtype=D, generator=torch.Generator().manual_seed(0))
    found = []
    s = st.distribute_tensor(x, mesh, [S1], src_data_rank=None, sizes={1: cut}).requires_grad_()
    for y in (s, x.requires_grad_()):
        (g,) = torch.autograd.grad(na(y, y, y, kernel_size=3).square().sum(), y, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), y)[0])
    T.same(*found, "second derivative")


def test_second_derivative_of_shards():
    for cut in ((4, 3), (6, 1)):
        st.simulate(2, second_of_sharded, cut)


def compiled():
    mesh = T.make_mesh((2,))
    x = torch.randn(1, 9, 2, 4, dtype=D, generator=torch.Generator().manual_seed(0))
    run = st.compile(lambda y: st.neighborhood_attention(y, y, y, 3), backend="aot_eager")
    y = st.distribute_tensor(x, mesh, [S1], src_data_rank=None).requires_grad_()
    got, want = run(y), reference(x.requires_grad_(), x, x, 3)
    got.square().sum().backward()
    want.square().sum().backward()
    T.same(got, want.detach(), "value")
    T.same(y.grad, x.grad, "gradient")


def test_compiled():
    st.simulate(2, compiled)


# what is sent ------------------------------------------------------------------------------------


def sent(shape, at, sizes, mesh_shape, options):
    mesh = T.make_mesh(mesh_shape)
    x = [
        st.distribute_tensor(y, mesh, at, src_data_rank=None, sizes=sizes).requires_grad_()
        for y in tokens(*shape)
    ]
    with st.trace() as forward, st.fallback("error"):
        out = st.neighborhood_attention(*x, **options)
    g = torch.ones_like(out)
    with st.trace() as backward:
        out.backward(g)
    assert forward.ops == [("neighborhood_attention", "handler")]
    assert {s.collective for s in (*forward.sent, *backward.sent)} <= {"window", "window_add"}
    return [(t.bytes, t.messages) for t in (forward, backward)]


ROW = 2 * (2 * 4 * 8)  # one row of keys and values: heads, embedding, fp64


def test_what_is_sent():
    found = st.simulate(4, sent, (32,), [S1], None, (4,), dict(kernel_size=5))
    assert [f for f, _ in found] == [(2 * ROW, 1), (4 * ROW, 2), (4 * ROW, 2), (2 * ROW, 1)]
    # each rank sends back the gradients of what it got; as many
    assert [b for _, b in found] == [f for f, _ in found]
    # causal: to the right only. Dilated: as far as the dilation reaches
    found = st.simulate(
        4, sent, (32,), [S1], None, (4,), dict(kernel_size=3, dilation=2, is_causal=True)
    )
    assert [f for f, _ in found] == [(4 * ROW, 1)] * 3 + [(0, 0)]
    # windows of border queries are shifted inward, over two ranks (4 rows to each)
    found = st.simulate(3, sent, (9,), [S1], {1: (1, 2, 6)}, (3,), dict(kernel_size=7))
    assert [f for f, _ in found] == [(2 * ROW, 2), (4 * ROW, 2), (8 * ROW, 2)]
    # blocks that are whole on their ranks
    found = st.simulate(2, sent, (16,), [S1], None, (2,), dict(kernel_size=4, stride=4))
    assert [f for f, _ in found] == [(0, 0)] * 2
    # two dims: strips of rows, then of columns with the corners
    found = st.simulate(4, sent, (8, 8), [S1, S2], None, (2, 2), dict(kernel_size=3))
    assert [f for f, _ in found] == [((4 + 5) * ROW, 2)] * 4


# without a copy of keys and values ------------------------------------------------------------


STRIPS = {
    "two": ((9, 8), [S1, S2], None, (2, 2), dict(kernel_size=(3, 4))),
    "uneven, one empty": ((9, 8), [S1, S2], {1: (5, 0, 4), 2: (2, 6)}, (3, 2), dict(kernel_size=3)),
    "over two ranks": ((12,), [S1], {1: (1, 2, 9)}, (3,), dict(kernel_size=7)),
    "dilated, strided": ((13,), [S1], {1: (4, 9)}, (2,), dict(kernel_size=4, dilation=3, stride=2)),
    "causal": ((6, 7), [S2], None, (3,), dict(kernel_size=3, is_causal=(False, True))),
    "three": ((4, 5, 4), [S1, S3], None, (2, 2), dict(kernel_size=3)),
}


@pytest.mark.parametrize("name", STRIPS)
def test_strips(name, in_flight):
    shape, on, sizes, mesh, options = STRIPS[name]
    calls = in_flight(neighborhood_strips._Strips)

    def twice(*x):
        y = st.neighborhood_attention(*x, **options)
        found = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        return [g * g for g in found]

    places = [T.On(on, sizes)] * 3
    T.hold(lambda *x: st.neighborhood_attention(*x, **options), tokens(*shape), places, mesh)
    T.hold(twice, tokens(*shape), places, mesh)
    T.hold(lambda x: twice(x, x * 2, x.cos()), tokens(*shape)[:1], places[:1], mesh)
    assert calls


def test_second_derivative_without_queries():
    def penalty(x):
        y = st.neighborhood_attention(x, x, x, 3)
        (g,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        return g * g

    T.hold(penalty, tokens(4, 4)[:1], [T.shard(1, (4, 0))], (2,))


def test_strips_take_the_memory_of_a_share(in_flight, monkeypatch):
    in_flight(neighborhood_strips._Strips)
    monkeypatch.setattr(tiles, "CHUNK", 1 << 17)
    monkeypatch.setattr(tiles, "LITTLE", 1)
    shape = (1, 256, 32, 1, 64)

    def step(x):
        def run():
            y = st.neighborhood_attention(*x, 3)
            getattr(y, "_local", y).sum().backward()

        return run

    alone = peak_bytes(step([torch.randn(shape).requires_grad_() for _ in range(3)]))
    with silent_world(1, 4):
        spec = Spec.of(T.make_mesh((4,)), [S1], shape)
        local = [torch.randn(spec.local_shape).requires_grad_() for _ in range(3)]
        x = [wrap(y, spec) for y in local]
        found = peak_bytes(step(x))
        kept = saved_bytes(lambda: st.neighborhood_attention(*x, 3))
    share, row = local[0].nbytes, 32 * 64 * 4
    # the result, its log-sum-exp, and two rows each of keys and values
    assert kept == share + share // 64 + 4 * row
    # it was 1.6, and more with tiles of as many scores as on one device
    assert found <= 1.1 * alone / 4


def test_large_scores_that_are_equal():
    """Their gradients, too, know how many keys share the weight."""
    q, k, v = (x.float() for x in tokens(9, heads=1, width=8))
    q, k = q.abs() * 300, torch.ones_like(k) * 300
    mine, theirs = ([y.clone().requires_grad_() for y in (q, k, v)] for _ in range(2))
    st.neighborhood_attention(*mine, 3).square().sum().backward()
    reference(*[y.double() for y in theirs], 3).square().sum().backward()
    # that of the queries is zero
    for a, b in zip(mine[1:], theirs[1:], strict=True):
        T.same(a.grad, b.grad.to(a.dtype), "gradient", 2e-4)
