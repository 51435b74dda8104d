"""What ran whole is told with its beginning, and buffers that are sharded take it along."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.testing import make_mesh, same


class Processor(nn.Module):
    """Encoder, processor, decoder on a graph: grid points to the nodes of a mesh and back."""

    def __init__(self, grid=12, hidden=8, width=6):
        super().__init__()
        g = torch.Generator().manual_seed(2)
        self.register_buffer("latlons_hidden", torch.randn(hidden, 4, generator=g))
        self.register_buffer("down", torch.randint(0, hidden, (grid,), generator=g))
        self.register_buffer("up", torch.randint(0, hidden, (grid,), generator=g))
        self.register_buffer("ring", torch.randperm(hidden, generator=g))
        self.grid, self.nodes = nn.Linear(3, width), nn.Linear(4, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(3)
        )
        self.out = nn.Linear(2 * width, 3)

    def forward(self, x):
        grid = self.grid(x)
        nodes = self.nodes(self.latlons_hidden)
        nodes = nodes.index_add(0, self.down, grid)
        for block in self.blocks:
            nodes = nodes + block(torch.cat([nodes, nodes.index_select(0, self.ring)], -1))
        return self.out(torch.cat([grid, nodes.index_select(0, self.up)], -1))


def step(shard):
    mesh = make_mesh((2,))
    torch.manual_seed(0)
    model = Processor().double()
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(12, 3, dtype=torch.float64)
    want = model(x)
    want.square().sum().backward()
    grads = {k: p.grad for k, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    if shard:
        st.shard_buffers(model, {"latlons_hidden": 0}, mesh)
    with st.trace(model=model) as t:
        y = model(st.distribute_tensor(x, mesh, [Shard(0)]))
        y.square().sum().backward()
    same(y.detach(), want.detach(), "y", 1e-12)
    for k, p in model.named_parameters():
        same(p.grad, grads[k], k, 1e-9)
    state = model.state_dict()
    assert list(state) == list(plain)
    assert all(type(v) is torch.Tensor and torch.equal(v, plain[k]) for k, v in state.items())
    other = {k: v + 1 for k, v in plain.items()}
    model.load_state_dict(other)
    kept = model.latlons_hidden
    assert isinstance(kept, st.ShardTensor) is shard
    same(kept, other["latlons_hidden"], "loaded")
    return t.whole()


def test_a_graph_model_whose_nodes_start_from_a_buffer():
    """The encoder adds shards to what is whole; with the buffer sharded all of it follows."""
    before, after = st.simulate(2, step, False)[0], st.simulate(2, step, True)[0]
    assert before.of_bytes > 0.5 and after.of_bytes < 0.05, f"{before}\n{after}"
    named = [s for s in before.shares if s.origin.name == "latlons_hidden"]
    first = before.shares[0]
    assert named or first.origin.kind == "op"
    assert 'st.shard_buffers(model, {"latlons_hidden": 0}, mesh)' in str(before), before


def test_what_comes_after_an_op():
    def run():
        x = st.distribute_tensor(torch.randn(8, 4), make_mesh((2,)), [Shard(0)])
        with st.trace(model=nn.Identity()) as t:
            total = x.sum(0, keepdim=True).expand(64, 4) * 2
            for _ in range(9):
                total = total.tanh()
        return t.whole()

    found = st.simulate(2, run)[0]
    (share,) = found.shares
    assert share.origin.kind == "op" and __file__ in share.origin.line, found
    assert share.of_bytes > 0.9


def test_what_is_made_plain():
    def run():
        x = st.distribute_tensor(torch.randn(8, 4), make_mesh((2,)), [Shard(0)])
        with st.trace(model=nn.Identity()) as t:
            rows = torch.zeros(64, 4).cos().sin()
            _ = x.tanh() + rows.sum()
        return t.whole()

    (share,) = st.simulate(2, run)[0].shares
    assert share.origin.kind == "tensor" and share.op == "zeros"


def test_a_model_on_shards_has_nothing_whole():
    def run(inside):
        x, mesh = torch.randn(1, 2, 8, 4), make_mesh((2,))
        model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU())
        placed = st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None)
        with st.trace(model=model) as t:
            if inside:
                placed = st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None)
            model(placed)
        return t.whole().of_bytes

    assert st.simulate(2, run, False)[0] == 0
    assert st.simulate(2, run, True)[0] == 0


def test_check_says_so():
    report = st.check(Processor(), torch.randn(12, 3), [Shard(0)], [(2,)])
    assert report.ok and '{"latlons_hidden": 0}' in repr(report), report


@pytest.mark.parametrize(
    "dims, message",
    [({"nodes.weight": 0}, "is a parameter"), ({"x": 0}, "is no buffer"), ({"up": 1}, "no dim 1")],
)
def test_mistakes(dims, message):
    def run():
        st.shard_buffers(Processor(), dims, make_mesh((2,)))

    with pytest.raises(st.RankError, match=message):
        st.simulate(2, run)


def test_a_trace_without_a_model():
    with st.trace() as t:
        pass
    with pytest.raises(ValueError, match="model="):
        t.whole()


class Two(nn.Module):
    """A coarse and a fine grid; the weights of both are used as they are and by `.T`."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x, y):
        return self.fine(x), (y @ self.coarse.weight.T).relu()


def test_an_input_that_is_whole_is_named():
    def step():
        mesh = make_mesh((2,))
        x = st.distribute_tensor(torch.randn(8, 3), mesh, [Shard(0)])
        model, y = Two(), torch.randn(6, 3)
        with st.trace(model=model) as t:
            model(x, y)
        (share,) = t.whole().shares
        return str(share)

    for told in st.simulate(2, step):
        assert "since input of 6x3" in told and "shard it as the others" in told


class Scaled(nn.Module):
    """Buffers along which no shards lie: vectors of a weight, and a scale for each channel."""

    def __init__(self, norm):
        super().__init__()
        self.conv = norm(nn.Conv2d(2, 64, 3, padding=1))
        self.register_buffer("scale", torch.rand(64) + 1)

    def forward(self, x):
        return self.conv(x) * self.scale.rsqrt().reshape(1, -1, 1, 1)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_what_would_not_follow_is_not_advised(norm):
    def step():
        x = st.distribute_tensor(torch.randn(1, 2, 8, 4), make_mesh((2,)), [Shard(2)])
        model = Scaled(norm)
        with st.trace(model=model) as t:
            model(x)
        return t.whole()

    for found in st.simulate(2, step):
        origins = [s.origin.name for s in found.shares]
        assert "scale" in origins and any("weight" in o for o in origins), found
        assert "shard_buffers" not in str(found), found


def test_a_table_along_the_shards_is_advised():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(1, 32, 8, 4))

        def forward(self, x):
            return x + self.table.sin()

    def step():
        x = st.distribute_tensor(torch.randn(1, 32, 8, 4), make_mesh((2,)), [Shard(2)])
        model = Table()
        with st.trace(model=model) as t:
            model(x)
        return str(t.whole())

    assert '{"table": 2}' in st.simulate(2, step)[0]
