"""Whole models, unmodified: forward, backward and three optimizer steps equal to one device."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import UNet, ViT
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.attention import strategy

D = torch.float64


def unet(**kwargs):
    torch.manual_seed(0)
    return UNet(2, 1, width=4, depth=2, **kwargs)


def vit(shape=(16, 12)):
    torch.manual_seed(0)
    return ViT(shape, 4, 2, 1, width=16, depth=2, heads=2)


MODELS = {"unet": unet, "periodic": lambda: unet(periodic=True), "vit": vit}
CUTS = [(16,), (8, 8), (12, 4), (11, 5), (16, 0), (8, 4, 4), (5, 8, 3), (4, 4, 4, 4), (9, 0, 6, 1)]


def fields(dtype=D):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(2, c, 16, 12, generator=g, dtype=dtype) for c in (2, 1)]


def trained(model, x, y, steps=3):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-3)
    losses, first = [], None
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        first = first or [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        losses.append(loss)
    return losses, first


def three_steps(name, shape, placements, sizes, dtype):
    mesh = T.make_mesh(shape)
    x, y = fields(dtype)
    model = MODELS[name]().to(dtype)
    ref = copy.deepcopy(model)
    tol = 1e-10 if dtype is D else 2e-4
    sx, sy = (
        st.distribute_tensor(t, mesh, placements, src_data_rank=None, sizes=sizes) for t in (x, y)
    )
    with st.fallback("error"):
        losses, grads = trained(model, sx.requires_grad_(), sy)
    want, right = trained(ref, x.requires_grad_(), y)
    for a, b in zip(losses, want, strict=True):
        T.same(a, b.detach(), "loss", tol)
    for (k, _), a, b in zip(model.named_parameters(), grads, right, strict=True):
        T.same(a, b, f"first gradient of {k}", tol * 10)
    for (k, a), b in zip(model.named_parameters(), ref.parameters(), strict=True):
        T.same(a, b.detach(), k, tol)
    for (k, a), b in zip(model.named_buffers(), ref.buffers(), strict=True):
        T.same(a, b, k, tol)
    return [b.clone() for b in model.buffers()]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_rows_over_ranks(name, cut):
    buffers = st.simulate(len(cut), three_steps, name, (len(cut),), [Shard(2)], {2: cut}, D)
    for other in buffers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(buffers[0], other, strict=True))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "placements", [[Shard(2), Shard(3)], [Shard(2), Shard(2)], [Shard(0), Shard(2)]], ids=str
)
def test_two_axes(name, placements):
    st.simulate(4, three_steps, name, (2, 2), placements, None, D)


@pytest.mark.gloo
@pytest.mark.parametrize("n", [2, 3, 4])
def test_gloo(n):
    cut = {2: (11, 5), 3: (5, 8, 3), 4: (9, 0, 6, 1)}[n]
    for name in MODELS:
        T.run_workers(n, three_steps, name, (n,), [Shard(2)], {2: cut}, D)
    T.run_workers(n, three_steps, "vit", (n,), [Shard(2)], {2: cut}, torch.float32)
    if n == 4:
        for name in MODELS:
            T.run_workers(4, three_steps, name, (2, 2), [Shard(2), Shard(3)], None, D)


def traffic(name, rows):
    mesh = T.make_mesh((2,))
    model = MODELS[name]() if name != "vit" else vit((rows, 12))
    x = torch.randn(1, 2, rows, 12)
    s = st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None)
    weights = sum(p.numel() for p in model.parameters()) * 4
    # few keys are gathered instead
    with strategy("ring"), st.trace() as t, st.fallback("error"):
        model(s).square().mean().backward()
    by_kind = {}
    for c in t.sent:
        by_kind[c.collective] = by_kind.get(c.collective, 0) + c.bytes
    return by_kind, weights


def test_traffic_of_the_unet_is_halos_statistics_and_weights():
    """Twice the rows, the same bytes."""
    small, weights = st.simulate(2, traffic, "unet", 32)[0]
    large, _ = st.simulate(2, traffic, "unet", 64)[0]
    assert small == large
    assert "gather" not in small and small["all_reduce"] < 1.2 * weights


def test_traffic_of_the_vit_is_the_ring_and_weights():
    """Only the keys and values of the ring (and their gradients), the positions and weights grow."""
    (small, weights), (large, more) = (st.simulate(2, traffic, "vit", n)[0] for n in (32, 64))
    grown = {k: large[k] - small.get(k, 0) for k in large if large[k] != small.get(k, 0)}
    tokens = 3 * 32 // 4
    # forward K, V; backward K, V, and dK, dV home; width 16, 2 layers, half of the tokens
    ring = 2 * (2 + 2 + 2) * (tokens / 2) * 16 * 4
    assert abs(grown.pop("ring") - ring) <= ring * 0.1
    # the gradient of the learned positions is gathered whole on each rank, as every weight's
    assert grown.pop("all_gather") <= (more - weights) * 1.1
    # tokens cut off a patch boundary move at most one row of the ranks' edge
    assert set(grown) <= {"window", "window_add", "all_reduce"} and sum(grown.values()) <= 4096


def refused():
    """On every rank alike, before anything is sent."""
    mesh = T.make_mesh((dist.get_world_size(),))
    s = st.distribute_tensor(torch.rand(4, 8, 8), mesh, [Shard(1)], src_data_rank=None)
    with st.trace() as t:
        for bad in (
            lambda: s.to_sparse(),
            lambda: torch.normal(s, 1.0, out=torch.empty(4, 8, 8)),
            lambda: s.resize_(2),
            lambda: torch.zeros(4, 8, 8).add_(s),
            lambda: F.embedding(s.long(), nn.Parameter(torch.ones(9, 2)), sparse=True),
        ):
            with st.fallback("error"), pytest.raises(st.UnsupportedOpError):
                bad()
    assert not t.sent


def test_refused_before_anything_is_sent():
    st.simulate(3, refused)


def other_mesh():
    one = init_device_mesh("cpu", (2,))
    two = init_device_mesh("cpu", (2, 1))
    a = st.distribute_tensor(torch.ones(4), one, [Shard(0)])
    b = st.distribute_tensor(torch.ones(4), two, [Shard(0), Shard(0)])
    for op in (lambda: a + b, lambda: torch.cat([a, b]), lambda: a @ b):
        with pytest.raises(st.UnsupportedOpError, match="mesh"):
            op()


def test_tensors_on_two_meshes_are_refused():
    st.simulate(2, other_mesh)
