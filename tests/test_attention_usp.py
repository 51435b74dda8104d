"""Attention by an all-to-all within teams of ranks and a ring of teams, against plain torch."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import Replicate, Shard
from torch.nn.attention import SDPBackend, sdpa_kernel

import shardtensor as st
from shardtensor import testing as T
from shardtensor.attention import ring, strategy
from shardtensor.attention.schedule import seated, teams
from shardtensor.comm import ops

D = torch.float64
R, S2 = Replicate(), Shard(2)
CUTS = [(3, 3, 3, 3), (1, 8, 0, 3), (4, 1, 1, 2, 0, 4), (2, 2, 2, 2, 1, 1, 1, 1)]


def operands(heads=12, kv=12, tokens=12, keys=None, width=3, out=3):
    g = torch.Generator().manual_seed(heads + kv)
    shapes = ((heads, tokens, width), (kv, keys or tokens, width), (kv, keys or tokens, out))
    return [torch.randn(2, *shape, dtype=D, generator=g) for shape in shapes]


def attention(kind="usp", **options):
    def run(*args):
        with strategy(kind):
            return F.scaled_dot_product_attention(*args, **options)

    return run


def test_teams():
    assert teams(8, 4, False) == tuple(range(8))
    assert teams(8, 4, True) == (0, 1, 6, 7, 2, 3, 4, 5)
    assert teams(6, 3, True) == (0, 2, 5, 1, 3, 4)
    for n, size in ((6, 3), (8, 2), (12, 4), (9, 3)):
        assert sorted(teams(n, size, True)) == list(range(n))
    spans = ((0, 2), (2, 0), (2, 3), (5, 1))
    assert seated(spans, (0, 1, 2, 3), 2) == ((0, 2), (2, 4))
    assert seated(spans, (0, 3, 1, 2), 2) == ((0, 2), (5, 1), (2, 3), (0, 0))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cut", CUTS)
def test_one_device_numbers(cut, causal):
    fn = attention(is_causal=causal, enable_gqa=True, scale=0.3)
    for kv, out in ((12, 3), (2, 3), (4, 5)):
        T.hold(fn, operands(12, kv, out=out), [T.shard(2, cut)] * 3, (len(cut),))


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention(causal):
    fn = attention(is_causal=causal)
    for cq, ck in (((3, 3, 3, 3), (1, 4, 0, 2)), ((0, 5, 0, 7), (2, 2, 2, 1))):
        for out in (3, 5):
            places = [T.shard(2, cq), T.shard(2, ck), T.shard(2, ck)]
            T.hold(fn, operands(6, 6, 12, 7, out=out), places, (4,))


@pytest.mark.parametrize("kind", ["usp", "all_to_all"])
@pytest.mark.parametrize("shape", [(12, 12), (6, 1, 12), (2, 6, 12, 12), (2, 1, 12, 1)])
def test_masks(shape, kind):
    g = torch.Generator().manual_seed(1)
    bias = torch.randn(shape, dtype=D, generator=g)
    seen = torch.rand(shape, generator=g) < 0.7
    seen[..., :1, :] = False
    cut = (1, 6, 0, 5)
    ways = [(kind, 6 if kind == "usp" else 4), (kind, 8)]
    for mask in (bias, seen, bias.masked_fill(~seen, torch.finfo(D).min)):
        rows = T.shard(mask.ndim - 2, cut) if mask.shape[-2] > 1 else None
        for place in (None, rows):
            for name, heads in ways:
                if mask.ndim > 2 and mask.shape[-3] > 1 and heads != 6:
                    continue
                qkv = operands(heads, heads)
                T.hold(attention(name), [*qkv, mask], [*[T.shard(2, cut)] * 3, place], (4,))


def refused():
    """Whether this torch takes no mask beside is_causal (2.14)."""
    q, k, v = operands()
    try:
        F.scaled_dot_product_attention(q, k, v, torch.ones(12, 12).bool(), is_causal=True)
    except RuntimeError:
        return True
    return False


@pytest.mark.skipif(refused(), reason="this torch refuses one")
@pytest.mark.parametrize("shape", [(12, 12), (2, 6, 12, 12), (1, 1, 12, 12)])
def test_a_mask_beside_is_causal(shape):
    """Teams have tokens from the front and the back."""
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    cut = (2, 6, 1, 3)
    for place in (T.shard(seen.ndim - 2, cut), None):
        args, places = [*operands(6, 6), seen], [*[T.shard(2, cut)] * 3, place]
        T.hold(attention(is_causal=True), args, places, (4,))


def penalty(kind, **options):
    def run(*args):
        out = attention(kind, **options)(*args)
        wanted = [x for x in args if x.requires_grad]
        return out, *torch.autograd.grad(out.square().sum(), wanted, create_graph=True)

    return run


@pytest.mark.parametrize("causal", [False, True])
def test_second_derivatives(causal):
    g = torch.Generator().manual_seed(3)
    mask = torch.randn(6, 12, 12, dtype=D, generator=g).masked_fill(
        torch.rand(12, 12, generator=g) < 0.4, -math.inf
    )
    mask[:, 2] = torch.finfo(D).min
    with sdpa_kernel(SDPBackend.MATH):
        for cut in ((4, 3, 0, 5), (1, 2, 3, 1, 4, 1)):
            place = [T.shard(2, cut)] * 3
            fn = penalty("usp", is_causal=causal, enable_gqa=True)
            T.hold(fn, operands(6, 2), place, (len(cut),))
            if not causal:
                masked = [*operands(6, 6), mask]
                T.hold(penalty("usp"), masked, [*place, T.shard(1, cut)], (len(cut),))


@pytest.mark.parametrize("causal", [False, True])
def test_two_axes(causal):
    fn = attention(is_causal=causal)
    nested = T.On([S2, S2], {2: (3, 4, 0, 3, 1, 1, 0, 0)})
    T.hold(fn, operands(), [nested] * 3, (2, 4))
    T.hold(fn, operands(), [nested] * 3, (4, 2))
    # beside a batch, beside copies, heads on the other axis
    for other in (Shard(0), R, Shard(1)):
        for places in ([other, S2], [S2, other]):
            mesh = (2, 4) if places[1] is S2 else (4, 2)
            T.hold(fn, operands(8, 8), [T.On(places)] * 3, mesh)
    # queries or keys on more axes than the other
    one, other = T.On([S2, R]), T.On([S2, S2])
    T.hold(fn, operands(), [one, other, other], (4, 2))
    T.hold(fn, operands(), [other, one, one], (4, 2))
    T.hold(fn, operands(), [T.On([R, S2]), other, other], (2, 4))


@pytest.mark.parametrize("keys", [1, 5])
def test_a_mask_of_a_single_query(keys):
    """Whose rows are cut as the query is: most ranks have none."""
    one, many = T.shard(2, (0, 1, 0, 0)), T.shard(2, (keys, 0, 0, 0))
    given = operands(4, 4, tokens=1, keys=keys)
    for shape in ((1, keys), (2, 4, 1, keys)):
        mask = torch.randn(shape, dtype=D, generator=torch.manual_seed(0))
        for rows in (None, T.shard(len(shape) - 2, (0, 1, 0, 0))):
            T.hold(attention(), [*given, mask], [one, many, many, rows], (4,), atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_teams_of_many_and_of_few_tokens_send_as_many_messages(causal, monkeypatch):
    """What is large for one team, and would go in parts, is small for the other."""
    monkeypatch.setattr(ops, "LARGE_SHARE", 2000)
    place = T.shard(2, (6, 4, 1, 1))
    given = operands(4, 4, width=4, out=4)
    T.hold(attention(is_causal=causal), given, [place] * 3, (4,))


def sent(kind, ranks, causal=False, heads=12, grad=False):
    def run():
        x = [
            st.distribute_tensor(x, T.make_mesh((ranks,)), [S2]).requires_grad_(grad)
            for x in operands(heads, heads, tokens=8 * ranks)
        ]
        with st.trace() as t:
            out = attention(kind, is_causal=causal)(*x)
            if grad:
                out.sum().backward()
        return [(s.collective, s.bytes, s.messages) for s in t.sent]

    return st.simulate(ranks, run)


def test_what_is_sent():
    """12 heads on 8 ranks: teams of 4, whose ranks have 3 heads each, and a ring of 2."""
    one = 2 * 12 * 8 * 3 * 8  # bytes of a rank's queries
    for found in sent("usp", 8):
        assert found == [
            ("swap", 3 * one * 3 // 4, 3),
            ("ring", 2 * one, 1),
            ("swap", one * 3 // 4, 3),
        ]
    # no collective of another kind, and as much back
    for found in sent("usp", 8, causal=True, grad=True):
        back = [b for c, b, _ in found if c == "swap"]
        assert sum(back) == 2 * 4 * one * 3 // 4
        # and the sum's
        assert [c for c, *_ in found if c not in ("swap", "ring")] == ["all_reduce"]


def multiplied(monkeypatch, kind, ranks, causal, heads):
    """For each rank, how many products of a query with a key it computes."""
    found = [0] * ranks
    plain = ring.forward

    def counted(q, k, v, mask, rule, *rest):
        area = q.shape[2] * k.shape[2]
        if rule.triangle:
            area = q.shape[2] * (q.shape[2] + 1) // 2
        found[dist.get_rank()] += q.shape[0] * q.shape[1] * area
        return plain(q, k, v, mask, rule, *rest)

    monkeypatch.setattr(ring, "forward", counted)
    sent(kind, ranks, causal, heads)
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("causal", [False, True])
def test_all_ranks_work_alike(monkeypatch, causal):
    tokens = 64
    whole = 2 * 12 * (tokens * (tokens + 1) // 2 if causal else tokens**2)
    found = multiplied(monkeypatch, "usp", 8, causal, 12)
    assert found == [whole // 8] * 8
    around = multiplied(monkeypatch, "ring", 8, causal, 12)
    assert sum(around) == whole and (max(around) > 1.8 * whole / 8) == causal


def dropped(places, ranks):
    """The weights are those of one device, some of them 0, each draw different; and the gradient."""
    mesh = T.make_mesh(ranks)
    g = torch.Generator().manual_seed(1)
    made = [torch.randn(1, 4, 16, 8, dtype=D, generator=g) for _ in range(2)]
    eye = torch.eye(16, dtype=D).expand(1, 4, 16, 16).contiguous()
    x = [
        st.distribute_tensor(m, mesh, places, src_data_rank=None).requires_grad_()
        for m in (*made, eye)
    ]
    torch.manual_seed(5)
    out = attention(dropout_p=0.3)(*x)
    weights, whole = out.full_tensor(), F.scaled_dot_product_attention(*made, eye)
    keep = weights != 0
    assert torch.allclose(weights, whole * keep / 0.7, rtol=1e-12, atol=1e-15)
    assert abs(float(keep.double().mean()) - 0.7) < 0.1
    parts = [p for rows in keep.chunk(4, 2) for p in rows.chunk(4, 3)]
    parts = [h for p in parts for h in p.unbind(1)]
    assert len({p.numpy().tobytes() for p in parts}) == len(parts)
    # with the weights of that draw
    y = [z.clone().requires_grad_() for z in (*made, eye)]
    scores = (y[0] @ y[1].mT * 8**-0.5).softmax(-1) * keep / 0.7 @ y[2]
    cotangent = torch.randn(whole.shape, dtype=D, generator=g)
    want = torch.autograd.grad(scores, y, cotangent)
    cut = st.distribute_tensor(cotangent, mesh, places, src_data_rank=None)
    for a, b in zip(torch.autograd.grad(out, x, cut), want, strict=True):
        assert torch.allclose(a.full_tensor(), b, rtol=1e-11, atol=1e-13)
    return keep


@pytest.mark.parametrize("ranks, places", [((4,), [S2]), ((2, 4), [R, S2]), ((2, 2), [S2, S2])])
def test_dropout(ranks, places):
    first, *others = st.simulate(math.prod(ranks), dropped, places, ranks)
    assert all(torch.equal(first, other) for other in others)


def test_dropout_as_on_one_device():
    def run(q, k, v):
        torch.manual_seed(7)
        with st.random.match_single_device():
            return attention(dropout_p=0.4)(q, k, v)

    T.hold(run, operands(4, 4, 8), [T.shard(2)] * 3, (4,))


def compiled(causal):
    mesh = T.make_mesh((4,))
    found = []
    with strategy("usp"):
        for wrap in (lambda fn: fn, lambda fn: st.compile(fn, backend="aot_eager")):
            run = wrap(lambda x, y: F.scaled_dot_product_attention(x, y, y, is_causal=causal))
            x, y, _ = (
                st.distribute_tensor(z, mesh, [S2], src_data_rank=None).requires_grad_()
                for z in operands(6, 6, 8)
            )
            out = run(x, y)
            out.square().sum().backward()
            found.append([z.full_tensor() for z in (out, x.grad, y.grad)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_compiled():
    st.simulate(4, compiled, True)


def causally(*args):
    return attention(is_causal=True)(*args)


@pytest.mark.gloo
def test_over_gloo():
    place = [T.shard(2, (4, 3, 0, 5))] * 3
    T.hold(causally, operands(6, 6), place, (4,), run=T.run_workers)


def test_refused():
    with pytest.raises(st.RankError, match=r"strategy\('usp'\) for heads of .* teams"):
        T.hold(attention(), operands(2, 2, 6), [T.shard(2)] * 3, (3,))
    with pytest.raises(st.RankError, match="cannot be dealt"):
        T.hold(attention("all_to_all"), operands(3, 3), [T.shard(2)] * 3, (4,))
