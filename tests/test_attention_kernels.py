"""How many kernels attention over sharded tokens launches beside plain attention, as on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from kernels import Counted
from models import Attention
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import cache
from shardtensor import testing as T
from shardtensor._torch.dispatcher import not_tracing
from shardtensor._torch.world import silent_world
from shardtensor.attention import blocks
from shardtensor.attention.strategy import strategy
from shardtensor.comm import groups, ops, pack, transport
from shardtensor.comm.pack import joined
from shardtensor.rules import attention

RANKS, TOKENS = 8, 64


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """What is sent to oneself is, no digits are looked at, what does not arrive writes nothing."""
    monkeypatch.setattr(ops, "_sends_own", lambda x: True)
    monkeypatch.setattr(pack, "COUNTED", {"cpu"})
    monkeypatch.setattr(blocks, "_looked_at", lambda lse: False)
    monkeypatch.setattr(transport, "nothing_arrives", lambda received: None)


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
    found = attention._stacked(parts)
    assert torch.equal(found, torch.stack(parts, -3))
    seen = found.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert seen == (not train and order in ((0, 1, 2), (1, 1, 1)))
    assert found.requires_grad == train


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
