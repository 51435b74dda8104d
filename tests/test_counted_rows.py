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
from shardtensor.attention.strategy import strategy
from shardtensor.ranks.testing import make_mesh

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
    monkeypatch.setattr(_torch, "attention_kernel", lambda *args: found)
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


def merged(q, k, v, mask, cut):
    mesh = make_mesh((len(cut),))
    xs = [
        st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None, sizes={2: cut})
        for x in (q, k, v)
    ]
    with strategy("ring"):
        return F.scaled_dot_product_attention(*xs, mask).full_tensor()


@pytest.mark.parametrize("score", [0, 20, -20, 60, -60, 100, -100, 200, -200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_that_lie_far_from_a_mask(dtype, score):
    for low in (-300.0, 300.0, -1e4, -6e4):
        args = given(dtype, low, score)
        want, _ = forward(*args[:3], _torch.Block(8**-0.5, args[3]))
        assert want.isfinite().all() and want.abs().amax() > 0.1
        # a score beside such a mask is rounded by as much
        close = 4 * torch.finfo(dtype).eps + abs(low) * 2**-23
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
                    torch.testing.assert_close(got, want, rtol=0, atol=4 * torch.finfo(dtype).eps)


def test_sums_from_a_base_are_the_sums():
    """There and back, of rows that see no key, too, and of numbers that no exponential holds."""
    top = counted.Top(torch.tensor([-1e9, 3.0, -inf, -400.0, 1e4]).view(1, 1, 5))
    lse = torch.tensor([2.0, 1.5, counted.NOTHING, -200.0, 90.0]).view(1, 1, 5)
    sums = counted.absolute(top, lse)
    assert sums[0].flatten().tolist() == [-1e9, 0.0, -inf, -600.0, 10090.0]
    assert sums[1].flatten().log().tolist() == pytest.approx([2.0, 1.5, -inf, 0.0, 0.0])
    again = counted.from_base(top, sums)
    torch.testing.assert_close(again, lse, rtol=1e-6, atol=1e-4)
    part = top.cut((3, 5))
    assert torch.equal(part.based(lse.dtype)[0], top.based(lse.dtype)[0][..., 3:5])
