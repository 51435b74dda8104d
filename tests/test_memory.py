"""What one rank of eight holds at its peak, over its share of what one device holds: by counts."""

import torch
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor._torch.world import silent_world
from shardtensor.ranks.measure import peak_bytes
from shardtensor.ranks.testing import make_mesh
from shardtensor.spec import Spec
from shardtensor.tensor import wrap

RANKS = 8


def sharded(mesh, shape, dim):
    spec = Spec.of(mesh, [Shard(dim)], shape)
    return wrap(torch.randn(spec.local_shape), spec)


def test_parts_of_gradients_are_released_with_their_bucket():
    with silent_world(0, RANKS):
        mesh = make_mesh((RANKS,))
        model = nn.Sequential(*[nn.Linear(256, 256) for _ in range(12)])
        st.parallelize(model, mesh, bucket_mb=0.25, sync=False)
        x = sharded(mesh, (8 * RANKS, 256), 0)

        def step():
            model(x).square().mean().backward()

        step()
        model.zero_grad()
        weights = sum(p.nbytes for p in model.parameters())
        assert weights < peak_bytes(step) < 1.4 * weights
