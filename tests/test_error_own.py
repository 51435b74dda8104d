"""What the library's own functions say to a mistake, on all ranks alike: what is wrong, or what to do."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from raising import raised
from shardtensor.spectral import truncated_irfftn, truncated_rfftn
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel

import shardtensor as st


def mistakes():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("domain",))
    two = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("a", "b"))

    def on(x, d=0):
        return st.distribute_tensor(x, mesh, [Shard(d)], src_data_rank=None)

    plain, points = torch.ones(4, 6), torch.rand(12, 3)
    x, image, cloud = on(plain), on(torch.ones(2, 3, 8, 6), 2), on(points)
    q = on(torch.ones(2, 8, 2, 4), 1)
    leaf = x.detach().requires_grad_()
    dtensor = DTensor.from_local(plain, mesh, [Replicate()])
    edges = torch.zeros(2, 5, dtype=torch.long)
    three = q[..., :1, :].expand(2, 8, 3, 4)
    graph = st.graph.Topology(edges, x)
    chain = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    tied[1].weight = tied[0].weight
    with st.trace() as record:
        x.sum()
    sphere, spectrum = st.sphere.pad_sphere, truncated_rfftn
    calls = {
        "distribute_tensor of a ShardTensor: use x.redistribute": lambda: st.distribute_tensor(x, mesh, [Shard(0)]),
        "to Partial: use ShardTensor.from_local": lambda: st.distribute_tensor(plain, mesh, [Partial()]),
        "of a ndarray: make it a torch.Tensor": lambda: st.distribute_tensor(np.ones(3), mesh, [Shard(0)]),
        "give a DeviceMesh, as shardtensor.init": lambda: st.distribute_tensor(plain, (2,), [Shard(0)]),
        "use ShardTensor.from_dtensor": lambda: st.distribute_tensor(dtensor, mesh, [Shard(0)]),
        r"a sparse tensor: use tensor.to_dense\(\)": lambda: st.distribute_tensor(plain.to_sparse(), mesh, [Shard(0)]),
        "this rank's plain local tensor": lambda: st.ShardTensor.from_local(x, mesh, [Shard(0)]),
        r"use full_tensor\(\) and distribute_tensor": lambda: x.redistribute(two["b"], [Shard(0)]),
        "cannot convert|only sum and avg": lambda: x.redistribute(placements=[Partial("max")]),
        "a leaf Variable that requires grad": lambda: leaf.add_(1),
        "a view of a leaf Variable": lambda: leaf[1:].add_(1),
        "attention strategy 'best'; one of": lambda: st.attention.strategy("best").__enter__(),
        'use "replicate" or "error"': lambda: st.fallback("never").__enter__(),
        "query heads do not share": lambda: st.neighborhood_attention(q, three, three, 3),
        "one floating-point dtype": lambda: st.neighborhood_attention(q, q.double(), q, 3),
        "must be positive": lambda: st.neighborhood_attention(q, q, q, 3, stride=9),
        r"edge_index \(2, E\) of int64, not": lambda: st.graph.Topology(edges.float(), x),
        "names nodes outside": lambda: st.graph.Topology(edges + 99, x),
        "reduce is 'median'; one of mean": lambda: graph.scatter(graph.gather(x), "median"),
        r"for \d+ rows": lambda: graph.gather(on(torch.ones(7, 2))),
        "weights .* of 12 points": lambda: st.points.partition(points, mesh, weights=torch.ones(3)),
        "expected 'hilbert', 'morton' or 'kd'": lambda: st.points.partition(points, mesh, "z"),
        r"expected \(M, D\) and \(N, D\)": lambda: st.points.knn(cloud, on(torch.rand(12, 2)), 2),
        "expected one floating dtype": lambda: st.points.knn(cloud, on(points.double()), 2),
        "features of shape": lambda: st.points.interpolate(cloud, cloud, on(torch.ones(5, 2))),
        "farthest_point_sampling: 99 of 12": lambda: st.points.farthest_point_sampling(cloud, 99),
        r"take vertices.full_tensor\(\) first": lambda: st.points.signed_distance(cloud, cloud, edges[:1, :3]),
        "nothing negative": lambda: sphere(image, (1, 1, -1, 1)),
        "latitudes, .* longitudes": lambda: sphere(image, (9, 9, 9, 9)),
        "needs an even number": lambda: sphere(on(torch.ones(8, 5)), (1, 1, 1, 1)),
        "it has no negative frequencies": lambda: spectrum(image, [2, (2, 2)]),
        r"\+ .* modes of": lambda: spectrum(image, [99, 2]),
        "numbers of modes for dims": lambda: spectrum(image, [2, 2], dim=(3,)),
        "Invalid normalization mode": lambda: spectrum(image, [2, 2], norm="odd"),
        "lengths for": lambda: truncated_irfftn(spectrum(image, [2, 2]), [2, 2], [8]),
        "mesh axes .*-1, .*one may be -1": lambda: st.init(a=-1, b=-1),
        "sizes are whole numbers": lambda: st.init(a=1.5),
        "simulate inside simulate": lambda: st.simulate(2, print),
        "fsdp is 'some'; one of": lambda: st.Options(fsdp="some"),
        "expected Options, or a mapping": lambda: st.parallelize(chain, mesh, [1]),
        "no nn.ModuleList; name the blocks": lambda: st.parallelize(chain, mesh, checkpoint=True),
        "no module of class Block": lambda: st.parallelize(chain, mesh, checkpoint=True, blocks=("Block",)),
        r"name one: mesh\['tp'\]": lambda: st.tensor_parallel(chain, two, {}),
        "no module named 'head'": lambda: st.tensor_parallel(chain, mesh, {"head": ColwiseParallel()}),
        "no parameter named 'head'": lambda: st.tensor_parallel(chain, mesh, {"head": Shard(0)}),
        "name one placement for it": lambda: st.tensor_parallel(
            tied, mesh, {"0.weight": Shard(0), "1.weight": Shard(1)}
        ),
        "by is 'colour'; one of": lambda: record.table("colour"),
        "is for .* operands|operands": lambda: st.rules.labels.run("a b, b c -> a c", torch.mm, x),
    }  # fmt: skip
    return {k: raised(call) for k, call in calls.items()}


def test_mistakes_are_named():
    found = st.simulate(2, mistakes)
    wrong = {}
    for said, error in found[0].items():
        try:
            assert all((type(e[said]), str(e[said])) == (type(error), str(error)) for e in found)
            with pytest.raises((ValueError, TypeError, IndexError, RuntimeError), match=said):
                raise error or AssertionError("nothing raised")
        except BaseException as e:
            wrong[said] = f"{type(e).__name__}: {e}"
    assert not wrong, "\n".join(f"{k} -> {v}" for k, v in wrong.items())
