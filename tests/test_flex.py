"""flex_attention on shards: against torch's own, and its formula where torch has no gradients."""

import pytest
import torch
import torch.nn.functional as F
from flex import flex, formula
from torch.distributed.tensor import Replicate, Shard
from torch.nn.attention.flex_attention import (
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
    or_masks,
)
from torch.nn.attention.varlen import varlen_attn

import shardtensor as st
from shardtensor import testing as T
from shardtensor.attention import strategy
from shardtensor.ranks.testing import make_mesh

D = torch.float64
L = 13
DOCS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2])


def causal(b, h, i, j):
    return i >= j


MASKS = {
    "causal": causal,
    "window": lambda b, h, i, j: (i - j).abs() <= 2,
    "prefix": or_masks(lambda b, h, i, j: j < 4, causal),
    "documents": lambda b, h, i, j: DOCS[i] == DOCS[j],
    "some see nothing": lambda b, h, i, j: (i > 5) & (j < 8),
    "by batch and head": lambda b, h, i, j: (i >= j) | ((b == 1) & (h > 2)),
    None: None,
}
MODS = {
    None: None,
    "alibi": lambda s, b, h, i, j: s - 0.1 * (h + 1) * (i - j).abs() + b,
    "softcap": lambda s, b, h, i, j: 2 * torch.tanh(s / 2),
}
three = T.shard(2, (6, 0, 7))
PLACES = [
    ([three, T.shard(2, (4, 5, 4)), T.shard(2, (4, 5, 4))], (3,)),
    ([T.shard(2, (9, 4)), None, None], (2,)),
    ([None, T.shard(2, (9, 4)), T.shard(2, (9, 4))], (2,)),
    ([T.shard(1)] * 3, (2,)),
    ([T.shard(0, (0, 2))] * 3, (2,)),
    ([T.On([Shard(1), Shard(2)])] * 3, (2, 2)),
    ([T.On([Shard(2), Shard(2)])] * 3, (2, 2)),
    ([T.On([Shard(2), Replicate()])] + [T.On([Replicate(), Shard(2)])] * 2, (2, 2)),
]


def operands(heads=4, shared=4):
    g = torch.Generator().manual_seed(0)
    shapes = (2, heads, L, 4), (2, shared, L, 4), (2, shared, L, 3)
    return [torch.randn(s, dtype=D, generator=g) for s in shapes]


def made(mask, block=(3, 2)):
    return create_block_mask(mask, 2, 4, L, L, device="cpu", BLOCK_SIZE=block)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mod", MODS)
def test_values_and_gradients(mask, mod):
    block = made(MASKS[mask]) if mask else None

    def call(q, k, v):
        out, aux = flex(q, k, v, MODS[mod], block, return_aux=AuxRequest(lse=True))
        return out, aux.lse.clamp_min(-1e6)

    # sampled: each of the layouts meets some of each
    at = (list(MASKS).index(mask) + 3 * list(MODS).index(mod)) % len(PLACES)
    for places, mesh in (PLACES[at], PLACES[(at + 3) % len(PLACES)]):
        T.hold(call, operands(), places, mesh)


@pytest.mark.parametrize("places, mesh", PLACES)
def test_captured_tensors_get_gradients(places, mesh):
    """A table of relative positions, plain or sharded, in a group of heads that share keys."""
    block = made(MASKS["window"])
    table = torch.linspace(-1, 1, 4 * 2 * L, dtype=D).reshape(4, -1)

    def call(q, k, v, t):
        gain = (t * 2).mean()
        return flex(
            q, k, v, lambda s, b, h, i, j: s * gain + t[h, i - j + L] * t[0, i], block,
            enable_gqa=True, scale=0.3,
        )  # fmt: skip

    for how in (None, T.On([Shard(1)] * len(mesh))):
        T.hold(call, [*operands(4, 2), table], [*places, how], mesh)


WRITES = {
    "item": lambda s, b, h, i, j: s.__setitem__((), s * 0.5) or s,
    "flag": lambda s, b, h, i, j: F.elu(s, inplace=True),
    "method": lambda s, b, h, i, j: s.mul_(0.5),
    "what it made": lambda s, b, h, i, j: (s * 0.5).add_(1),
}


@pytest.mark.parametrize("how", WRITES)
def test_scores_that_are_written_in_place(how):
    T.hold(lambda q, k, v: flex(q, k, v, WRITES[how]), operands(), [T.shard(2, (6, 7))] * 3, (2,))


def test_torch_itself_agrees():
    """Its own call, which it compiles, not the formula."""
    q, k, v = operands()
    want = flex_attention(q, k, v, MODS["alibi"], made(causal), return_lse=True)
    for ours in (formula(q, k, v, MODS["alibi"], made(causal), return_lse=True), *_on_two_ranks()):
        for x, y in zip(ours, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-13)


def _on_two_ranks():
    def run(ranks, compiled):
        mesh = make_mesh((ranks,))
        xs = [st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None) for x in operands()]
        call = torch.compile(flex_attention) if compiled else flex_attention
        found = call(*xs, MODS["alibi"], made(causal), return_lse=True)
        return [x.full_tensor() for x in found]

    return st.simulate(2, run, 2, False) + st.simulate(2, run, 2, True)


def test_what_a_function_captures_may_change_before_backward():
    """A loop's variable, an attribute: backward takes what forward saw."""

    def run(q, k, v, t):
        class Held:
            table = t

        held, scale = Held(), 2.0
        out = flex(q, k, v, lambda s, b, h, i, j: s * scale + held.table[h, j])
        held.table, scale = None, 0.0
        return out

    t = torch.linspace(0, 1, 4 * L, dtype=D).reshape(4, L)
    T.hold(run, [*operands(), t], [*[T.shard(2)] * 3, None], (2,))


def test_a_mask_is_what_its_function_says_now():
    """Not its lists of blocks, nor what it said before: as torch's call outside of a graph."""

    def run(q, k, v):
        docs, reach = DOCS.clone(), 1
        block = made(lambda b, h, i, j: (docs[i] == docs[j]) & ((i - j).abs() <= reach))
        first = flex(q, k, v, None, block)
        docs[4:] = 1
        second = flex(q, k, v, None, block)
        reach = 9
        third = flex(q, k, v, None, block)
        lists = BlockMask.from_kv_blocks(
            torch.ones(1, 1, 5, dtype=torch.int32), torch.zeros(1, 1, 5, 7, dtype=torch.int32),
            BLOCK_SIZE=(3, 2), seq_lengths=(L, L),
        )  # fmt: skip
        return first, second, third, flex(q, k, v, None, lists)

    T.hold(run, operands(), [T.shard(2, (6, 7))] * 3, (2,), grad=False)


def test_documents_on_shards():
    """Their numbers are sharded as the tokens, and the mask is made of them."""

    def run(q, k, v, docs):
        def same(b, h, i, j):
            return (docs[i] == docs[j]) & (i >= j)

        block = create_block_mask(same, None, None, L, L, device="cpu", BLOCK_SIZE=4)
        assert block.sparsity() > 10
        return flex(q, k, v, lambda s, b, h, i, j: s + docs[i], block)

    T.hold(run, [*operands(), DOCS], [*[T.shard(2)] * 3, T.shard(0)], (2,), gather=True)
    T.hold(run, [*operands(), DOCS], [None, None, None, T.shard(0)], (2,), gather=True)


def test_cost():
    """Keys travel once to whom they are seen by, by tiles of 128; forward and thrice with backward.

    A rank has 256 of 1024 tokens. A window of 100 needs one tile from each neighbour.
    """
    window, no_mask = st.simulate(4, _sent, near), st.simulate(4, _sent, None)
    # sent forward and backward in keys of a rank, messages
    assert no_mask == [(3, 6, 3)] * 4
    assert window == [(0.5, 1, 1), (1, 2, 2), (1, 2, 2), (0.5, 1, 1)]


def near(b, h, i, j):
    return (i - j).abs() <= 100


def _sent(mask):
    mesh, n = make_mesh((4,)), 1024
    x = torch.randn(1, 1, n, 8, generator=torch.Generator().manual_seed(0))
    x = st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None).requires_grad_()
    block = None if mask is None else create_block_mask(mask, None, None, n, n, device="cpu")
    with st.trace() as t:
        out = flex_attention(x, x, x, None, block)
    with st.trace() as back:
        out.sum().backward()
    keys = 2 * x.to_local().nbytes
    sent = [sum(s.bytes for s in seen.sent if s.collective == "ring") for seen in (t, back)]
    return sent[0] / keys, sent[1] / keys, t.messages


REFUSED = {
    "the second derivative": lambda x: torch.autograd.grad(
        torch.autograd.grad((flex_attention(x, x, x) + x).square().sum(), x, create_graph=True)[0]
        .square().sum(), x,
    ),
    "torch.func or forward mode": lambda x: torch.func.jvp(
        lambda y: flex_attention(y, y, y), (x.detach(),), (x.detach(),)
    ),
    "strategy": lambda x: _dealt(x),
    "one floating-point dtype": lambda x: flex_attention(x, x.float(), x),
}  # fmt: skip


def _dealt(x):
    with strategy("usp"):
        return flex_attention(x, x, x)


def _refused(call):
    x = st.distribute_tensor(operands()[0], make_mesh((2,)), [Shard(2)], src_data_rank=None)
    with pytest.raises(Exception) as e:
        call(x.requires_grad_())
    return type(e.value), str(e.value)


@pytest.mark.parametrize("what", REFUSED)
def test_refused_alike(what):
    first, second = st.simulate(2, _refused, REFUSED[what])
    assert first == second
    assert first[0] is st.UnsupportedOpError
    assert what in first[1]


MISTAKES = {
    "an index that one rank has out of range": lambda x: flex_attention(
        x, x, x, lambda s, b, h, i, j: s + DOCS[i + 3]
    ),
    "a mask for other lengths": lambda x: flex_attention(x[:, :, :9], x, x, None, made(causal)),
    "three dims": lambda x: flex_attention(x[0], x[0], x[0]),
    "heads": lambda x: flex_attention(x, x[:, :2], x[:, :2]),
    "a branch": lambda x: flex_attention(x, x, x, lambda s, b, h, i, j: s if i > j else -s),
    "a mask's gradient": lambda x: flex_attention(
        x, x, x, None, made(lambda b, h, i, j: NUMBERS[i] > 0)
    ),
    "maxima on CPUs": lambda x: flex_attention(x, x, x, return_aux=AuxRequest(max_scores=True)),
}
NUMBERS = torch.ones(L, requires_grad=True)


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_raise_alike(what):
    first, second = st.simulate(2, _refused, MISTAKES[what])
    assert first[0] is second[0]
    assert first[0] is not st.UnsupportedOpError
    with pytest.raises(Exception):  # noqa: B017
        MISTAKES[what](operands()[0])


def test_autocast_and_half():
    """Scores are kept in fp32, and score_mod sees them so, inside autocast, too."""
    kinds = []

    def call(q, k, v):
        def mod(s, b, h, i, j):
            if isinstance(q, st.ShardTensor):
                kinds.append(s.dtype)
            return s * 0.5

        with torch.autocast("cpu", dtype=torch.bfloat16):
            return flex(q, k, v, mod, made(causal))

    T.hold(call, [x.float() for x in operands()], [T.shard(2)] * 3, (2,), grad=False, rtol=0.02)
    assert set(kinds) == {torch.float32}


# varlen_attn --------------------------------------------------------------------------------------


def packed(q, k, v, cu_q, cu_k, window=(-1, -1), gqa=False):
    """Each sequence alone, by the formula: torch has no kernel for it on CPUs."""
    if isinstance(q, st.ShardTensor):
        most = [int(cu.diff().max()) for cu in (cu_q, cu_k)]
        return varlen_attn(
            q, k, v, cu_q, cu_k, *most, window_size=window, enable_gqa=gqa, scale=0.4
        )
    found = []
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:], strict=False):
        part = [x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])]
        shift = (d - c) - (b - a)
        seen = torch.ones(b - a, d - c, dtype=torch.bool)
        seen = seen.tril(shift + window[1]) if window[1] >= 0 else seen
        seen = seen.triu(shift - window[0]) if window[0] >= 0 else seen
        mask = seen.log().to(q.dtype)
        out = formula(*part, lambda s, b, h, i, j, m=mask: s + m[i, j], None, 0.4, gqa)
        found.append(out[0].transpose(0, 1))
    return torch.cat([*found, q.new_zeros(len(q) - cu_q[-1], q.shape[1], v.shape[2])])


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (2, 0), (1, 1), (-1, 2)])
def test_sequences_of_several_lengths(window):
    """Packed, cut anywhere: within a sequence, at its end, nothing on a rank, tokens in none."""
    g = torch.Generator().manual_seed(0)
    cu_q = torch.tensor([0, 3, 4, 9, 13], dtype=torch.int32)
    cu_k = torch.tensor([0, 5, 7, 8, 15], dtype=torch.int32)
    args = [torch.randn(n, h, 4, dtype=D, generator=g) for n, h in ((14, 4), (15, 2), (15, 2))]

    def call(q, k, v):
        return packed(q, k, v, cu_q, cu_k, window, gqa=True)

    T.hold(call, args, [T.shard(0, (6, 0, 8)), *[T.shard(0, (9, 1, 5))] * 2], (3,))
    T.hold(call, args, [T.shard(0), *[T.shard(1)] * 2], (2,))
    T.hold(call, args, [T.On([Shard(0), Shard(1)])] * 3, (2, 2))


def test_sequences_send_only_what_they_share():
    """Four of 256 tokens, each on a rank of its own: nothing travels."""

    def sent(cu):
        x = torch.randn(1024, 2, 8, generator=torch.Generator().manual_seed(0))
        x = st.distribute_tensor(x, make_mesh((4,)), [Shard(0)], src_data_rank=None)
        cu = torch.tensor(cu, dtype=torch.int32)
        with st.trace() as t:
            varlen_attn(x, x, x, cu, cu, 1024, 1024, window_size=(-1, 0))
        return t.bytes / (2 * x.to_local().nbytes)

    assert st.simulate(4, sent, [0, 256, 512, 768, 1024]) == [0] * 4
    # of 512 causal tokens the first rank sends its keys to the second
    assert st.simulate(4, sent, [0, 512, 1024]) == [1, 0, 1, 0]
