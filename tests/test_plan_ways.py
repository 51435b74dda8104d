"""A plan of ways beside data, dims and FSDP2: a tensor axis, and what waits in host memory."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from measured import held
from test_plan import task
from torch import nn
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import shardtensor as st
from shardtensor.observe.network import DGX_H100
from shardtensor.plan.estimate import H100, Device, Layout, Task, estimate
from shardtensor.plan.search import layouts, plan
from shardtensor.ranks.measure import peak_bytes
from shardtensor.ranks.testing import make_mesh, run_workers
from shardtensor.train.options import Options

ROOT = Path(__file__).parent.parent
STYLES = {"blocks.*.0": ColwiseParallel(), "blocks.*.2": RowwiseParallel()}


class Mixer(nn.Module):
    def __init__(self, width=64, depth=3):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(depth)
        )

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def stepped(model, x):
    """A step of training, as a plan takes it, and the optimizer's states."""
    # as torch does by default on GPUs
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)

    def step():
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    states = [v for s in optimizer.state.values() for v in s.values()]
    local = x.to_local() if isinstance(x, st.ShardTensor) else x
    return step, held([*model.parameters(), *model.buffers(), *states, local])


def measured(data, cut, tensor, fsdp):
    torch.manual_seed(0)
    mesh = make_mesh((data, cut, tensor), names=("data", "rows", "tensor"))
    model = st.tensor_parallel(Mixer(), mesh["tensor"], STYLES)
    st.parallelize(model, mesh, fsdp=fsdp, data="data" if data > 1 else None)
    whole = torch.randn(2 // data, 768, 64)
    x = st.distribute_tensor(whole, mesh["rows"], [Shard(1)])
    x = st.ShardTensor.from_local(
        x.to_local().clone(), x.device_mesh, x.placements, sizes=x.spec.sizes
    )
    step, alive = stepped(model, x)
    with st.trace() as t:
        step()
    peak = sorted(peak_bytes(step) for _ in range(3))[1]
    return alive + peak, [(s.collective, s.bytes, s.messages) for s in t.sent]


@pytest.mark.gloo
@pytest.mark.parametrize("data, cut, tensor, fsdp", [(1, 2, 2, None), (2, 1, 2, "all")])
def test_a_tensor_axis_is_planned_as_it_is_measured(data, cut, tensor, fsdp):
    given = Task(Mixer, [(2, 768, 64)], dims=(1,), tensor=STYLES)
    options = Options(fsdp=fsdp)
    found = estimate(given, Layout(data, (1,), (cut,), options, tensor=tensor))
    assert not found.refused
    real = run_workers(data * cut * tensor, measured, data, cut, tensor, fsdp)
    assert found.peak == pytest.approx(max(p for p, _ in real), rel=0.1)
    sent = [(s.collective, s.bytes, s.messages) for s in found.sent if s.op != "fsdp"]
    assert sent in [s for _, s in real]


def test_layouts_with_a_tensor_axis():
    given = Task(Mixer, [(2, 96, 64)], dims=(1,), tensor=STYLES)
    found = list(layouts(given, 4))
    assert all(x.ranks == 4 for x in found) and {x.tensor for x in found} == {1, 2, 4}
    assert [str(x) for x in found if x.tensor == 2] == ["dim1 2 x tensor 2", "data 2 x tensor 2"]
    assert {x.tensor for x in layouts(Task(Mixer, [(2, 96, 64)], dims=(1,)), 4)} == {1}
    rows = plan(Mixer, [(2, 96, 64)], 2, dims=(1,), tensor=STYLES, precisions=(None,))
    assert not any(e.refused for e in rows)
    of = {str(e.layout): e.memory["parameters"] for e in rows}
    # the bias of what is added up is whole
    assert of["tensor 2"] < 0.51 * of["dim1 2"]


class Apart(torch.autograd.graph.saved_tensors_hooks):
    """What autograd keeps waits in memory that is not torch's, as on a GPU in the host's."""

    most = now = 0

    def __init__(self):
        super().__init__(self.away, self.back)

    @classmethod
    def away(cls, x):
        host = np.empty_like(x.detach().numpy())
        host[...] = x.detach().numpy()
        cls.now += host.nbytes
        cls.most = max(cls.most, cls.now)
        return host

    @classmethod
    def back(cls, host):
        found = torch.empty(host.shape, dtype=torch.from_numpy(host).dtype)
        found.numpy()[...] = host
        return found


class Within(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with Apart():
            return self.model(x)


@pytest.mark.parametrize("name", ["ViT", "FNO"])
def test_what_waits_in_host_memory_is_not_on_the_device(name):
    given = task(name, batch=1)
    torch.manual_seed(0)
    model, x = given.make(), torch.randn(given.shapes[0])
    step, alive = stepped(Within(model), x)
    Apart.most = Apart.now = 0
    step()
    most = Apart.most
    peak = sorted(peak_bytes(step) for _ in range(3))[1]
    found = estimate(given, Layout(1, (2, 3), (1, 1), Options(offload=True)))
    plain = estimate(given, Layout(1, (2, 3), (1, 1)))
    assert not found.refused
    assert found.peak == pytest.approx(alive + peak, rel=0.1)
    assert found.peak < plain.peak and found.host == most
    assert found.compute - plain.compute >= 2 * most / H100.host
    assert found.sent == plain.sent


def test_offload_is_tried_last():
    asked = dict(dims=(1,), precisions=(None,), offload=True)
    rows = plan(Mixer, [(2, 96, 64)], 2, replace(H100, memory=1e4), **asked)
    options = [e.layout.options for e in rows if not e.refused]
    assert any(o.offload for o in options) and any(o.offload and o.checkpoint for o in options)
    rows = plan(Mixer, [(2, 96, 64)], 2, **asked)
    assert rows and not any(e.layout.options.offload for e in rows)


def test_offload_moves_nothing_on_a_cpu():
    cpu = Device("cpu", 1e4, 1e10, {64: 2e10, 32: 4e10, 16: 4e10}, 1.0, 2e-6)
    given, rows = Task(Mixer, [(2, 96, 64)], dims=(1,)), Layout(1, (1,), (2,))
    plain = estimate(given, rows, cpu)
    found = estimate(given, replace(rows, options=Options(offload=True)), cpu)
    assert not found.refused and found.host == 0
    assert (found.memory, found.seconds) == (plain.memory, plain.seconds)
    tried = plan(Mixer, [(2, 96, 64)], 2, cpu, dims=(1,), precisions=(None,), offload=True)
    assert tried and not any(e.layout.options.offload for e in tried)


def test_messages_of_fsdp_name_their_ranks():
    """So that those between nodes take the link between nodes."""
    given = Task(Mixer, [(2, 96, 64)], dims=(1,))
    options = Options(fsdp="data", data="data")
    apart, near = (
        estimate(given, Layout(2, (1,), (8,), options, near=near)) for near in (False, True)
    )
    for found, far in ((apart, True), (near, False)):
        sent = [s for s in found.sent if s.op == "fsdp"]
        assert sent and all(len(s.peers) == s.ranks == 2 for s in sent)
        assert all((len({p // 8 for p in s.peers}) == 2) is far for s in sent)
    s = next(s for s in apart.sent if s.op == "fsdp")
    assert DGX_H100.seconds(s) == DGX_H100.outer.latency + s.bytes / DGX_H100.outer.bandwidth


def test_the_command_takes_both(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, err = command(
        "plan", "tests/test_plan_ways.py:Mixer", "--input", "2x96x64", "--shard", "1", "--devices", "2",
        "--tensor", "blocks.*.0=col,blocks.*.2=row", "--offload", "--thorough", "--json", "--fresh",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert {e["mesh"].get("tensor", 1) for e in found} == {1, 2}
    assert any(e["options"]["offload"] and e["host"] > 0 for e in found)
    code, _, err = command("plan", "tests/test_plan_ways.py:Mixer", "--input", "2x96x64",
                           "--shard", "1", "--tensor", "*.0=left")  # fmt: skip
    assert code and "write *.fc1=col,*.fc2=row" in err
