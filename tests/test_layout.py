"""Strides, contiguity and which reshapes are views: those of one device, alike on all ranks."""

import random

import einops
import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, same, simulate
from shardtensor.tensor.layout import is_view


def whole(*shape):
    n = 1
    for m in shape:
        n *= m
    return torch.arange(float(n), dtype=torch.float64).view(*shape)


CHAINS = {
    "heads": ((2, 4, 2, 4), lambda x: x.permute(0, 2, 1, 3).reshape(4, 4, 4), lambda y: y.view(4, 16)),
    "windows": ((2, 4, 6), lambda x: einops.rearrange(x, "b (h w) c -> (b w) h c", w=2), lambda y: y.view(4, 12)),
    "rows to columns": ((2, 4), lambda x: x.t().reshape(-1), lambda y: y.view(2, 4)),
    "size as a tensor": ((2, 32), lambda x: x.reshape(-1, torch.tensor(16), 2), lambda y: y.view(64)),
    "sizes as tensors": ((2, 4), lambda x: x.unflatten(1, [torch.tensor(2), 2]).repeat(torch.tensor(2), 1, 1), lambda y: y.view(2, 8)),
    "sliced": ((2, 6), lambda x: x[:, :3].reshape(3, 2), lambda y: y.view(6)),
    "expanded": ((2, 3), lambda x: x.unsqueeze(0).expand(2, 2, 3).reshape(4, 3), lambda y: y.view(12)),
}  # fmt: skip


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("sizes", [(1, 1), (2, 0), (0, 1, 1)])
def test_a_reshape_lies_as_on_one_device(name, sizes):
    shape, make, after = CHAINS[name]
    x = whole(*shape)
    want = make(x)

    def run():
        mesh = make_mesh((len(sizes),))
        s = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None, sizes={0: sizes})
        y = make(s)
        assert y.stride() == want.stride(), (y.stride(), want.stride())
        assert y.is_contiguous() == want.is_contiguous()
        same(y, want, "reshaped")
        same(after(y), after(want), "and then")

    simulate(len(sizes), run)


@pytest.mark.parametrize(
    "fn",
    [lambda x: x.t().view(8), lambda x: x[:, :3].view(6), lambda x: x.expand(3, 2, 4).view(24)],
)
@pytest.mark.parametrize("sizes", [(1, 1), (2, 0)])
def test_a_view_that_torch_refuses_is_refused_on_every_rank(fn, sizes):
    x = whole(2, 4)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        fn(x)

    def run():
        s = st.distribute_tensor(
            x, make_mesh((2,)), [Shard(0)], src_data_rank=None, sizes={0: sizes}
        )
        with pytest.raises(RuntimeError, match="view size is not compatible"):
            fn(s)

    simulate(2, run)


def test_what_torch_copies_is_a_copy_on_every_rank():
    x = whole(2, 4)

    def run():
        s = st.distribute_tensor(x, make_mesh((2,)), [Shard(0)], src_data_rank=None)
        y, z = s.t().reshape(-1), s.t().contiguous()
        s.zero_()
        same(y, x.t().reshape(-1), "reshape")
        same(z, x.t(), "contiguous")
        # and what it does not copy is not
        same(s.contiguous().add_(1) - s, x * 0, "contiguous")

    simulate(2, run)


def test_is_view_is_torchs_own_answer():
    rng = random.Random(0)
    for _ in range(3000):
        x = torch.empty([rng.randint(1, 4) for _ in range(rng.randint(1, 4))])
        x = x.permute(*rng.sample(range(x.ndim), x.ndim))
        if rng.random() < 0.3:
            d = rng.randrange(x.ndim)
            x = x.narrow(d, 0, rng.randint(1, x.shape[d]))
        if rng.random() < 0.2:
            x = x.unsqueeze(0).expand(rng.randint(1, 3), *x.shape)
        target, left = [], x.numel()
        while left > 1 or rng.random() < 0.2:
            target.append(rng.choice([k for k in range(1, left + 1) if left % k == 0]))
            left //= target[-1]
        rng.shuffle(target)
        try:
            x.view(target)
            found = True
        except RuntimeError:
            found = False
        assert is_view(x.shape, x.stride(), target) == found, (x.shape, x.stride(), target)


@pytest.mark.parametrize("source", [0, 1, None])
@pytest.mark.parametrize("dim", [0, 2])
def test_distribute_keeps_channels_last(dim, source):
    x = whole(4, 3, 4, 4).contiguous(memory_format=torch.channels_last)

    def run():
        mesh = make_mesh((2,))
        # where others give their values, only the source's format counts
        mine = x if source in (None, mesh.get_local_rank()) else torch.zeros(x.shape, dtype=x.dtype)
        s = st.distribute_tensor(mine, mesh, [Shard(dim)], src_data_rank=source)
        assert s.is_contiguous(memory_format=torch.channels_last)
        assert s.to_local().is_contiguous(memory_format=torch.channels_last)
        assert s.stride() == x.stride()
        same(s, x, "value")

    simulate(2, run)


def test_distribute_a_number():
    x = torch.tensor(1.5, dtype=torch.float64)

    def run():
        mine = x if make_mesh((2,)).get_local_rank() == 0 else torch.zeros_like(x)
        same(st.distribute_tensor(mine, make_mesh((2,)), [Replicate()]), x, "value")

    simulate(2, run)


@pytest.mark.parametrize("other", [(3, 2), (4, 2), (5, 4, 1)])
@pytest.mark.parametrize("plain", [False, True])
def test_parts_of_other_sizes_are_torchs_error(plain, other):
    x, y = whole(5, 4), whole(*other)

    def run():
        mesh = make_mesh((2,))
        part = y if plain else st.distribute_tensor(y, mesh, [Shard(0)], src_data_rank=None)
        with pytest.raises(
            RuntimeError, match=r"Sizes of tensors must match except in dimension 1"
        ):
            torch.cat([st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None), part], 1)

    simulate(2, run)
