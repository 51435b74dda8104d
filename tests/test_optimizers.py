"""Lists of plain and sharded tensors, in-place ops without torch's tag, results into plain tensors."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T

D = torch.float64


def lists(mesh):
    """Clipping, unscaling and a fused step over both kinds of tensors; an overflow in one shard."""
    torch.manual_seed(0)
    a, b = torch.randn(5, 3, dtype=D), torch.randn(4, dtype=D)
    if mesh is not None:
        a = st.distribute_tensor(a, mesh, [Shard(0)], src_data_rank=None)
    a, b = nn.Parameter(a), nn.Parameter(b)
    optimizer = torch.optim.Adam([a, b], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    norms = []
    for i in range(3):
        loss = (a * a).sum() * b.sum() + (b**3).sum()
        scaler.scale(loss).backward()
        if i == 1:
            with torch.no_grad():
                a.grad[4, 2] = torch.nan
        scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_([a, b], 0.5))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return [a.detach(), b.detach(), *norms, torch.tensor(scaler.get_scale())]


def lists_on_rank(world):
    got = lists(T.make_mesh((world,)))
    return [x.full_tensor() if isinstance(x, st.ShardTensor) else x for x in got]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_lists_of_plain_and_sharded(world):
    want = lists(None)
    assert want[-1] == 4 and not want[3].isfinite()
    for got in st.simulate(world, lists_on_rank, world):
        for g, w in zip(got, want, strict=True):
            assert torch.allclose(g, w, rtol=1e-12, equal_nan=True)


UNTAGGED = [
    "abs_", "copysign_", "eq_", "ge_", "gt_", "heaviside_", "le_", "lt_", "ne_", "gcd_", "lcm_",
]  # fmt: skip


@pytest.mark.parametrize("name", UNTAGGED)
@pytest.mark.parametrize("cut", [(4, 3), (3, 0, 4)])
def test_in_place_where_torch_tags_only_the_op_that_is_not(name, cut):
    torch.manual_seed(0)
    x, y = torch.randint(-9, 9, (2, 7, 2))
    if name == "copysign_":
        x, y = x.double(), y.double()
    others = () if name == "abs_" else (y,)
    T.hold(
        lambda x, *others: getattr(x.clone(), name)(*others),
        [x, *others],
        [T.shard(0, cut), *(T.shard(0, cut) for _ in others)],
        (len(cut),),
        grad=False,
    )


def running(mesh):
    """Sums of what is the same on all ranks, kept in plain tensors."""
    torch.manual_seed(0)
    x, w = torch.randn(6, 3, dtype=D), torch.randn(3, dtype=D, requires_grad=True)
    if mesh is not None:
        x = st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None)
    total, kept = torch.zeros((), dtype=D), torch.zeros(3, dtype=D)
    loss = torch.zeros((), dtype=D)
    for i in range(3):
        y = (x * w).sin() * (i + 1)
        total += y.detach().mean()
        kept.mul_(0.9).add_(y.detach().sum(0), alpha=0.1)
        kept.lerp_(y.detach().amax(0), 0.5)
        loss += y.square().mean()
    held = torch.zeros(3, dtype=D)
    held.copy_(y.detach().mean(0))
    assert not any(isinstance(t, st.ShardTensor) for t in (total, kept, loss, held))
    loss.backward()
    return [total, kept, loss.detach(), held, w.grad]


def gathered(mesh):
    """A plain tensor takes the whole of what is sharded: gathered, hence refused where that is."""
    x = st.distribute_tensor(torch.randn(6, 3), mesh, [Shard(0)], src_data_rank=None)
    for write in (torch.Tensor.add_, torch.Tensor.copy_):
        whole = torch.zeros(6, 3)
        write(whole, x)
        assert type(whole) is torch.Tensor and torch.equal(whole, x.full_tensor())
        with st.fallback("error"), pytest.raises(st.UnsupportedOpError, match="no rule"):
            write(whole, x)


def on_rank():
    mesh = T.make_mesh((2,))
    gathered(mesh)
    return running(mesh)


def test_what_is_the_same_on_all_ranks_goes_into_a_plain_tensor():
    want = running(None)
    for got in st.simulate(2, on_rank):
        for g, w in zip(got, want, strict=True):
            assert torch.allclose(g, w, rtol=1e-12)
