"""A plan on fake tensors, held against steps that really run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from bench_models import MODELS
from measured import held_and_sent
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.observe.network import DGX_H100, Link
from shardtensor.plan.estimate import A100, H100, Layout, Task, attention_rates, estimate
from shardtensor.plan.search import fewest, layouts, plan
from shardtensor.ranks.testing import make_mesh, run_workers
from shardtensor.train.options import Options

ROOT = Path(__file__).parent.parent

ROWS = 96


def task(name, batch=2, dims=(2, 3)):
    build, shape = MODELS[name]
    return Task(lambda: build(ROWS), [(batch, *shape(ROWS)[1:])], dims=dims)


def measured(name, batch, cuts, options, data):
    """(peak of a step, collectives) of this rank: the same step in a process, for real."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = build(ROWS), torch.randn(batch, *shape(ROWS)[1:])
    if dist.get_world_size() > 1:
        mesh = make_mesh((data, *cuts), names=("data", "a", "b"))
        st.parallelize(model, mesh, options, **({"data": "data"} if data > 1 else {}))
        n = batch // data
        x = x[mesh.get_local_rank("data") * n :][:n]
        x = st.distribute_tensor(x, mesh["a", "b"], [Shard(2), Shard(3)])
        # a part of what was global
        x = st.ShardTensor.from_local(
            x.to_local().clone(), x.device_mesh, x.placements, sizes=x.spec.sizes
        )
    # as it would be done on the devices that the plan is for
    return held_and_sent(model, x, attention_rates(H100, DGX_H100, dist.get_world_size()))


CASES = [("U-Net", c, Options(), 1) for c in ((1, 1), (2, 2))]
CASES += [
    ("ViT", (4, 1), Options(), 1),
    ("DiT", (2, 2), Options(), 1),
    ("FNO", (4, 1), Options(), 1),
]
CASES += [
    ("ViT", (1, 2), Options(fsdp="all"), 2),
    ("U-Net", (2, 1), Options(fsdp="all"), 1),
    ("DiT", (2, 1), Options(checkpoint=True), 1),
    ("U-Net", (2, 1), Options(precision="bf16"), 1),
]
SELDOM = [(name, (2, 1), Options(), 1) for name in ("U-Net", "ViT", "DiT", "FNO")]
SELDOM += [(name, (1, 1), Options(), 1) for name in ("ViT", "DiT", "FNO")]


def pytest_generate_tests(metafunc):
    if "cuts" in metafunc.fixturenames:
        seldom = SELDOM if metafunc.config.getoption("--whole") else []
        metafunc.parametrize("name, cuts, options, data", CASES + seldom)


@pytest.mark.gloo
def test_what_is_planned_is_what_is_measured(request, name, cuts, options, data):
    layout = Layout(data, (2, 3), cuts, options)
    real = run_workers(layout.ranks, measured, name, 2, cuts, options, data)
    found = estimate(task(name), layout)
    assert not found.refused
    peak = max(p for p, _ in real)
    assert found.peak == pytest.approx(peak, rel=0.1)
    # what FSDP2 sends is not in a trace of the real run
    sent = [(s.collective, s.bytes, s.messages) for s in found.sent if s.op != "fsdp"]
    # a checkpoint whose backward has a thread of its own comes to its branches in another order
    order = sorted if request.config.getoption("--backward-apart") else list
    assert order(sent) in [order(s) for _, s in real]


def test_kinds():
    found = estimate(task("ViT"), Layout(1, (2,), (2,)))
    model = task("ViT").make()
    weights = sum(p.nbytes for p in model.parameters())
    assert found.memory["parameters"] == weights
    # AdamW: two moments of each, and the number of steps
    assert found.memory["optimizer"] == 2 * weights + 4 * len(list(model.parameters()))
    shape = task("ViT").shapes[0]
    assert found.memory["inputs"] == torch.Size(shape).numel() // 2 * 4
    assert found.memory["activations"] > 0 and found.peak == sum(found.memory.values())
    assert found.flop > 0 and 0 < found.compute < 1 and 0 < found.communication < 1
    fsdp = estimate(task("ViT"), Layout(1, (2,), (2,), Options(fsdp="all")))
    assert fsdp.memory["optimizer"] < 0.6 * found.memory["optimizer"]
    # half of each gradient is another rank's; FSDP2 cuts dim 0, and pads it
    half = sum(4 * -(-p.shape[0] // 2) * p[0].numel() for p in model.parameters())
    assert fsdp.collectives()["reduce_scatter"][2] == half


class Sorts(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x[x > 0] * self.scale


def test_what_depends_on_values_is_taken_at_its_bound():
    found = plan(Sorts, [(1, 8, 64)], 2, dims=(2,))
    assert found and not any(e.refused for e in found)
    # all elements are picked, and a mask's rows are found
    assert all(e.memory["activations"] >= 4 * 8 * 32 for e in found)
    assert all("a mask is taken to pick all" in told for e in found for told in e.assumed)


def test_layouts():
    t = Task(nn.Identity, [(4, 3, 8, 2)])
    found = [(x.data, x.cuts) for x in layouts(t, 8)]
    assert all(d * a * b == 8 and 4 % d == 0 and b <= 2 for d, (a, b) in found)
    assert len(found) == len(set(found)) and (1, (8, 1)) in found and (4, (1, 2)) in found
    assert str(Layout(2, (2, 3), (4, 1), Options(fsdp="all"))) == "data 2 x dim2 4, fsdp=all"
    with pytest.raises(ValueError, match="dims"):
        Task(nn.Identity, [(4, 3, 8, 2)], dims=(4,))


def small_net():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 3, 3, padding=1))


def test_ranking_and_the_fewest():
    t = Task(small_net, [(1, 3, 64, 64)], dims=(2,))
    one = estimate(t, Layout(1, (2,), (1,)))
    # two thirds of what one device needs: two hold it
    small = replace(A100, memory=one.peak * 2 / 3)
    n, best = fewest(t.make, t.shapes, small, dims=(2,), precisions=(None,))
    assert n == 2 and best.fits(small) and best.layout.cuts == (2,)
    found = plan(t.make, t.shapes, 2, small, dims=(2,), thorough=True)
    fits = [e.fits(small) for e in found]
    assert fits == sorted(fits, reverse=True)
    times = [e.seconds for e in found if e.fits(small)]
    assert times == sorted(times)
    assert fewest(t.make, t.shapes, replace(A100, memory=1), dims=(2,), most=2) is None
    assert not any(e.layout.options.checkpoint for e in found)
    named = plan(t.make, t.shapes, 1, small, dims=(2,), precisions=(None,), blocks=("Conv2d",))
    assert [e.layout.options.blocks for e in named if e.layout.options.checkpoint] == [("Conv2d",)]
    assert not any(e.refused for e in named)


class Scaled(nn.Module):
    """Its product is of two dtypes where a weight is gathered in bf16 and there is no autocast."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, 64, bias=False) for _ in range(8)])
        self.register_buffer("scale", torch.ones(64))

    def forward(self, x):
        for block in self.blocks:
            x = torch.mm(block(x).cos().cos() * self.scale, block.weight)
        return x


def test_what_is_refused_with_one_option_is_tried_with_the_others():
    given = dict(dims=(0,), precisions=("bf16",))
    found = plan(Scaled, [(4096, 64)], 2, replace(A100, memory=1), **given)
    refused = {(e.layout.options.fsdp, e.layout.options.checkpoint): bool(e.refused) for e in found}
    # with fsdp and checkpointing it would be refused as well
    assert refused == {(None, False): False, ("all", False): True, (None, True): False}


UNET = ["plan", "examples/models.py:UNet", "--arg", "c_in=1", "--arg", "c_out=1"]


def test_command(tmp_path, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, err = command(
        *UNET, "--input", "1x1x64x64", "--devices", "2", "--json", "--shard", "2", "--picture", tmp_path / "p.png"
    )  # fmt: skip
    assert code == 0, err
    found = json.loads(out)
    assert [e["mesh"] for e in found] == [{"data": 1, "dim2": 2}] * 2
    assert {e["options"]["precision"] for e in found} == {None, "bf16"}
    assert all(e["fits"] and e["peak"] == sum(e["memory"].values()) for e in found)
    assert found[0]["collectives"]["window"]["bytes"] > 0
    assert (tmp_path / "p.png").stat().st_size > 10_000
    code, out, _ = command(*UNET, "--input", "1x1x64x64", "--shard", "2", "--tree")
    assert code == 0 and "1 x h100" in out and "one device: fits: needs" in out
    assert "limit" in out and "of activations" in out


@pytest.mark.parametrize(
    "args, message",
    [
        (["--input", "1x1x64xa"], "is no input"),
        (["--input", "1x1x64x64", "--device", "abacus"], "no device"),
        (["--input", "1x1x64x64", "--shard", "7"], "name them"),
        (["--input", "1x1x64x64", "--arg", "width"], "is no argument"),
    ],
)
def test_mistakes_of_the_command(args, message, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, _, err = command(*UNET, *args)
    assert code == 2 and message in err
    assert len(err.strip().splitlines()) == 1


def test_dropout_is_planned():
    found = estimate(
        Task(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout()), [(1, 3, 64, 64)]),
        Layout(1, (2,), (4,)),
    )
    assert not found.refused and found.memory["activations"] > 0


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        x = (x.flatten(2).transpose(1, 2) * self.scale).unsqueeze(1)
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


def test_attention_of_one_device_is_counted():
    """Two products of 2 * 256 * 256 * 8 FLOP forward, four backward and one that is computed anew."""
    task = Task(Attends, [(1, 8, 16, 16)])
    one, two = (estimate(task, Layout(1, (2,), (n,))).flop for n in (1, 2))
    product = 2 * 256 * 256 * 8
    assert 6 * product <= one <= 7 * product and 6 * product <= 2 * two <= 7 * product


def test_several_nodes():
    """The data axis or the dims are within nodes; what meets across them takes the outer link."""
    t = Task(nn.Identity, [(4, 3, 64, 64)], dims=(2,))
    found = list(layouts(t, 16, node=8))
    assert {(e.data, e.cuts, e.near) for e in found} == {
        (1, (16,), False),
        (2, (8,), False), (2, (8,), True),
        (4, (4,), False), (4, (4,), True),
    }  # fmt: skip
    assert not any(e.near for e in layouts(t, 8, node=8))
    across = {(e.data, e.near): e.across(8) for e in found}
    assert across == {
        (1, False): ["dim2"], (2, False): ["data"], (2, True): ["dim2"],
        (4, False): ["data"], (4, True): ["dim2"],
    }  # fmt: skip
    assert Layout(2, (2,), (8,), near=True).mesh == {"dim2": 8, "data": 2}
    assert list(Layout(2, (2,), (8,), near=True).mesh) == ["dim2", "data"]
    assert Layout(1, (2,), (8,)).across(8) == [] and Layout(3, (2,), (4,)).across(8) == ["data"]
    # an axis of three ranks in nodes of eight does not lie within them
    assert Layout(4, (2,), (3,)).across(8) == ["data", "dim2"]


def test_links_across_nodes():
    slow = replace(DGX_H100, outer=Link(1.0, 1e9), node=2)
    net = Task(small_net, [(2, 3, 64, 64)], dims=(2,))
    windows = {}
    for near in (False, True):
        found = estimate(net, Layout(2, (2,), (2,), near=near), H100, slow)
        assert not found.refused
        windows[near] = [slow.seconds(s) for s in found.sent if s.collective == "window"]
        assert [s.bytes for s in found.sent]
    # neighbours of the dim are in one node, or each in another
    assert max(windows[False]) < 0.1 and min(windows[True]) > 0.9


def test_weights_are_cut_over_the_data_axis_too():
    t = Task(small_net, [(2, 3, 64, 64)], dims=(2,))
    found = plan(t.make, t.shapes, 4, dims=(2,), precisions=(None,), thorough=True)
    both = {e.layout.options.fsdp: e for e in found if e.layout.data == 2}
    assert set(both) == {None, "data", "all"} and not any(e.refused for e in found)
    weights = [both[k].memory["optimizer"] for k in (None, "data", "all")]
    assert weights == sorted(weights, reverse=True) and weights[0] > weights[2]
    assert "fsdp=data" in str(both["data"].layout)
    # where every rank has other samples, both are the same
    assert not any(e.layout.options.fsdp == "data" for e in found if e.layout.cuts == (1,))


def test_uneven_cuts_are_planned():
    """Of ten rows on four ranks the first have three; the plan is of who holds most."""
    t = Task(small_net, [(1, 3, 10, 64)], dims=(2,))
    found = estimate(t, Layout(1, (2,), (4,)))
    assert not found.refused and found.memory["inputs"] == 3 * 3 * 64 * 4


def test_progress_is_told(monkeypatch, command):
    told = []
    plan(small_net, [(1, 3, 64, 64)], 2, dims=(2,), told=lambda *a: told.append(a))
    assert [t[:2] for t in told] == [(0, 2), (1, 2)] and told[0][2] == "dim2 2"
    monkeypatch.chdir(ROOT)
    args = "--input", "1x1x64x64", "--devices", "2", "--shard", "2", "--json"
    _, out, err = command(*UNET, *args)
    # what is no terminal gets no bar
    assert "[#" not in err and "\r" not in err and json.loads(out)


def test_ranks_of_unlike_speed():
    """Each mesh as torch.chunk cuts and by speeds; what needs most and what takes longest."""
    t = Task(lambda: nn.Conv2d(1, 8, 1), [(1, 1, 64, 2**20)], dims=(2,), train=False)
    plans = plan(t.make, t.shapes, 4, dims=(2,), train=False, precisions=(None,),
                 speeds=[1, 1, 0.25, 1])  # fmt: skip
    uneven, even = plans
    assert uneven.layout.sizes == ((20, 19, 5, 20),) and not even.layout.sizes
    assert str(uneven.layout) == "dim2 4 in [20, 19, 5, 20]" and str(even.layout) == "dim2 4"
    # one kernel that is bound by memory: as long as its rows are many
    alone = estimate(t, Layout(1, (2,), (4,)))
    assert even.compute == pytest.approx(4 * alone.compute)
    assert uneven.compute == pytest.approx(20 / 16 * alone.compute, rel=0.02)
    assert even.peak == alone.peak < uneven.peak
    (other,) = plan(t.make, t.shapes, 2, dims=(2,), train=False, precisions=(None,),
                    speeds=[1, 1])  # fmt: skip
    assert not other.layout.sizes
    with pytest.raises(ValueError, match=r"speeds .* of 4 devices"):
        plan(t.make, t.shapes, 4, dims=(2,), speeds=[1, 2])
