"""How many kernels attention over sharded tokens launches beside plain attention, as on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from kernels import Counted
from models import Attention
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.nn.attention import SDPBackend, sdpa_kernel

import shardtensor as st
from shardtensor import cache
from shardtensor import testing as T
from shardtensor._torch import attention as kinds
from shardtensor._torch.dispatcher import not_tracing
from shardtensor._torch.world import silent_world
from shardtensor.attention import blocks, counted
from shardtensor.attention.gradients import Given
from shardtensor.attention.strategy import strategy
from shardtensor.comm import groups, ops, transport
from shardtensor.comm.pack import joined
from shardtensor.ranks.testing import make_mesh
from shardtensor.rules.attention.sdpa import _stacked

RANKS, TOKENS = 8, 64


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """What is sent to oneself is, no digits are looked at, what does not arrive writes nothing."""
    monkeypatch.setattr(ops, "_sends_own", lambda x: True)
    monkeypatch.setattr(blocks, "_looked_at", lambda lse: False)
    monkeypatch.setattr(transport, "nothing_arrives", lambda received: [])


def kernels(layer, x, train):
    """Of forward and backward of a call that finds all plans made."""
    for _ in range(2):
        with Counted() as ahead, not_tracing(), torch.set_grad_enabled(train):
            y = layer(x)
        local = getattr(y, "_local", y)
        g = torch.randn_like(local)
        with Counted() as behind, not_tracing():
            if train:
                local.backward(g)
    return ahead.kernels, behind.kernels


def beside_plain(way, batch, train, dtype=torch.bfloat16):
    """How many more kernels one of so many ranks launches than one device, forward and backward."""
    torch.manual_seed(0)
    # gradients of weights are others' business
    layer = Attention(64, 8).to(dtype).requires_grad_(False)
    whole = torch.randn(batch, TOKENS, 64, dtype=dtype, requires_grad=True)
    plain = kernels(layer, whole, train)
    cache.clear()
    with silent_world(RANKS // 2, RANKS), strategy(way):
        try:
            mesh = init_device_mesh("cpu", (RANKS,))
            local = whole.detach()[:, : TOKENS // RANKS].clone().requires_grad_()
            x = st.ShardTensor.from_local(local, mesh, [Shard(1)], {1: [TOKENS // RANKS] * RANKS})
            found = kernels(layer, x, train)
        finally:
            cache.clear()
            groups.forget()
    return [a - b for a, b in zip(found, plain, strict=True)]


def test_all_to_all_packs_once_and_unpacks_once():
    assert beside_plain("all_to_all", 1, False)[0] == 2
    # a batch is packed on its way back, too
    assert beside_plain("all_to_all", 2, False)[0] == 3


def test_all_to_all_that_is_trained():
    ahead, behind = beside_plain("all_to_all", 1, True)
    assert ahead == 3
    assert behind == 3


@pytest.mark.parametrize("dtype, each", [(torch.bfloat16, 6), (torch.float32, 5)])
def test_a_hop_of_a_ring_is_a_block_and_its_merge(dtype, each):
    """Keys are packed once, the first result widened, and the sums kept for backward."""
    ahead, _ = beside_plain("ring", 1, False, dtype)
    assert ahead == each * (RANKS - 1) + (3 if each == 6 else 2)


def test_a_hop_back_of_a_ring():
    _, behind = beside_plain("ring", 1, True)
    assert behind <= 5 * RANKS + 2


def numbers(*shape, dtype=torch.float64):
    made = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=made, dtype=torch.float64).to(dtype) for _ in range(3)]


@pytest.mark.parametrize("cut", [(4, 4), (5, 3), (3, 0, 5), (2, 2, 2, 2), (1, 4, 0, 3)], ids=str)
@pytest.mark.parametrize("way", ["ring", "all_to_all", "usp", "causal ring", "zigzag"])
def test_values_with_few_kernels(way, cut):
    def attend(q, k, v):
        with strategy(way.removeprefix("causal ")):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=way in ("causal ring", "zigzag")
            )

    heads = 12 // len(cut) * len(cut)
    T.hold(attend, numbers(2, heads, 8, 4), [T.shard(2, cut)] * 3, (len(cut),))


@pytest.mark.parametrize("cut", [(4, 4), (3, 0, 5), (1, 4, 0, 3)], ids=str)
@pytest.mark.parametrize("shape", [(8, 8), (1, 1, 1, 8), (2, 12, 8, 8)], ids=str)
def test_boolean_masks_with_few_kernels(shape, cut):
    """Some rows see no key of a block, some none at all."""
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(5)) < 0.5
    seen[..., :3] = False
    if shape[-2] > 1:
        seen[..., 2, :] = False
        seen[..., 6, :5] = True

    def attend(q, k, v, mask):
        with strategy("ring"):
            return F.scaled_dot_product_attention(q, k, v, mask)

    given = numbers(2, 12, 8, 4)
    for rows in (None, T.shard(len(shape) - 2, cut)):
        if rows is None or shape[-2] > 1:
            T.hold(attend, [*given, seen], [*[T.shard(2, cut)] * 3, rows], (len(cut),))


@pytest.mark.parametrize("shape", [(TOKENS, TOKENS), (1, 1, 1, TOKENS)], ids=str)
@pytest.mark.parametrize(
    "dtype, each, once", [(torch.bool, 4, 1), (torch.float32, 16, 36)], ids=str
)
def test_a_mask_costs_few_kernels_a_hop(dtype, each, once, shape):
    """The numbers to add, which rows see a key, and nothing where they see none, of out and sums.

    Of a mask of numbers a block is counted once more, from the largest number of each row on.
    """
    ways = []
    for mask in (None, torch.ones(shape, dtype=dtype)):
        cache.clear()
        with silent_world(RANKS // 2, RANKS), strategy("ring"):
            try:
                mesh = init_device_mesh("cpu", (RANKS,))
                sizes = {2: [TOKENS // RANKS] * RANKS}
                given = [
                    st.ShardTensor.from_local(x, mesh, [Shard(2)], sizes)
                    for x in numbers(1, 4, TOKENS // RANKS, 8, dtype=torch.float32)
                ]

                def layer(x, given=given, mask=mask):
                    return F.scaled_dot_product_attention(x, *given[1:], mask)

                ways.append(kernels(layer, given[0], False)[0])
            finally:
                cache.clear()
                groups.forget()
    assert ways[1] - ways[0] <= each * RANKS + once


@pytest.mark.parametrize("causal", [False, True])
def test_half_precision_is_merged_in_single(causal):
    given = numbers(2, 4, 64, 8, dtype=torch.bfloat16)
    true = F.scaled_dot_product_attention(*(x.double() for x in given), is_causal=causal)
    plain = F.scaled_dot_product_attention(*given, is_causal=causal)

    def run():
        mesh = T.make_mesh((4,))
        xs = [st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None) for x in given]
        with strategy("ring"):
            return F.scaled_dot_product_attention(*xs, is_causal=causal).full_tensor()

    got = st.simulate(4, run)[0]
    assert got.dtype is torch.bfloat16
    assert (got - true).abs().max() <= 1.5 * (plain - true).abs().max()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 1, 1), (0, 0, 1), (0, 2, 1)], ids=str)
def test_parts_of_one_tensor(order, train):
    """Seen as they lie where they lie so, whatever their order."""
    x = numbers(3, 2, 8, 6, 4)[0].requires_grad_(train)
    parts = [x[i] for i in order]
    found = _stacked(parts)
    assert torch.equal(found, torch.stack(parts, -3))
    seen = found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert seen == (not train and order in ((0, 1, 2), (1, 1, 1)))
    assert found.requires_grad == train


def test_a_part_that_is_negated_as_it_is_read():
    x = torch.complex(*numbers(3, 2, 4, 8, 4)[:2])

    def attend(x):
        return F.scaled_dot_product_attention(x.conj().imag[0], *x.imag[1:])

    def run():
        y = st.distribute_tensor(x, make_mesh((2,)), [Shard(3)], src_data_rank=None)
        with strategy("all_to_all"):
            return attend(y).full_tensor()

    for found in st.simulate(2, run):
        torch.testing.assert_close(found, attend(x), rtol=1e-12, atol=1e-12)


def test_what_lies_so_is_sent_as_it_lies():
    x = torch.arange(24.0)
    a, b, c = x[:6].view(2, 3), x[6:12].view(3, 2), x[12:18].view(2, 3)
    for parts in ([a, b, c], [b, c], [b, a], [a, c], [a, a], [a.mT, b], [a[:0], b], [a]):
        found = joined(parts, x)
        assert torch.equal(found, torch.cat([p.reshape(-1) for p in parts]))
        lies = found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        assert lies == (len(parts) == 1 or [p.data_ptr() for p in parts] in lying(a, b, c))
    z = torch.randn(4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(joined([z[:2].conj(), z[2:]], z), torch.cat([z[:2].conj(), z[2:]]))


def lying(a, b, c):
    return [[x.data_ptr() for x in xs] for xs in ([a, b, c], [b, c])]


@pytest.mark.parametrize("cut", [(4, 4), (3, 0, 5), (2, 2, 2, 2)], ids=str)
def test_values_with_a_mask_that_hides_blocks_and_rows(cut):
    mask = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[:, :, 2] = False
    mask[:, :, 5, :4] = False

    def attend(q, k, v, mask):
        with strategy("ring"):
            return F.scaled_dot_product_attention(q, k, v, mask)

    given = [*numbers(2, 4, 8, 4), mask]
    T.hold(attend, given, [*[T.shard(2, cut)] * 3, None], (len(cut),))


def test_what_counts_keys_is_held_for_one_block():
    """Blocks of other sizes see parts of what the largest has."""
    top, memory = counted.Top(torch.zeros(1)), set()
    for keys in (7, 3, 5, 7, 1):
        more, values = top.added(torch.ones(2, 3, keys, 4))
        memory.add(values.untyped_storage().data_ptr())
        size = values.amax()
        want = torch.zeros(2, 3, keys + more.shape[2], 4)
        want[:, :, :keys, 0] = want[:, :, keys:, 1] = size
        assert size > 0 and torch.equal(values, want) and not more.any()
    assert len(memory) == 1


@pytest.mark.parametrize("way", ["ring", "gather"])
def test_rows_with_a_nan_in_their_mask_are_nan(way):
    mask = numbers(2, 1, 8, 8)[0]
    mask[:, :, 1, 2] = mask[:, :, 6, 7] = mask[0, :, 4] = torch.nan
    given = numbers(2, 4, 8, 4)
    plain = F.scaled_dot_product_attention(*given, mask)
    assert plain.isnan().any() and plain.isfinite().any()

    def run():
        mesh = make_mesh((2,))
        x = [st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None) for x in given]
        with strategy(way):
            return F.scaled_dot_product_attention(*x, mask).full_tensor()

    for found in st.simulate(2, run):
        torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(
    "shape", [(1, 1, 5, 7), (2, 1, 1, 16), (2, 3, 5, 33), (1, 1, 5, 1)], ids=str
)
def test_rows_of_a_bias_begin_where_kernels_ask(shape):
    q, k = torch.empty(2, 3, 5, 4), torch.empty(2, 3, shape[-1] if shape[-1] > 1 else 7, 4)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = kinds._aligned(bias, q, k)
    assert torch.equal(found, bias.expand(2, 3, 5, k.shape[2]))
    assert found.stride(-1) == 1 and not any(n % 16 for n in found.stride()[:-1])
    assert kinds._aligned(found, q, k).data_ptr() == found.data_ptr()


KERNELS = {0: None, 1: kinds._FLASH_CUDA, 2: kinds._EFFICIENT_CUDA}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("rows, keys", [(64, 64), (33, 49), (1, 7), (128, 130)])
@pytest.mark.parametrize("width", [64, 72, 128])
@pytest.mark.parametrize("drop", [0.0, 0.2])
@pytest.mark.parametrize("masked", [None, "bool", "numbers", "learnt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_block_takes_the_kernel_of_plain_attention(dtype, masked, drop, width, rows, keys):
    torch.backends.cuda.enable_cudnn_sdp(False)
    made = dict(device="cuda", dtype=dtype)
    q = torch.zeros(2, 4, rows, width, **made)
    k = v = torch.zeros(2, 4, keys, width, **made)
    mask, learnt = None, masked == "learnt"
    if masked:
        # rows that begin where the kernels ask, as plain attention has them to
        mask = torch.ones(2, 1, rows, keys + -keys % 16, device="cuda")[..., :keys]
        mask = mask.to(torch.bool if masked == "bool" else dtype).requires_grad_(learnt)
    plain = torch._fused_sdp_choice(q, k, v, mask, drop, False)
    rule = blocks.Rule(width**-0.5, drop=drop, seed=2**62)
    assert blocks._fused(q, k, v, mask, rule) is KERNELS[plain]
    if not plain:
        return
    with sdpa_kernel(SDPBackend.MATH):
        # backward drops what forward has dropped, whatever is allowed there
        assert (blocks._fused(q, k, v, mask, rule) is KERNELS[plain]) == bool(drop)
    drawn = torch.cuda.get_rng_state()
    top = counted.top_of(mask)
    out, sums = blocks.forward(q, k, v, mask, rule, top)
    both = sums if sums.ndim == 4 else torch.stack((sums, torch.ones_like(sums)))
    settled = blocks.settled(both)
    assert blocks._fused(q, k, v, mask, rule, learnt) is KERNELS[plain]
    given = Given(out.to(dtype), q, k, v, mask, out.to(dtype), settled)
    found = blocks.backward(given, rule, learnt)
    assert [x.shape for x in found[:3]] == [q.shape, k.shape, v.shape]
    assert (found[3].shape == mask.shape) if learnt else found[3] is None
    # nothing is drawn from others' generator
    assert torch.equal(torch.cuda.get_rng_state(), drawn)
