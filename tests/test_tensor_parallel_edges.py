"""Where DTensor weights and activations meet in odd ways, and what is refused."""

import copy

import pytest
import torch
from test_tensor_parallel import close
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

import shardtensor as st

D = torch.float64
COLUMN, ROW = ColwiseParallel(), RowwiseParallel()


def edges():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("domain", "tp"))
    torch.manual_seed(0)
    x = torch.randn(5, 6, dtype=D)
    a = st.distribute_tensor(x, mesh["domain"], [Shard(0)], src_data_rank=None)
    w = torch.randn(6, dtype=D)
    d = distribute_tensor(w, mesh["tp"], [Shard(0)])
    # a list, a keyword, a reflected op, in place
    close(torch.cat([a, d[None]]), torch.cat([x, w[None]]), "cat")
    close(torch.where(a > 0, input=a, other=d), torch.where(x > 0, x, w), "where")
    close(d - a, w - x, "reflected")
    b = a * 1
    c = b
    c += d
    assert c is b
    close(b, x + w, "in place")
    # results on two axes meet activations on one, and tensors that have both from the start
    both = st.distribute_tensor(x, mesh, [Shard(0), Replicate()], src_data_rank=None)
    close((a * d + a) * both, (x * w + x) * x, "lifted")
    # addends are added up
    close(a + d.sum(), x + w.sum(), "partial")
    for place in (Partial(), Partial("avg")):
        p = DTensor.from_local(w, mesh["tp"], [place])
        close(a + p, x + w * (2 if place == Partial() else 1), place)
    with pytest.raises(st.UnsupportedOpError, match="writes"):
        d += a[0]
    rows = distribute_tensor(torch.randn(4, 3), mesh["tp"], [Shard(0)])
    masked = F.embedding(distribute_tensor(torch.tensor([1, 3]), mesh["tp"], [Replicate()]), rows)
    with pytest.raises(st.UnsupportedOpError, match="MaskPartial"):
        st.ShardTensor.from_dtensor(masked)
    # a mesh of its own
    other = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    with pytest.raises(st.UnsupportedOpError, match="mesh_dim_names"):
        a * distribute_tensor(w, other, [Shard(0)])


def test_edges():
    st.simulate(4, edges)


def refusals():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "domain"))
    x = st.distribute_tensor(torch.randn(4, 6), mesh["domain"], [Shard(0)], src_data_rank=None)
    # samples may differ along an axis that no weight is sharded along
    y = st.distribute_tensor(torch.randn(4, 6), mesh, [Shard(1), Shard(0)], src_data_rank=None)
    with pytest.raises(st.UnsupportedOpError, match="different meshes"):
        x * y
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 6))
    fully_shard(model, mesh=mesh["data"])
    with pytest.raises(st.UnsupportedOpError, match="fully_shard"):
        model[0](x)
    assert model(x).shape == (4, 6)
    with pytest.raises(ValueError, match="fully_shard"):
        st.parallelize(model, mesh)


def refused_shards():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tp"))
    x = st.distribute_tensor(torch.randn(4, 6), mesh["tp"], [Replicate()], src_data_rank=None)
    model = st.tensor_parallel(nn.Sequential(nn.Linear(6, 8)), mesh["tp"], {"0": COLUMN})
    fully_shard(model, mesh=mesh["data"])
    with pytest.raises(st.UnsupportedOpError, match="fully_shard"):
        model[0](x)
    with pytest.raises(st.UnsupportedOpError, match="StridedShard"):
        st.ShardTensor.from_dtensor(model[0].weight)
    assert model(x).shape == (4, 8)


def refused_styles():
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    x = st.distribute_tensor(torch.randn(4, 6), mesh, [Replicate()], src_data_rank=None)

    def model():
        return nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))

    by_sequence = parallelize_module(model(), mesh, {"1": SequenceParallel()})
    with pytest.raises(st.UnsupportedOpError, match=r"shardtensor\.tensor_parallel"):
        by_sequence(x)
    for plan, message in (({"2": COLUMN}, "module named '2'"), ({"0.w": Shard(0)}, "named '0.w'"),
                          ({"1": COLUMN}, "LayerNorm"), ({"1": SequenceParallel()}, "LayerNorm")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            st.tensor_parallel(model(), mesh, plan)
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="tied"):
        st.tensor_parallel(copy.deepcopy(tied), mesh, {"0": COLUMN, "1": ROW})
    st.tensor_parallel(tied, mesh, {"0": COLUMN, "0.bias": None})
    assert tied[1].weight is tied[0].weight and isinstance(tied[0].weight, DTensor)
    assert not isinstance(tied[0].bias, DTensor) and isinstance(tied[1].bias, DTensor)
    sharded = st.tensor_parallel(model(), mesh, {"0": COLUMN})
    with pytest.raises(ValueError, match="slice"):
        st.parallelize(sharded, init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "tp")))
    with pytest.raises(ValueError, match="name one"):
        st.tensor_parallel(model(), init_device_mesh("cpu", (2, 2)), {})


def test_refusals():
    st.simulate(4, refusals)
    st.simulate(4, refused_shards)
    st.simulate(4, refused_styles)
