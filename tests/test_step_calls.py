"""What sharding adds to a step on one of two ranks, in kernels and calls of Python."""

from functools import partial

import pytest
import share
import torch
import torch.nn.functional as F
from growth import kernels, python_calls, shards
from torch.distributed.device_mesh import init_device_mesh

from shardtensor import cache
from shardtensor._torch.world import silent_world
from shardtensor.attention.strategy import strategy
from shardtensor.comm import groups, together

# model of `benchmarks/share.py`: the most kernels and calls beyond those of the plain model
MOST = {
    "ConvNet": (168, 1170),
    "ViT": (26, 2925),
    "DiT": (122, 2820),
    "U-Net": (200, 1860),
}


pytestmark = pytest.mark.usefixtures("nothing_before", "plain_transport")


@pytest.mark.parametrize("name", MOST)
def test_a_step_adds_few_kernels_and_calls(name):
    with silent_world(1, 2):
        try:
            # counts do not know the size
            pair = share.Pair(name, 2, 64)
            for _ in range(3):
                pair.step(True)
            pair.step(False)
            steps = [partial(pair.step, sharded) for sharded in (True, False)]
            more = [a - b for a, b in ([f(s) for s in steps] for f in (kernels, calls))]
        finally:
            cache.clear()
            groups.forget()
            together.forget()
    assert all(a <= b for a, b in zip(more, MOST[name], strict=True)), more


def calls(step):
    return python_calls(step, ("call",))


def test_attention_around_two_ranks_is_few_kernels():
    """Nothing that fills what is added to, no pairs of sums where one number has all digits."""
    with silent_world(1, 2):
        try:
            mesh, g = init_device_mesh("cpu", (2,)), torch.randn(1, 16, 3, 8).transpose(1, 2)
            # heads beside each other in memory, as projections give them
            qkv = [shards(mesh, (1, 0, 3, 8), 1, 16).transpose(1, 2) for _ in range(3)]
            qkv = [x.detach().requires_grad_() for x in qkv]

            def step():
                with strategy("ring"):
                    F.scaled_dot_product_attention(*qkv)._local.backward(g)

            for _ in range(3):
                step()
            found = kernels(step), calls(step)
        finally:
            cache.clear()
            groups.forget()
    assert found[0] <= 39 and found[1] <= 315, found
