"""What copies of tensors, parameters and modules keep, against plain torch."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

D = torch.float64


def copied(place):
    """What copies of a tensor and of a parameter keep."""
    x = place(torch.arange(10.0, dtype=D).view(5, 2))
    plain, weight = x * 1, nn.Parameter(x * 2)
    plain.requires_grad_()
    for t in (plain, weight):
        t.tag, t._tag = {"a": 1}, "b"
        (t * t).sum().backward()
    module = nn.Module()
    module.weight = weight
    ways = (copy.copy, copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t)))
    seen = []
    for t in (plain, weight, copy.deepcopy(module).weight):
        for way in ways:
            c = way(t)
            seen += [isinstance(c, nn.Parameter), c.requires_grad]
            seen += [getattr(c, "tag", None), getattr(c, "_tag", None)]
            seen += [full(c), None if c.grad is None else full(c.grad)]
    derived = pickle.loads(pickle.dumps(x.clone().requires_grad_() * 1))
    copy.deepcopy(module).weight = nn.Parameter(x.clone())
    buffer = nn.Buffer(x.clone(), persistent=False)
    kept = [(isinstance(c, nn.Buffer), c.persistent) for c in (way(buffer) for way in ways)]
    return [*seen, derived.requires_grad, *kept]


def full(x):
    x = x.detach()
    return x.full_tensor() if isinstance(x, st.ShardTensor) else x


def test_copies_are_torchs():
    want = copied(lambda x: x)

    def run():
        mesh = init_device_mesh("cpu", (3,))
        return copied(lambda x: st.distribute_tensor(x, mesh, [Shard(0)], src_data_rank=None))

    for found in st.simulate(3, run):
        assert len(found) == len(want)
        for a, b in zip(found, want, strict=True):
            assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b


def test_deep_copies_made_together_are_views_of_one_another_or_refused():
    def run(x):
        y = x.clone()
        v = y.reshape(2, 5)
        lone = copy.deepcopy(v)
        found = []
        for written in (0, 1):
            pair = copy.deepcopy((y, v))
            pair[written].mul_(3)
            try:
                other = full(pair[1 - written])
            except st.UnsupportedOpError:
                other = None
            found.append([full(pair[written]), other, full(y).clone(), full(v).clone()])
        y.mul_(2)
        return found, full(lone)

    plain = torch.arange(10.0, dtype=D).view(5, 2)
    want, want_lone = run(plain)

    def sharded():
        mesh = init_device_mesh("cpu", (3,))
        return run(st.distribute_tensor(plain, mesh, [Shard(0)], src_data_rank=None))

    for found, lone in st.simulate(3, sharded):
        assert torch.equal(lone, want_lone)
        for (a, other, *originals), (b, _, *others) in zip(found, want, strict=True):
            # moved between ranks: it has memory of its own, which the write misses
            assert other is None and torch.equal(a, b)
            assert all(map(torch.equal, originals, others))


@pytest.mark.parametrize("sizes", [(3, 2), (1, 4), (0, 5), (2, 1, 2)])
@pytest.mark.parametrize("order", [(0, 2, 1), (2, 0, 1)])
def test_data_that_is_cut_otherwise_keeps_its_strides(sizes, order):
    """As of a weight to which a plain or a gathered one is assigned."""
    back = [order.index(d) for d in range(3)]
    value = torch.arange(60.0).view(4, 5, 3).permute(order).contiguous().permute(back)

    def run():
        mesh = make_mesh((len(sizes),))
        whole = st.ShardTensor.from_local(value, mesh, [Replicate()])
        for given in (value, whole, whole.redistribute(mesh, [Shard(0)])):
            x = torch.zeros(4, 5, 3)
            x = st.distribute_tensor(x, mesh, [Shard(1)], src_data_rank=None, sizes={1: sizes})
            x.data = given
            assert x.stride() == value.stride() and torch.equal(x.full_tensor(), value)
            assert x.to_local().permute(order).is_contiguous()

    st.simulate(len(sizes), run)
