"""Attention by an all-to-all of tokens for heads, against plain torch, and when it is chosen."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Replicate, Shard
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import shardtensor as st
from shardtensor import testing as T
from shardtensor.attention import around, cheapest, fits, rates, strategy
from shardtensor.attention.cost import Rates, Way, Work, cost, pairs
from shardtensor.attention.strategy import assume
from shardtensor.attention.zigzag import chunks
from shardtensor.cuts import cut as cut_of

D = torch.float64
torch.manual_seed(0)


def operands(heads=4, kv=4, tokens=10, width=3, out=3):
    shapes = (heads, width), (kv, width), (kv, out)
    return [torch.randn(2, h, tokens, e, dtype=D) for h, e in shapes]


def attention(kind, **options):
    def run(q, k, v):
        with strategy(kind):
            return F.scaled_dot_product_attention(q, k, v, **options)

    return run


@pytest.mark.parametrize("cut", [(10,), (5, 5), (9, 1), (4, 0, 6), (3, 3, 2, 2), (1, 8, 0, 1)])
def test_zigzag(cut):
    fn = attention("zigzag", is_causal=True, enable_gqa=True)
    for heads, kv in ((3, 3), (4, 2)):
        T.hold(fn, operands(heads, kv), [T.shard(2, cut)] * 3, (len(cut),))
    T.hold(fn, operands(3, 3, out=5), [T.shard(2, cut)] * 3, (len(cut),))


def test_zigzag_over_two_axes_and_beside_a_batch():
    fn = attention("zigzag", is_causal=True)
    place = T.On([Shard(2), Shard(2)], {2: (3, 4, 0, 3)})
    T.hold(fn, operands(3, 3), [place] * 3, (2, 2))
    T.hold(fn, operands(3, 3), [T.On([Shard(0), Shard(2)])] * 3, (2, 2))


def test_zigzag_balances():
    """Every rank multiplies about as many queries with keys, where a plain ring differs by far."""
    for n in (2, 3, 4):
        size = 24 * n
        spans = chunks(size, n)
        work = [sum(a + i + 1 for a, rows in pair for i in range(rows)) for pair in spans]
        assert max(work) - min(work) <= size // n
        assert sorted(x for pair in spans for a, m in pair for x in range(a, a + m)) == list(
            range(size)
        )


def test_what_zigzag_sends():
    n, tokens = 4, 8
    block = 2 * tokens * 3 * D.itemsize  # batch, tokens, width of one head
    for sent, names in st.simulate(n, zigzag_sent, n):
        # three quarters of q, k, v go to their chunks and of the result back, then keys go round
        there, ring, back = sent["window"][0], sent["ring"], sent["window"][1]
        assert there <= 3 * 3 * block and back <= 3 * block
        assert ring == [2 * 3 * block] * (n - 1)
        assert names == {"window", "ring"}


def zigzag_sent(n):
    x = [
        st.distribute_tensor(t, T.make_mesh((n,)), [Shard(2)]) for t in operands(3, 3, tokens=8 * n)
    ]
    with st.trace() as t:
        attention("zigzag", is_causal=True)(*x)
    names = {s.collective for s in t.sent}
    return {c: [s.bytes for s in t.sent if s.collective == c] for c in names}, names


def test_zigzag_refuses():
    mask = torch.ones(10, 10, dtype=torch.bool)
    with pytest.raises(st.RankError, match="zigzag"):
        T.hold(
            attention("zigzag", is_causal=True, dropout_p=0.5),
            operands(3, 3),
            [T.shard(2)] * 3,
            (2,),
        )
    with pytest.raises(st.RankError, match="zigzag"):
        T.hold(
            attention("zigzag", is_causal=True),
            operands(3, 3),
            [T.shard(2, (9, 1)), T.shard(2, (5, 5)), T.shard(2, (5, 5))],
            (2,),
        )
    T.hold(attention("zigzag", attn_mask=mask), operands(3, 3), [T.shard(2)] * 3, (2,))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cut", [(5, 5), (9, 1), (4, 0, 6), (3, 3, 2, 2), (1, 8, 0, 1)])
def test_all_to_all(cut, causal):
    fn = attention("all_to_all", is_causal=causal, scale=0.3)
    for heads in (4, 5):
        T.hold(fn, operands(heads, heads), [T.shard(2, cut)] * 3, (len(cut),))
    T.hold(fn, operands(out=5), [T.shard(2, cut)] * 3, (len(cut),))


def test_grouped_heads():
    fn = attention("all_to_all", enable_gqa=True)
    T.hold(fn, operands(8, 2), [T.shard(2)] * 3, (2,))


def test_two_axes():
    """Tokens over both axes: an all-to-all along the inner, a ring along the outer."""
    place = T.On([Shard(2), Shard(2)], {2: (3, 4, 0, 3)})
    for causal in (False, True):
        T.hold(attention("all_to_all", is_causal=causal), operands(), [place] * 3, (2, 2))
    T.hold(attention("all_to_all"), operands(), [T.On([Shard(0), Shard(2)])] * 3, (2, 2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cut", [(10,), (5, 5), (9, 1), (4, 0, 6), (3, 3, 2, 2), (1, 8, 0, 1)])
def test_gather(cut, causal):
    """All keys at once: few kernels, and one message each way but for the keys of backward."""
    fn = attention("gather", is_causal=causal, enable_gqa=True)
    n = (len(cut),)
    for heads, kv, out in ((3, 3, 3), (4, 2, 3), (2, 2, 5)):
        T.hold(fn, operands(heads, kv, out=out), [T.shard(2, cut)] * 3, n)
    queries = torch.randn(2, 2, 7, 3, dtype=D)
    other = [T.shard(2, T.cuts(7)[0])] if len(cut) == 1 else [T.shard(2)]
    T.hold(fn, [queries, *operands(2, 2)[1:]], [*other, *[T.shard(2, cut)] * 2], n)
    if not causal:
        masks = torch.randn(10, 10, dtype=D), torch.rand(2, 1, 1, 10) > 0.4, torch.rand(10, 1) > 0.2
        for mask in masks:
            run = lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m)  # noqa: E731

            def masked(*x, run=run):
                with strategy("gather"):
                    return run(*x)

            T.hold(masked, [*operands(2, 2), mask], [*[T.shard(2, cut)] * 3, None], n)


def in_blocks(numel, seen, **options):
    """Attention where as many ranks have one block as have at most numel keys and values."""
    slow = {4: Rates(1e30, 1e30, 1.0, 1e30, 1.0, numel * D.itemsize)}

    def run(*x):
        with assume(slow), st.trace() as t:
            out = F.scaled_dot_product_attention(*x, **options)
        seen.update(s.collective for s in t.sent)
        return out

    return run


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "cut, places",
    [
        ((3, 3, 2, 2), 2),
        ((1, 8, 0, 1), 2),
        ((0, 1, 8, 1), 2),
        ((2, 1, 3, 0, 1, 3), 3),
        ((1, 2, 2, 1, 2, 2), 2),
    ],
)
def test_some_ranks_gather_keys_and_pass_them_on_together(cut, places, causal):
    n, seen = (len(cut),), set()
    most = max(sum(cut[i : i + places]) for i in range(0, len(cut), places))
    options = dict(is_causal=causal, enable_gqa=True)
    for heads, kv, out in ((5, 5, 3), (5, 1, 3), (5, 5, 4)):
        fn = in_blocks(2 * kv * (3 + out) * most, seen, **options)
        T.hold(fn, operands(heads, kv, out=out), [T.shard(2, cut)] * 3, n)
    queries, keys = torch.randn(2, 5, 7, 3, dtype=D), operands(5, 5)[1:]
    fn = in_blocks(2 * 5 * 6 * most, seen, is_causal=causal)
    T.hold(fn, [queries, *keys], [T.shard(2), *[T.shard(2, cut)] * 2], n)
    if not causal:
        for mask in (torch.randn(10, 10, dtype=D), torch.rand(2, 1, 1, 10) > 0.4):
            masked = lambda q, k, v, m, fn=fn: fn(q, k, v, m)  # noqa: E731
            T.hold(masked, [*operands(5, 5), mask], [*[T.shard(2, cut)] * 3, None], n)
    assert "all_gather" not in seen and {"window", "ring"} <= seen


class Written(TorchDispatchMode):
    """Counts the elements that copies and concatenations write."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("cat", "copy_", "clone", "stack"):
            self.elements += out.numel()
        return out


@pytest.mark.parametrize("width", [3, 4])
def test_what_goes_to_those_who_share_a_block_is_copied_once(width):
    """Of keys and values that are alike, too: joined and parted in one."""
    sizes = cut_of([3, 2, 0, 4])
    call = SimpleNamespace(together=4, owned=lambda block: (sizes, 1))
    k, v = (torch.randn(2, 5, 9, w, dtype=D) for w in (3, width))
    with Written() as written:
        sends = around._apart(call, 0, [0, 2, 3], [k, v])
    for r, start, n in [(0, 0, 3), (2, 5, 0), (3, 5, 4)]:
        want = torch.cat([x[:, :, start : start + n].reshape(-1) for x in (k, v)])
        assert torch.equal(torch.cat([x.reshape(-1) for x in sends[r]]), want)
    assert written.elements == sum(x.numel() for parts in sends.values() for x in parts)


def test_gather_over_two_axes_and_beside_a_batch():
    place = T.On([Shard(2), Shard(2)], {2: (3, 4, 0, 3)})
    for causal in (False, True):
        T.hold(attention("gather", is_causal=causal), operands(), [place] * 3, (2, 2))
    T.hold(attention("gather"), operands(), [T.On([Shard(0), Shard(2)])] * 3, (2, 2))
    T.hold(attention("gather"), operands(), [T.On([Shard(1), Shard(2)])] * 3, (2, 2))


def test_gather_is_refused_for_keys_on_more_axes():
    places = [T.On([Shard(2), Replicate()]), *[T.On([Shard(2), Shard(2)])] * 2]
    T.hold(attention("auto"), operands(), places, (2, 2))
    with pytest.raises(st.RankError, match="gather"):
        T.hold(attention("gather"), operands(), places, (2, 2))


@pytest.mark.parametrize("kind", ["ring", "gather"])
def test_results_may_be_written_to_and_differentiated_twice(kind):
    def run():
        mesh = T.make_mesh((2,))
        whole = [x.requires_grad_() for x in operands()]
        x = [st.distribute_tensor(t.detach(), mesh, [Shard(2)]).requires_grad_() for t in whole]
        found = []
        for given in (whole, x):
            # it makes no view, to which autograd would let nobody write
            attention(kind)(*given).mul_(2.0)
            with sdpa_kernel(SDPBackend.MATH):
                y = attention(kind)(*given)
            (g,) = torch.autograd.grad(y.square().sum(), given[:1], create_graph=True)
            found.append(torch.autograd.grad(g.square().sum(), given))
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b.full_tensor(), rtol=1e-9, atol=1e-12)

    st.simulate(2, run)


def sent(kind, ranks, causal=False, tokens=8, blocks=0):
    # heads that no team can share out
    heads = 3 if blocks else 4

    def run():
        q, k, v = (
            st.distribute_tensor(x, T.make_mesh((ranks,)), [Shard(2)])
            for x in operands(heads, heads, tokens=tokens * ranks)
        )
        one = 2 * k.to_local().numel()
        fn = attention(kind, is_causal=causal)
        fn = in_blocks(blocks * one, set(), is_causal=causal) if blocks else fn
        with st.trace() as t:
            fn(q, k, v)
        return t.bytes, t.messages, sorted({s.collective for s in t.sent})

    return st.simulate(ranks, run)[0]


def test_costs():
    one = 2 * 4 * 8 * 3 * 8  # bytes of a rank's queries
    assert sent("all_to_all", 4) == (3 * 4 * one // 4, 6, ["swap"])
    assert sent("ring", 4) == (3 * 2 * one, 3, ["ring"])
    # the choice
    assert sent("auto", 4) == sent("all_to_all", 4)
    # too few tokens for the work to count
    assert sent("auto", 2) == sent("auto", 2, causal=True) == sent("gather", 2)
    assert sent("gather", 4) == (3 * 2 * one, 3, ["all_gather"])
    assert sent("auto", 2, tokens=1024)[2] == ["ring"]
    # of two ranks beside each other, then of the two others
    assert sent("auto", 4, blocks=2) == (3 * 2 * one * 3 // 4, 2, ["ring", "window"])


def model_vit(ranks, heads, tokens, causal, device="cuda", key_heads=None):
    """What is chosen for so many tokens a rank, heads of 64, in bf16 on GPUs, in fp32 on CPUs."""
    even, item = (tokens,) * ranks, 2 if device == "cuda" else 4
    work = Work(even, even, 1, heads, key_heads or heads, 64, 64, item, causal)
    ways = [Way("ring"), Way("zigzag")] if causal else [Way("ring")]
    sizes = [u for u in range(2, ranks) if ranks % u == 0 and fits(heads, work.key_heads, u)]
    ways += [Way("usp", u) for u in sizes]
    ways += [Way("all_to_all", ranks)] if heads >= ranks else []
    return cheapest(work, ways, rates(device, item, ranks), gathers=True)


def test_the_choice_is_by_work_and_wire():
    for causal in (False, True):
        # 12 heads on 8 ranks: an all-to-all would leave two idle
        assert model_vit(8, 12, 4096, causal) == ("usp", 4)
        assert model_vit(8, 16, 4096, causal) == ("all_to_all", 8)
        assert model_vit(8, 12, 64, causal) == ("all_to_all", 8)
        assert model_vit(8, 1, 64, causal) == ("gather", 8)
        assert model_vit(8, 1, 2**16, causal).kind != "gather"
        assert model_vit(8, 12, 4096, causal, key_heads=1).kind != "all_to_all"
    assert model_vit(2, 12, 256, False) == ("gather", 2)
    assert model_vit(2, 12, 4096, False) == ("ring", 1)
    assert model_vit(8, 1, 16384, True) == ("zigzag", 1)
    assert model_vit(2, 2, 64, True, "cpu") == ("gather", 2)
    assert model_vit(2, 12, 64, True, "cpu") == ("ring", 1)
    assert model_vit(64, 1, 32, False) == ("gather", 64)
    # keys of all ranks would be 50 MB
    assert model_vit(512, 12, 32, False) == ("gather", 32)
    assert model_vit(2, 12, 4096, True, "cpu") == ("all_to_all", 2)
    assert model_vit(8, 12, 4096, True, "cpu").kind == "usp"


def test_costs_are_those_of_the_trace():
    """The model's bytes and exchanges are what is sent, and its work that of the mask."""
    tokens = 8
    even = (tokens,) * 4
    for causal in (False, True):
        work = Work(even, even, 2, 4, 4, 3, 3, D.itemsize, causal)
        for way in (Way("ring"), Way("usp", 2), Way("all_to_all", 4), Way("gather", 4)):
            found = cost(work, way)
            nbytes, _, names = sent(way.kind, 4, causal)
            if not causal:
                assert found.moved + found.passed == nbytes
            else:
                assert found.moved + found.passed >= nbytes
            moved = "swap" in names or "all_gather" in names
            assert moved == (found.swaps > 0) and ("ring" in names) == (found.hops > 0)
    area = sum(pairs(work))
    assert area == 32 * 33 // 2 and pairs(work)[-1] == sum(range(25, 33))
    wider = Work((5, 3), (3, 2), 1, 1, 1, 1, 1, 4, True)
    assert pairs(wider) == (1 + 2 + 3 + 4 + 5, 3 * 5)


def test_refused_where_heads_cannot_be_dealt():
    fn = attention("all_to_all")
    with pytest.raises(st.RankError, match="cannot be dealt"):
        T.hold(fn, operands(2, 2), [T.shard(2)] * 3, (3,))
    with pytest.raises(ValueError, match="strategy"), strategy("star"):
        pass
    T.hold(attention("auto"), operands(2, 2), [T.shard(2)] * 3, (3,))


def test_compiled_anew():
    def run():
        q, k, v = (st.distribute_tensor(x, T.make_mesh((2,)), [Shard(2)]) for x in operands())
        compiled = st.compile(F.scaled_dot_product_attention, backend="aot_eager")
        found = []
        for kind in ("ring", "all_to_all", "ring"):
            with strategy(kind):
                found.append(compiled(q, k, v).full_tensor())
        assert compiled.traces == 2
        return torch.allclose(found[0], found[1])

    assert all(st.simulate(2, run))
