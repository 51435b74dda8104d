"""Pruned and reparametrised weights under `parallelize`: one device's steps."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard
from torch.nn.utils import parametrizations, prune

import shardtensor as st
from shardtensor import testing as T

D = torch.float64
WAYS = {
    "pruned": lambda m: prune.l1_unstructured(m[0], "weight", 0.4),
    "pruned rows": lambda m: prune.ln_structured(m[0], "weight", 0.4, 2, 0),
    "weight norm": lambda m: parametrizations.weight_norm(m[0]),
    "older weight norm": lambda m: nn.utils.weight_norm(m[0]),
    "spectral norm": lambda m: parametrizations.spectral_norm(m[0]),
    "orthogonal": lambda m: parametrizations.orthogonal(m[2]),
}


def trained(way, mesh=None, late=False, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv1d(8, 3, 1)).to(D)
    xs = [torch.randn(2, 3, 7, dtype=D) for _ in range(3)]
    if not late:
        WAYS[way](model)
    if mesh is not None:
        st.parallelize(model, mesh, **options)
        xs = [st.distribute_tensor(x, mesh, [Shard(2)], src_data_rank=None) for x in xs]
    if late:
        WAYS[way](model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for x in xs:
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    return [getattr(p.detach(), "full_tensor", p.detach)() for p in model.parameters()]


@pytest.mark.parametrize("way", WAYS)
def test_steps_are_those_of_one_device(way):
    def run():
        mesh = T.make_mesh((2,))
        return [
            trained(way, mesh),
            trained(way, mesh, late=True),
            trained(way, mesh, fsdp="all"),
        ]

    wants = [trained(way), trained(way, late=True), trained(way)]
    for found in st.simulate(2, run):
        for got, want in zip(found, wants, strict=True):
            for a, b in zip(got, want, strict=True):
                assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
