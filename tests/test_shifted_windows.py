"""Attention in shifted windows (Swin): rolls, views and masks as they are written."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Shard

from shardtensor import testing as T
from shardtensor.rules.views.reshape_plan import on_multiples
from shardtensor.spec import Dim

torch.manual_seed(0)
D = torch.float64


class Swin(nn.Module):
    """A block of Liu et al., arXiv 2103.14030: attention in windows of `side` shifted by `shift`."""

    def __init__(self, grid, side, shift, heads=2, width=8):
        super().__init__()
        self.side, self.shift, self.heads = side, shift, heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        region = torch.zeros(1, *grid, 1)
        for i, a in enumerate((slice(0, -side), slice(-side, -shift), slice(-shift, None))):
            for j, b in enumerate((slice(0, -side), slice(-side, -shift), slice(-shift, None))):
                region[:, a, b] = 3 * i + j
        same = self.windows(region).squeeze(-1)
        self.register_buffer("mask", same[:, None, None, :] == same[:, None, :, None])

    def windows(self, x):
        b, h, w, c = x.shape
        s = self.side
        x = x.view(b, h // s, s, w // s, s, c)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, s * s, c)

    def back(self, x, b, h, w):
        s = self.side
        x = x.view(b, h // s, w // s, s, s, -1)
        return x.permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)

    def forward(self, x):
        b, h, w, c = x.shape
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = self.windows(x)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, self.mask.repeat(b, 1, 1, 1))
        x = self.proj(x.transpose(1, 2).reshape(-1, self.side**2, c))
        x = self.back(x, b, h, w)
        return torch.roll(x, (self.shift, self.shift), (1, 2))


@pytest.mark.parametrize("cut", [
    (16,), (8, 8), (4, 8, 4), (8, 0, 8), (4, 4, 4, 4), (11, 5), (1, 15), (13, 0, 3), (5, 5, 3, 3),
], ids=str)  # fmt: skip
def test_shifted_windows(cut):
    model = Swin((16, 8), 4, 2).double()
    T.hold(model, [torch.randn(1, 16, 8, 8, dtype=D)], [T.shard(1, cut)], (len(cut),))


def test_shifted_windows_of_two_dims():
    model = Swin((16, 8), 4, 1).double()
    T.hold(model, [torch.randn(2, 16, 8, 8, dtype=D)], [T.On([Shard(1), Shard(2)])], (2, 2))


def padded(x):
    """Windows of four rows, of 24 and four of padding."""
    y = F.pad(x, (0, 0, 0, 4)).view(2, 7, 4, 3)
    return (y.cos() * y.softmax(2)).reshape(2, 28, 3)[:, :24]


@pytest.mark.parametrize("cut", [(24,), (12, 12), (8, 8, 8), (6, 6, 6, 6), (6, 0, 8, 10)], ids=str)
def test_windows_of_padding(cut):
    T.hold(padded, [torch.randn(2, 24, 3, dtype=D)], [T.shard(1, cut)], (len(cut),))


def test_no_rank_has_most_windows_at_each_level():
    first = on_multiples(Dim(133, (0,), (*[16] * 7, 21)), 7).sizes
    second = on_multiples(Dim(70, (0,), (*[8] * 7, 14)), 7).sizes
    assert sum(first) == 133 and sum(second) == 70
    # of 19 windows and 10; the last rank had three and two
    assert max(first) == 21 and max(second) == 14
    assert max(a + b for a, b in zip(first, second, strict=True)) == 28
