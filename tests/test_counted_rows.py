"""Rows that a mask of large numbers fills, of scores that lie far from the mask, in kernels' dtypes.

A stand-in on CPUs computes as CUDA's memory-efficient kernel does: scores in fp32, powers of two of
them without the smallest numbers, weights in the dtype of the values. One device's numbers are its
own of one block.
"""

from math import e, inf, log2

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import _torch
from shardtensor.attention import blocks, counted
from shardtensor.attention.cost import Rates
from shardtensor.attention.strategy import assume, strategy
from shardtensor.ranks.testing import make_mesh
from shardtensor.rules.attention.plan import Plan

KEYS = 8
TINY = torch.finfo(torch.float32).tiny


def forward(q, k, v, block):
    s = (q.float() @ k.float().mT) * block.scale
    if block.bias is not None:
        s = s + block.bias.float()
    s = s * torch.tensor(log2(e))
    most = s.amax(-1)
    most = most.masked_fill(most == -inf, 0.0)
    p = torch.exp2(s - most.unsqueeze(-1))
    p = p.masked_fill(p < TINY, 0.0)
    total = p.sum(-1)
    total = total.masked_fill(total == 0, 1.0)
    out = (p.to(q.dtype).float() @ v.float()) / total.unsqueeze(-1)
    return out.to(q.dtype), most / log2(e) + total.log()


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    found = _torch.AttentionKernel(forward, None)

    def of(q, k, *rest):
        # CUDA's kernels take no empty block
        return found if q.shape[2] and k.shape[2] else None

    monkeypatch.setattr(_torch, "attention_kernel", of)
    monkeypatch.setattr(blocks, "_looked_at", lambda lse: False)


def given(dtype, low, score):
    """Queries, keys, values and a mask that fills rows; scores of about `score` beside it."""
    made = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, KEYS, 8, generator=made) for _ in range(3))
    q[..., 0], k[..., 0] = score * 8**0.5, 1
    mask = torch.full((KEYS, KEYS), low)
    mask[3:6] += torch.randn(3, KEYS, generator=made)
    mask[6, ::2], mask[7] = -inf, torch.randn(KEYS, generator=made)
    return [x.to(dtype) for x in (q, k, v, mask)]


def merged(q, k, v, mask, cut, way="ring"):
    mesh = make_mesh((len(cut),))
    xs = [
        st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None, sizes={2: cut})
        for x in (q, k, v)
    ]
    # the ring wherever costs decide: links and merges that take no time, no room for others' keys
    with strategy(way), assume({4: Rates(1.0, inf, 0.0, inf)}):
        return F.scaled_dot_product_attention(*xs, mask).full_tensor()


def rounded(dtype, score):
    """By how much results may differ: such a score and two blocks' log-sum-exps are rounded."""
    return 4 * torch.finfo(dtype).eps + abs(score) * 2**-22


@pytest.mark.parametrize("score", [0, 20, -20, 60, -60, 100, -100, 200, -200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_that_lie_far_from_a_mask(dtype, score):
    for low in (-300.0, 300.0, -1e4, -6e4):
        args = given(dtype, low, score)
        want, _ = forward(*args[:3], _torch.Block(8**-0.5, args[3]))
        assert want.isfinite().all() and want.abs().amax() > 0.1
        close = rounded(dtype, abs(low) + abs(score))
        for got in st.simulate(3, merged, *args, (3, 0, 5)):
            torch.testing.assert_close(got, want, rtol=0, atol=close)


def test_what_a_row_is_filled_with_may_be_all_that_scores_keep():
    """One device's weights are even there, and so are those of blocks by the number of keys."""
    for dtype in (torch.float32, torch.bfloat16):
        for low in (-1e9, -1e30):
            for score in (0, 20, -20):
                args = given(dtype, low, score)
                want, _ = forward(*args[:3], _torch.Block(8**-0.5, args[3]))
                for got in st.simulate(3, merged, *args, (3, 0, 5)):
                    close = rounded(dtype, score)
                    torch.testing.assert_close(got, want, rtol=0, atol=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("low", [-1e6, 6e8, -1e9, -1e12])
def test_rows_of_large_numbers_are_right_or_no_numbers(low, dtype):
    """Right where scores are within reach; beyond, blocks cannot be weighed, which nothing hides."""
    for score in (0, 20, -40, 60, 100, -200, 1e6):
        args = given(dtype, low, score)
        want, _ = forward(*args[:3], _torch.Block(8**-0.5, args[3]))
        for got in st.simulate(3, merged, *args, (3, 0, 5)):
            none = got.isnan().all(-1)
            assert torch.equal(none, got.isnan().any(-1)) and not none[..., 7].any()
            if abs(score) <= 20:
                assert not none.any()
            close = rounded(dtype, score)
            torch.testing.assert_close(got[~none], want[~none], rtol=0, atol=close)


def of_few_keys(q, k, v, mask, queries):
    """Attention of queries that are cut so, or whole (None), and keys that two ranks have."""
    mesh = make_mesh((3,))
    k, v = (
        st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None, sizes={2: (3, 0, 5)})
        for x in (k, v)
    )
    if queries:
        q = st.distribute_tensor(q, mesh, [Shard(2)], src_data_rank=None, sizes={2: queries})
    with strategy("ring"), assume({4: Rates(1.0, inf, 0.0, inf)}):
        return F.scaled_dot_product_attention(q, k, v, mask).full_tensor()


@pytest.mark.parametrize("queries", [(3, 2, 3), None], ids=["cut", "whole"])
def test_ranks_without_keys_of_their_own_refuse_the_same_rows(queries):
    args = given(torch.float32, -1e7, 200)
    want, _ = forward(*args[:3], _torch.Block(8**-0.5, args[3]))
    for got in st.simulate(3, of_few_keys, *args, queries):
        none = got.isnan().all(-1)
        assert torch.equal(none, got.isnan().any(-1)) and not none[..., 7].any()
        torch.testing.assert_close(
            got[~none], want[~none], rtol=0, atol=rounded(torch.float32, 200)
        )


def beside(x, rows):
    """Attention of queries of these rows of a block of large numbers, and gradients of a few."""
    q, k, v, mask = (t.clone().requires_grad_(t.ndim > 2) for t in x)
    mesh = make_mesh((2,))
    xs = [st.distribute_tensor(t, mesh, [Shard(2)], src_data_rank=None) for t in (q, k, v)]
    with strategy("ring"):
        out = F.scaled_dot_product_attention(*xs, mask)
    out.full_tensor()[:, :, rows].sum().backward()
    return out.detach().full_tensor(), [t.grad for t in (q, k, v)]


def test_a_row_that_nothing_reads_spoils_no_gradient(monkeypatch):
    def backward(g, q, k, v, out, lse, block, mask_grad):
        with torch.enable_grad():
            xs = [x.detach().requires_grad_() for x in (q, k, v)]
            s = (xs[0] @ xs[1].mT) * block.scale + block.bias
            p = (s - lse.unsqueeze(-1)).exp()
            dp = (g @ v.mT - (g * out).sum(-1, keepdim=True)) * p.detach() * block.scale
        return dp @ k, dp.mT @ q, p.detach().mT @ g, None

    found = _torch.AttentionKernel(forward, backward)
    monkeypatch.setattr(_torch, "attention_kernel", lambda *args: found)
    args = given(torch.float32, -1e7, 200)
    for out, grads in st.simulate(2, beside, args, [7]):
        assert out[:, :, :7].isnan().all() and out[:, :, 7].isfinite().all()
        assert all(g is None or g.isfinite().all() for g in grads)


def test_beside_a_mask_that_is_larger_keys_come_at_once(monkeypatch):
    """Each row is of one block then, as on one device, which nothing has to count."""
    blocks_of = []

    def counting(q, k, v, block):
        blocks_of.append(k.shape[2])
        return forward(q, k, v, block)

    found = _torch.AttentionKernel(counting, None)
    monkeypatch.setattr(_torch, "attention_kernel", lambda *args: found)
    monkeypatch.setattr(Plan, "machines", property(lambda self: ("cuda", 2)))
    q, k, v, mask = given(torch.float32, -1e7, 200)
    args = [x.repeat(1, 1, 8, 1) for x in (q, k, v)]
    for rows, each in (8, [64]), (1, [32, 32 + counted._MORE, 32, 32 + counted._MORE]):
        # half of so many rows of numbers, and of as many keys and values: 2 heads of 16 numbers
        whole = mask.repeat(8, 8) if rows == 8 else mask.repeat(8, 8)[7:8]
        blocks_of.clear()
        want, _ = forward(*args, _torch.Block(8**-0.5, whole))
        for got in st.simulate(2, merged, *args, whole, (32, 32), "auto"):
            torch.testing.assert_close(got, want, rtol=0, atol=rounded(torch.float32, 200))
        assert sorted(blocks_of) == sorted(2 * each)


def test_sums_from_a_base_are_the_sums():
    """There and back, of rows that see no key, too, and of numbers that no exponential holds."""
    top = counted.Top(torch.tensor([-1e9, 3.0, -inf, -400.0, 1e4]).view(1, 1, 5))
    lse = torch.tensor([2.0, 1.5, counted.NOTHING, -200.0, 90.0]).view(1, 1, 5)
    sums = counted.absolute(top, lse)
    assert sums[0].flatten().tolist() == [-1e9, 0.0, -inf, -540.0, 10030.0]
    assert sums[1].flatten().log().tolist() == pytest.approx([2.0, 1.5, -inf, -60.0, 60.0])
    again = counted.from_base(top, sums)
    torch.testing.assert_close(again, lse, rtol=1e-6, atol=1e-4)
    part = top.cut((3, 5))
    assert torch.equal(part.based(lse.dtype)[0], top.based(lse.dtype)[0][..., 3:5])
