"""Stages of torch.distributed.pipelining on shards: losses and gradients of one device."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.errors import UnsupportedOpError
from shardtensor.ranks.testing import run_workers
from shardtensor.train.pipeline import Passing, pipeline_stage

SCHEDULES = {"gpipe": (ScheduleGPipe, 1), "1f1b": (Schedule1F1B, 1),
             "interleaved": (ScheduleInterleaved1F1B, 2)}  # fmt: skip


class First(nn.Module):
    """One tensor to two: rows become tokens, and a mean that all ranks have."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, padding=1, stride=2), nn.GroupNorm(2, 4)

    def forward(self, x):
        h = self.norm(self.conv(x))
        return h.flatten(2).transpose(1, 2), h.mean((2, 3))


class Middle(nn.Module):
    """Attention over all tokens."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x, c):
        q, k, v = (self.qkv(x) + c.repeat(1, 3)[:, None]).chunk(3, -1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v)), F.gelu(c)


class Last(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 1)

    def forward(self, x, c):
        return self.out(x * c[:, None])


def parts_of(n):
    torch.manual_seed(0)
    found = [First(), *(Middle() for _ in range(n - 2)), Last()]
    return [p.double() for p in found]


def sample():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(6, 2, 10, 6, generator=g, dtype=torch.float64)
    return x, torch.randn(6, 15, 1, generator=g, dtype=torch.float64)


def pipelined(names):
    """By schedule: (losses of the microbatches, gradients by stage and name, messages' bytes)."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipe", "domain"))
    domain = mesh["domain"]
    me = mesh.get_local_rank("pipe")
    found = {}
    for name in names:
        kind, each = SCHEDULES[name]
        parts = parts_of(2 * each)
        x, y = sample()
        x = st.distribute_tensor(x, domain, [Shard(2)], sizes={2: [6, 4]})
        y = st.distribute_tensor(y, domain, [Shard(1)], sizes={1: [9, 6]})
        stages = []
        for i in range(me, 2 * each, 2):
            part = st.parallelize(parts[i], domain)
            stage = pipeline_stage(
                part, mesh, x[:2] if i == 0 else None, index=i, num_stages=2 * each
            )
            stages.append(stage)
        schedule = kind(stages if each > 1 else stages[0], 3, loss_fn=F.mse_loss)
        losses = []
        given = (x,) if me == 0 else ()
        out = schedule.step(*given, **({"target": y, "losses": losses} if me else {}))
        assert (out is None) == (me == 0)
        if me:
            assert isinstance(out, st.ShardTensor) and out.shape == y.shape
        grads = {
            (i, k): p.grad for i in range(me, 2 * each, 2) for k, p in parts[i].named_parameters()
        }
        values = [v.full_tensor().item() if isinstance(v, st.ShardTensor) else v for v in losses]
        found[name] = values, grads
    return found


def plain(name):
    parts = nn.ModuleList(parts_of(2 * SCHEDULES[name][1]))
    losses = []
    for x, y in zip(*(v.chunk(3) for v in sample()), strict=True):
        h = parts[0](x)
        for part in parts[1:]:
            h = part(*h)
        loss = F.mse_loss(h, y)
        (loss / 3).backward()
        losses.append(loss.item())
    return losses, {(i, k): p.grad for i, m in enumerate(parts) for k, p in m.named_parameters()}


@pytest.mark.gloo
def test_losses_and_gradients_of_schedules():
    ranks = run_workers(4, pipelined, list(SCHEDULES))
    for name in SCHEDULES:
        losses, grads = plain(name)
        seen = set()
        for rank, found in enumerate(ranks):
            values, mine = found[name]
            if rank >= 2:
                assert values == pytest.approx(losses, rel=1e-12)
            seen |= set(mine)
            for key, g in mine.items():
                torch.testing.assert_close(g, grads[key], rtol=1e-9, atol=1e-12)
        assert seen == set(grads)


def test_mistakes():
    def mistakes():
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("pipe", "domain"))
        x = st.distribute_tensor(torch.randn(2, 2, 4, 4), mesh["domain"], [Shard(2)])
        with pytest.raises(ValueError, match="'stages' and at least one more"):
            pipeline_stage(nn.ReLU(), mesh, x, pipe="stages")
        with pytest.raises(ValueError, match="the first stage needs an example"):
            pipeline_stage(nn.ReLU(), mesh)
        with pytest.raises(ValueError, match="others take none"):
            pipeline_stage(nn.ReLU(), mesh, x, index=1, num_stages=2)
        with pytest.raises(UnsupportedOpError, match=r"a tuple of them, not \['dict'\]"):
            pipeline_stage(Named(), mesh, x, num_stages=2)
        passing = Passing(nn.ReLU(), [x._spec], True, False)
        passing.gives = [x[:1]._spec]
        with pytest.raises(UnsupportedOpError, match="microbatches of one shape"):
            passing(x.to_local())

    st.simulate(2, mistakes)


class Named(nn.Module):
    def forward(self, x):
        return {"x": x}
