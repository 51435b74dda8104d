"""Channels that lie last stay last in shards, in the memory formats that torch gives one device."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor.comm import formats
from shardtensor.ranks.testing import make_mesh, same
from shardtensor.rules import overlap

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
SHAPES = {4: (2, 4, 24, 4), 5: (2, 4, 24, 4, 4)}
CUTS = [(2, (8, 8, 8)), (2, (4, 0, 20)), (2, (2, 9, 13)), (3, (2, 2))]


def kernel(*shape):
    return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=torch.float64).view(shape)


SLIDING = {
    4: {
        "conv": lambda x: F.conv2d(x, kernel(3, 4, 3, 3), padding=1),
        "conv by 2": lambda x: F.conv2d(x, kernel(3, 4, 4, 4), stride=2, padding=1),
        "conv between": lambda x: F.conv_transpose2d(x, kernel(4, 3, 4, 4), stride=2, padding=1),
        "max": lambda x: F.max_pool2d(x, 3, 1, 1),
        "max by 2": lambda x: F.max_pool2d(x, 3, 2, 1),
        "mean": lambda x: F.avg_pool2d(x, 3, 1, 1),
        "resized": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        "padded": lambda x: F.pad(x, (1, 1, 2, 2)),
        "rolled": lambda x: x.roll(3, 2),
        "joined": lambda x: torch.cat([x, 2 * x], 2),
        "joined with others": lambda x: torch.cat([x, (2 * x).contiguous()], 2),
        "joined channels": lambda x: torch.cat([x, 2 * x], 1),
        "shuffled": lambda x: F.pixel_shuffle(x, 2),
        "shuffled back": lambda x: F.pixel_unshuffle(x, 2),
        "channels shuffled": lambda x: F.channel_shuffle(x, 2),
    },
    5: {
        "conv": lambda x: F.conv3d(x, kernel(3, 4, 3, 3, 3), padding=1),
        "max": lambda x: F.max_pool3d(x, 3, 1, 1),
        "mean": lambda x: F.avg_pool3d(x, 3, 1, 1),
        "joined": lambda x: torch.cat([x, 2 * x], 2),
    },
}


def data(ndim):
    x = torch.randn(SHAPES[ndim], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.contiguous(memory_format=LAST[ndim])


def in_format(local, ndim):
    """Whether the next op makes its result with the channels last; a shard of no rows need not."""
    return local.numel() == 0 or (local * 1).is_contiguous(memory_format=LAST[ndim])


@pytest.mark.parametrize("worth", [0, float("inf")])
@pytest.mark.parametrize("ndim", [4, 5])
@pytest.mark.parametrize("dim, sizes", CUTS)
def test_what_slides_keeps_the_channels_last(ndim, dim, sizes, worth, monkeypatch):
    monkeypatch.setattr(overlap, "WORTH", worth)

    def run():
        mesh, whole = make_mesh((len(sizes),)), data(ndim)
        for name, op in SLIDING[ndim].items():
            x = whole.clone().requires_grad_()
            s = st.distribute_tensor(x, mesh, [Shard(dim)], src_data_rank=None, sizes={dim: sizes})
            want, got = op(x), op(s)
            assert in_format(got._local, ndim) >= in_format(want, ndim), name
            want.square().sum().backward()
            got.square().sum().backward()
            same(got.detach(), want.detach(), name)
            same(s.grad, x.grad, name)
            assert in_format(s.grad._local, ndim) >= in_format(x.grad, ndim), name

    st.simulate(len(sizes), run)


@pytest.mark.parametrize("ndim", [4, 5])
@pytest.mark.parametrize("dim, sizes", CUTS)
@pytest.mark.parametrize("source", [0, None])
def test_what_moves_keeps_the_channels_last(ndim, dim, sizes, source):
    def run():
        mesh, whole = make_mesh((len(sizes),)), data(ndim)
        x = st.distribute_tensor(
            whole, mesh, [Shard(dim)], src_data_rank=source, sizes={dim: sizes}
        )
        assert in_format(x._local, ndim)
        moved = [x.redistribute(mesh, [p]) for p in (Replicate(), Shard(0), Shard(1), Shard(3))]
        moved.append(x.redistribute(sizes={dim: sizes[::-1]}))
        moved += [y.redistribute(mesh, [Shard(dim)]) for y in moved]
        for y in moved:
            assert in_format(y._local, ndim), y._spec
            same(y, whole, str(y._spec))
        assert in_format(x.full_tensor(), ndim)

    st.simulate(len(sizes), run)


def test_an_empty_tensor_is_made_without_a_copy(monkeypatch):
    x = data(4)
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    assert formats.empty(x, (2, 4, 3, 4)).is_contiguous(memory_format=LAST[4])
