"""Cut anew beside FSDP2: each domain by itself, weights as they are."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

import shardtensor as st
from shardtensor.ranks.testing import make_mesh, run_workers

D = torch.float64


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 1, 3, padding=1)
        self.register_buffer("mask", torch.rand(12, 1))

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)) * self.mask)


def made():
    torch.manual_seed(0)
    return Net().to(D)


def batch(k):
    return torch.randn(2, 1, 12, 6, dtype=D, generator=torch.Generator().manual_seed(k))


def losses(model, place, after):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    found = []
    for k in range(5):
        loss = (model(place(batch(k))) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
        after(optimizer)
    return found


def on_rank():
    mesh = make_mesh((2, 2), names=("data", "domain"))
    domain, group = mesh["domain"], mesh.get_local_rank("data")
    net = st.shard_buffers(copy.deepcopy(made()), {"mask": 0}, domain)
    st.parallelize(net, mesh, data="data", fsdp="data")
    balancer, seen = st.balance.Balancer(12, domain, steps=1, every=2), []
    me = mesh.get_local_rank("domain")
    # a slow second rank in one domain, a slow first in the other
    speed = ((1, 0.25), (0.5, 1))[group][me]

    def place(x):
        x = x[group : group + 1]
        return balancer.cut(st.distribute_tensor(x, domain, [Shard(2)], src_data_rank=None))

    def after(optimizer):
        if balancer.note(balancer.sizes[me] / speed):
            balancer.cut(net), balancer.cut(optimizer)
            seen.append(tuple(balancer.sizes))
            assert net.mask.spec.sizes == {0: balancer.sizes}

    found = losses(net, place, after)
    assert all(isinstance(p, DTensor) for p in net.parameters())
    return group, found, seen


@pytest.mark.gloo
def test_domains_are_cut_by_themselves_under_fsdp():
    want = losses(made(), lambda x: x, lambda _: None)
    ranks = run_workers(4, on_rank)
    first, second = (next(f for g, f, _ in ranks if g == group) for group in (0, 1))
    mean = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(mean, want, rtol=1e-9, atol=1e-12)
    assert [s for g, _, s in ranks if g == 0] == [[(10, 2)]] * 2
    assert [s for g, _, s in ranks if g == 1] == [[(4, 8)]] * 2
