"""Scripts in PhysicsNeMo's names, against plain PyTorch; and what its signatures promise."""

import copy
import sys
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from drawn import drawn
from torch import nn
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_module

import shardtensor as st
from shardtensor.compat import physicsnemo as domain_parallel
from shardtensor.compat.physicsnemo import (
    DistributedManager,
    ShardTensor,
    TensorPromotionMode,
    scatter_tensor,
    sync_module_over_mesh,
)
from shardtensor.compat.physicsnemo.shard_utils.halo import (
    HaloConfig,
    halo_padding,
    unhalo_padding,
)
from shardtensor.compat.physicsnemo.shard_utils.ring import (
    RingPassingConfig,
    perform_ring_iteration,
    perform_ring_iteration_async,
)

D = torch.float64


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def manager(*shape, names=("domain",)):
    DistributedManager.initialize()
    dm = DistributedManager()
    return dm, dm.initialize_mesh(shape, names)


# recipes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("distributed", [False, True])
def test_a_convolution_with_a_loss(ranks, distributed):
    """One rank reads, all get their parts, an unmodified model trains."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 2, 3, padding=1))
    model.double()
    x, y = drawn(2, 2, 7, 5), drawn(2, 2, 7, 5, seed=1)
    serial = copy.deepcopy(model)
    given = x.clone().requires_grad_()
    want = F.mse_loss(serial(given), y)
    want.backward()

    def script():
        dm, mesh = manager(-1)
        ours = copy.deepcopy(model)
        if dm.rank:
            for p in ours.parameters():
                p.data.zero_()
        sync_module_over_mesh(ours, mesh, verify=True)
        if distributed:
            ours = distribute_module(ours, mesh)
        first = dm.rank == 0
        a = scatter_tensor(x if first else None, 0, mesh, (Shard(2),), requires_grad=True)
        b = scatter_tensor(y if first else None, 0, mesh, (Shard(2),), y.shape, y.dtype)
        assert isinstance(a, ShardTensor) and a.is_leaf and not b.requires_grad
        loss = F.mse_loss(ours(a), b)
        loss.backward()
        same(loss.full_tensor(), want)
        same(a.grad.full_tensor(), given.grad)
        for p, q in zip(ours.parameters(), serial.parameters(), strict=True):
            same(p.grad.full_tensor() if distributed else p.grad, q.grad)

    st.simulate(ranks, script)


def knn(x, y, k):
    """The k rows of y nearest to each row of x."""
    near = torch.cdist(x, y).topk(k, largest=False).indices
    return y[near]


names = types.ModuleType("names_of_a_recipe")
names.knn = knn
sys.modules["names_of_a_recipe"] = names


def ring_of_neighbours(func, types, args, kwargs):
    x, y, k = args
    mesh, spec = x._spec.mesh, x._spec
    n, me = dist.get_world_size(mesh.get_group(0)), mesh.get_local_rank()
    config = RingPassingConfig(mesh_dim=0, mesh_size=n, communication_method="p2p")
    mine, block = x.to_local(), y.to_local()
    shapes = y._spec.sharding_shapes()[0]
    best = mine.new_zeros(len(mine), 0, y.shape[1])
    for i in range(n):
        both = torch.cat([best, block.expand(len(mine), *block.shape)], 1)
        order = (both - mine[:, None]).norm(dim=2).topk(min(k, both.shape[1]), largest=False)
        best = both.gather(1, order.indices[..., None].expand(-1, -1, y.shape[1]))
        if i < n - 1:
            block = perform_ring_iteration(block, mesh, config, recv_shape=shapes[(me - i - 1) % n])
    shapes = {0: [(s[0], k, 3) for s in spec.sharding_shapes(0)]}
    return ShardTensor.from_local(best, mesh, spec.placements, sharding_shapes=shapes)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_neighbours_by_a_handler_with_a_ring(ranks):
    """A user's own function, which a handler computes by passing blocks on."""
    x, y = drawn(9, 3), drawn(7, 3, seed=1)
    a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
    want = knn(a, b, 3)
    weights = drawn(*want.shape, seed=2)
    (want * weights).sum().backward()
    ShardTensor.register_function_handler(names.knn, ring_of_neighbours)

    def script():
        dm, mesh = manager(-1)
        parts = [
            scatter_tensor(v if dm.rank == 0 else None, 0, mesh, [Shard(0)], requires_grad=True)
            for v in (x, y)
        ]
        got = names.knn(*parts, 3)
        same(got.full_tensor(), want)
        (got * weights).sum().backward()
        same(parts[1].grad.full_tensor(), b.grad)

    st.simulate(ranks, script)


def test_a_vision_transformer_on_two_axes():
    """data x domain: ranks of one sample share it, gradients are averaged over the rest by hand."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(1, 8, 2, 2)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            tokens = self.patch(x).flatten(2).transpose(1, 2)
            return self.head(self.block(tokens).mean(1))

    model, x, y = Model().double(), drawn(4, 1, 12, 4), torch.tensor([0, 2, 1, 1])
    serial = copy.deepcopy(model)
    F.cross_entropy(serial(x), y).backward()

    def script():
        dm, mesh = manager(2, -1, names=("ddp", "domain"))
        ours = copy.deepcopy(model)
        domain = mesh["domain"]
        sync_module_over_mesh(ours, domain)
        mine = mesh.get_local_rank("ddp")
        source = dist.get_global_rank(domain.get_group(), 0)
        assert source == mine * 2
        part = x.chunk(2)[mine] if dm.rank == source else None
        a = scatter_tensor(part, source, domain, (Shard(2),))
        F.cross_entropy(ours(a), y.chunk(2)[mine]).backward()
        for p, q in zip(ours.parameters(), serial.parameters(), strict=True):
            dist.all_reduce(p.grad, group=mesh["ddp"].get_group())
            same(p.grad / 2, q.grad)

    st.simulate(4, script)


# signatures --------------------------------------------------------------------------------------


def test_from_local_by_inferred_chunked_and_given_shapes():
    x = drawn(7, 5)

    def script():
        _, mesh = manager(-1)
        me = dist.get_rank()
        chunk = x.chunk(3)[me]
        one = ShardTensor.from_local(chunk, mesh, [Shard(0)])
        two = ShardTensor.from_local(
            chunk,
            device_mesh=mesh,
            placements=[Shard(0)],
            sharding_shapes="chunk",
            global_shape=(7, 5),
        )
        parts = x.split([1, 4, 2])
        three = ShardTensor.from_local(
            local_tensor=parts[me],
            device_mesh=mesh,
            placements=[Shard(-2)],
            sharding_shapes={0: [p.shape for p in parts]},
        )
        for got in (one, two, three):
            assert type(got) is st.ShardTensor
            same(got.full_tensor(), x)
        assert three.offsets() == [[0, 1, 5][me]] and three.offsets(0) == [0, 1, 5][me]
        assert three._spec.sharding_shapes(0) == ((1, 5), (4, 5), (2, 5))
        moved = three.redistribute(placements=[Replicate()], async_op=True)
        same(moved.to_local(), x)
        for given in ({}, {"sharding_shapes": "chunk"}, {"sharding_shapes": "even"}):
            with pytest.raises(ValueError, match=r"device_mesh|global_shape|'infer'"):
                ShardTensor.from_local(chunk, mesh if given else None, [Shard(0)], **given)

    st.simulate(3, script)


def test_shapes_and_offsets_on_two_axes():
    def script():
        _, mesh = manager(2, 2, names=("h", "w"))
        whole = drawn(5, 3, 4)
        x = scatter_tensor(whole if dist.get_rank() == 3 else None, 3, mesh, (Shard(0), Shard(1)))
        same(x.full_tensor(), whole)
        i, j = mesh.get_coordinate()
        assert x.offsets() == [3 * i, 2 * j]
        w, h = (2, 1)[j], (3, 2)[i]
        want = {0: ((3, w, 4), (2, w, 4)), 1: ((h, 2, 4), (h, 1, 4))}
        assert x._spec.sharding_shapes() == want
        y = ShardTensor.from_local(x.to_local(), mesh, x.placements, x._spec.sharding_shapes())
        assert y.spec == x.spec

    st.simulate(4, script)


def test_scatter_refuses_alike_on_all_ranks():
    def script():
        _, mesh = manager(-1)
        x = torch.zeros(4)
        given = x if dist.get_rank() == 1 else None
        for args, match in (
            ((given, 5, mesh, [Shard(0)]), "global_src 5"),
            ((given, 0, mesh, [Shard(0)]), "gave no torch.Tensor"),
            ((x.numpy(), 1, mesh, [Shard(0)]), "gave no torch.Tensor"),
            ((given, 1, mesh, [Shard(0)], (5,)), "global_shape"),
            ((given, 1, mesh, [Shard(0)], None, torch.float64), "dtype"),
        ):
            with pytest.raises(ValueError, match=match):
                scatter_tensor(*args)

    st.simulate(2, script)


@pytest.mark.parametrize("way", ["local", "full", "partial"])
def test_gradients_that_are_addends(way):
    """Each rank uses the whole in its own way: gradients are summed where that is said."""
    x, weights = drawn(6), drawn(3, 6, seed=1)
    a = x.clone().requires_grad_()
    (a * weights.sum(0)).sum().backward()

    def script():
        _, mesh = manager(-1)
        me = dist.get_rank()
        place = Replicate() if way == "local" else Shard(0)
        s = scatter_tensor(x if me == 0 else None, 0, mesh, [place], requires_grad=True)
        if way == "local":
            mine = s.to_local(grad_placements=[Partial()])
        elif way == "full":
            mine = s.full_tensor(grad_placements=[Partial()])
        else:
            mine = s.redistribute(placements=[Partial()])
            mine = mine.to_local(grad_placements=[Partial()])
        (mine * weights[me]).sum().backward()
        same(s.grad.full_tensor(), a.grad)
        with pytest.raises(ValueError, match="grad_placements"):
            s.to_local(grad_placements=[Shard(1)])

    st.simulate(3, script)


@pytest.mark.parametrize("sizes", [(3, 4), (2, 5, 3), (7,), (2, 2, 2, 6)])
@pytest.mark.parametrize("edge", [0, 1])
def test_halos_of_local_tensors(sizes, edge):
    x = drawn(2, sum(sizes), 3)
    weight = drawn(4, 2, 3, 1, seed=1)
    a = x.clone().requires_grad_()
    want = F.conv2d(a[None], weight, padding=(edge, 0))[0]
    want.square().sum().backward()

    def script():
        _, mesh = manager(-1)
        me = dist.get_rank()
        config = HaloConfig(mesh_dim=0, tensor_dim=1, halo_size=1, edge_padding_size=edge)
        mine = x.split(sizes, 1)[me].clone().requires_grad_()
        padded = halo_padding(mine, mesh, config)
        same(unhalo_padding(padded, mesh, config), mine)
        got = F.conv2d(padded[None], weight)[0]
        got.square().sum().backward()
        same(mine.grad, a.grad.split(sizes, 1)[me])
        whole = ShardTensor.from_local(got.detach(), mesh, [Shard(1)])
        same(whole.full_tensor(), want)
        if len(sizes) > 1:
            with pytest.raises(ValueError, match="halo of 9"):
                halo_padding(mine, mesh, HaloConfig(0, 1, 9))

    st.simulate(len(sizes), script)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_ring_of_other_shapes(direction):
    def script():
        _, mesh = manager(-1)
        me = dist.get_rank()
        blocks = [drawn(r + 1, 2 * r, seed=r) for r in range(3)]
        config = RingPassingConfig(0, 3, direction)
        source = (me + (1 if direction == "backward" else -1)) % 3
        mine = blocks[me].clone().requires_grad_()
        got = perform_ring_iteration(mine, mesh, config, blocks[source].shape)
        same(got, blocks[source])
        (got * (source + 2)).sum().backward()
        same(mine.grad, torch.full_like(mine, me + 2))
        buffer = torch.empty_like(blocks[source])
        got, handles = perform_ring_iteration_async(blocks[me], mesh, config, buffer)
        for handle in handles:
            handle.wait()
        assert got is buffer
        same(buffer, blocks[source])

    st.simulate(3, script)


def test_handlers_of_torch_functions_and_modes():
    seen = []

    def handler(func, types, args, kwargs):
        seen.append([type(a) for a in args])
        x, y = args
        mine = x.to_local() + y.to_local(grad_placements=[Partial()])
        return ShardTensor.from_local(mine, x._spec.mesh, x.placements, x._spec.sharding_shapes())

    before = st.registry.rules.get(torch.hypot)
    ShardTensor.register_function_handler(torch.hypot, handler)
    x, y = drawn(5, 3), drawn(3, seed=1)

    def script():
        _, mesh = manager(-1)
        s = scatter_tensor(x if dist.get_rank() == 0 else None, 0, mesh, [Shard(0)])
        plain = y.clone().requires_grad_()
        got = torch.hypot(s, plain)
        same(got.full_tensor(), x + y)
        got.sum().backward()
        same(plain.grad, torch.full_like(y, 5))

    try:
        st.simulate(2, script)
    finally:
        st.registry.rules.pop(torch.hypot)
        if before is not None:
            st.rule(torch.hypot)(before)
        st.registry.handlers.clear()
    assert seen[0] == [st.ShardTensor, st.ShardTensor]
    assert ShardTensor.patches_enabled() and domain_parallel.register_custom_ops() is None
    with ShardTensor.promotion_mode(TensorPromotionMode.WARN):
        pass
    with pytest.raises(st.UnsupportedOpError, match="DISABLED"):
        ShardTensor.set_promotion_mode(TensorPromotionMode.DISABLED)


def test_weights_of_another_rank():
    def script():
        _, mesh = manager(-1)
        model = nn.BatchNorm1d(3)
        with torch.no_grad():
            for x in (model.weight, model.running_mean):
                x.fill_(dist.get_rank())
        sync_module_over_mesh(model, mesh, src_mesh_rank=2, verify=True)
        assert model.weight.tolist() == model.running_mean.tolist() == [2, 2, 2]
        other = nn.Linear(2 + (dist.get_rank() == 1), 1)
        with pytest.raises(RuntimeError, match="different names"):
            sync_module_over_mesh(other, mesh, verify=True)
        with pytest.raises(ValueError, match="src_mesh_rank 3"):
            sync_module_over_mesh(model, mesh, src_mesh_rank=3)

    st.simulate(3, script)
