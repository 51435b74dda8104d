"""Compiled: tensor-parallel and FSDP2 models, and repeated blocks that share one program."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

F64 = torch.float64
PLAN = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        y = self.down(F.gelu(self.up(self.norm(x)))) * self.scale
        return x + y + 0.01 * self.up.weight.sum()


class Net(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.last = nn.Linear(8, 2)
        self.to(F64)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x) - x.mean(1, keepdim=True)[..., :2]


def data():
    return torch.randn(4, 7, 4, generator=torch.Generator().manual_seed(1), dtype=F64)


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor | st.ShardTensor) else x


def trained(model, x, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(x)
        y.square().mean().backward()
        found += [whole(p.grad).clone() for p in model.parameters()]
        optimizer.step()
    return [*found, *(whole(p.detach()).clone() for p in model.parameters())]


def held(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-12)


def compiled_by(way, model, mesh):
    options = {"backend": "aot_eager", "fullgraph": True}
    if way == "whole":
        model.forward = st.compile(copy.copy(model), **options)
        return model
    if way == "blocks":
        return st.compile(model, blocks=["Block"], **options)
    return st.parallelize(model, mesh, fsdp=way, compile=options)


def tensor_parallel(way, sizes):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("domain", "tp"))
    model = st.tensor_parallel(Net(), mesh["tp"], PLAN)
    x = st.distribute_tensor(
        data(), mesh["domain"], [Shard(1)], sizes={1: sizes}, src_data_rank=None
    )
    return trained(compiled_by(way, model, mesh), x)


@pytest.mark.parametrize(
    ("way", "sizes"), [("whole", (5, 2)), ("blocks", (7, 0)), (None, (4, 3)), ("all", (0, 7))]
)
def test_tensor_parallel(way, sizes):
    want = trained(Net(), data())
    for got in st.simulate(4, tensor_parallel, way, sizes):
        held(got, want)


def sharded_by_fsdp(fsdp, compile):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "domain"))
    mine = data().chunk(2)[mesh.get_local_rank("data")]
    x = st.distribute_tensor(
        mine, mesh["domain"], [Shard(1)], sizes={1: (7, 0)}, src_data_rank=None
    )
    model = st.parallelize(Net(), mesh, data="data", fsdp=fsdp, compile=compile)
    with st.trace() as t:
        found = trained(model, x)
    traces = [b.forward.traces for b in model.blocks] if fsdp and compile else []
    return found, traces, (len(t.sent), t.bytes)


@pytest.mark.parametrize("fsdp", ["all", "data", None])
def test_fsdp_sends_what_it_sends_eagerly(fsdp):
    want = trained(Net(), data())
    eager = st.simulate(4, sharded_by_fsdp, fsdp, None)
    compiled = st.simulate(4, sharded_by_fsdp, fsdp, {"backend": "eager", "fullgraph": True})
    for (got, traces, sent), (_, _, sent_eagerly) in zip(compiled, eager, strict=True):
        held(got, want)
        assert traces == ([1, 1] if fsdp else [])
        # without fsdp eager calls put what is small in each backward into another collective
        assert sent[1] == sent_eagerly[1] and sent[0] - sent_eagerly[0] == (0 if fsdp else 2)


def repeated(depth):
    programs = []

    def backend(graph, _):
        programs.append(graph)
        return graph.forward

    model = st.compile(Net(depth), blocks=(), backend=backend)
    x = st.distribute_tensor(data(), make_mesh((2,)), [Shard(1)], src_data_rank=None)
    found = trained(model, x)
    # copies run compiled, by the programs that are there; what is loaded runs eagerly
    held([whole(copy.deepcopy(model)(x))], [whole(model(x))])
    loaded = pickle.loads(pickle.dumps(model))
    held([whole(loaded(x))], [whole(model(x))])
    assert not isinstance(loaded.blocks[0].forward, type(model.blocks[0].forward))
    return found, len(programs)


def test_sixteen_blocks_are_one_program():
    want = trained(Net(16), data())
    for got, programs in st.simulate(2, repeated, 16):
        held(got, want)
        assert programs == 1


class Scaled(nn.Module):
    """Blocks that compute different things, and one that has a tensor of its own."""

    def __init__(self, k):
        super().__init__()
        self.k, self.table = k, torch.full((4,), float(k), dtype=F64)

    def forward(self, x):
        return (x * self.k).sin() + self.table


def different():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ModuleList([Scaled(2), Scaled(2), Scaled(3)]))
    model.forward = lambda x: model[0][2](model[0][1](model[0][0](x)))
    want = model(data())
    x = st.distribute_tensor(data(), make_mesh((2,)), [Shard(1)], src_data_rank=None)
    st.compile(model, blocks=["Scaled"], backend="eager")
    held([model(x).full_tensor()], [want])
    with pytest.raises(ValueError, match="no module of class Blok"):
        st.compile(model, blocks=["Blok"])
    with pytest.raises(ValueError, match=r"no nn\.ModuleList"):
        st.compile(nn.Linear(2, 2), blocks=())
    with pytest.raises(ValueError, match="is no module"):
        st.compile(torch.relu, blocks=())


def test_blocks_of_different_graphs_share_nothing():
    st.simulate(2, different)


def given_to_inductor():
    x = st.distribute_tensor(data(), make_mesh((1,)), [Shard(1)], src_data_rank=None)
    wave = st.compile(lambda t: torch.fft.irfft(torch.fft.rfft(t, dim=2), n=4, dim=2))(x)
    held([wave.full_tensor()], [data()])
    st.compile(lambda t: t * 2)(x)
    st.compile(lambda t: t * 2, options={"layout_optimization": True})(x)


def test_what_inductor_is_slow_at_it_is_not_given(monkeypatch):
    options = []
    monkeypatch.setattr(torch, "compile", lambda f, **given: options.append(given["options"]) or f)
    st.simulate(1, given_to_inductor)
    # no complex numbers, and convolutions as they lie in memory
    assert [o["layout_optimization"] for o in options] == [False, True]
