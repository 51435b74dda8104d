"""A rehearsal of one rank: what it sends and works on is what the real rank does."""

import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from forked import Program
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor._torch.world import silent_world
from shardtensor.comm.counters import Sent
from shardtensor.ranks.rehearse import Link, Network, Rehearsal, rehearse


def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.GELU(), nn.MaxPool2d(2)
    return nn.Sequential(*layers, nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(4, 1, 5, padding=2))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 48)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v)


def prepare(kind, shape):
    def made():
        mesh = init_device_mesh("cpu", shape)
        model = {"net": net, "tokens": Tokens}[kind]()
        places = [Shard(2), Shard(3)][: len(shape)]
        x = st.distribute_tensor(torch.randn(1, 3, 40, 32), mesh, places, src_data_rank=None)

        def step():
            model(x).square().mean().backward()

        return step

    return made


def sent(kind, shape):
    step = prepare(kind, shape)()
    with st.trace() as t:
        step()
    return facts(t.sent)


def facts(sent):
    return [(s.collective, s.bytes, s.messages, s.ranks, s.op) for s in sent]


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 2)])
@pytest.mark.parametrize("kind", ["net", "tokens"])
def test_sends_what_the_real_rank_sends(kind, shape):
    ranks = torch.Size(shape).numel()
    real = st.simulate(ranks, sent, kind, shape)
    for rank in range(ranks):
        found = rehearse(prepare(kind, shape), ranks, rank, repeats=1)
        assert facts(found.sent) == real[rank] and found.sent


def test_many_ranks():
    """The work and memory of one rank of 64 are far below those of one rank."""
    alone = rehearse(prepare("net", (1,)), 1, repeats=3)
    one = rehearse(prepare("net", (8, 8)), 64, 9, repeats=3)
    assert not alone.sent and {s.ranks for s in one.sent} == {8, 64}
    assert one.peak < alone.peak / 4


OF_VALUES = {
    "mask": ((40,), lambda x: x[x > 0]),
    "bincount": ((40,), lambda x: torch.bincount(x.abs().long())),
    "sampled": (
        (1, 1, 40, 3),
        lambda x: F.grid_sample(x, torch.zeros(1, 8, 3, 2), align_corners=True),
    ),
}


@pytest.mark.parametrize("name", OF_VALUES)
def test_what_depends_on_values_is_refused(name):
    shape, fn = OF_VALUES[name]

    def made():
        x = st.distribute_tensor(
            torch.randn(shape),
            init_device_mesh("cpu", (4,)),
            [Shard(max(0, len(shape) - 2))],
            src_data_rank=None,
        )
        return lambda: fn(x)

    with pytest.raises(st.UnsupportedOpError, match="rehearsed"):
        rehearse(made, 4)
    # the world is gone: another can be made
    assert st.simulate(2, lambda: True) == [True, True]


def test_projection():
    fast, slow = Link(1e-6, 1e9), Link(1e-3, 1e6)
    found = Rehearsal(
        4, 0.5, 0,
        (Sent("all_reduce", 4000, 6, 4, ""), Sent("window", 1000, 2, 16, ""),
         Sent("window", 0, 0, 16, "")),
    )  # fmt: skip
    wire = 4 * 1e-6 + 4000 / 1e9 + 1e-3 + 1000 / 1e6
    hidden, exposed = found.projected(Network(fast, slow, node=8))
    assert hidden == 0.5 and exposed == pytest.approx(0.5 + wire)
    assert Network(fast, slow, node=2).seconds(found.sent[0]) == pytest.approx(4e-3 + 4e-3)


def test_alone_in_its_process(tmp_path):
    code = (
        "import torch.distributed as dist, shardtensor as st\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "st.rehearse(lambda: None, 4)"
    )
    script = tmp_path / "alone.py"
    script.write_text(code)
    ended, text = Program(script).ended()
    assert ended == 1 and ("already" in text or "initialised" in text)


def test_a_silent_world_has_meshes_of_its_own():
    hook = sys.excepthook
    for rank in range(3):
        with silent_world(rank, 3):
            assert list(T.make_mesh((3,)).get_coordinate()) == [rank]
    # what the program raises later has no number of such a rank before it
    assert sys.excepthook is hook
