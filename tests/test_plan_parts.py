"""What a plan says of `tiled`, beside what it then moves."""

import importlib
from dataclasses import replace

import pytest
import torch
from bench_models import fno
from models import UNet, ViT
from torch import nn

import shardtensor as st
from shardtensor import containers
from shardtensor.attention import assume
from shardtensor.observe.network import DGX_H100
from shardtensor.paged import files, pager, width
from shardtensor.plan.estimate import H100, Device, Task, attention_rates
from shardtensor.plan.parts import in_parts
from shardtensor.plan.plans import Plans

cli = importlib.import_module("shardtensor.cli.plan")
CPU = Device("cpu", 2**22, 1e10, {64: 2e10, 32: 4e10, 16: 4e10}, 1.0, 2e-6)
CASES = {
    "unet": (lambda: UNet(1, 1, width=4), (1, 1, 96, 64)),
    "vit": (lambda: ViT((64, 64), 8, 1, 1, width=32), (1, 1, 64, 64)),
    "fno": (lambda: fno(8, 6, 2), (1, 4, 96, 64)),
    "dropout": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.Dropout(), nn.GELU(), nn.Conv2d(8, 1, 3, padding=1)
        ),
        (1, 1, 96, 64),
    ),
}


def deep():
    """Four convolutions, of which a part needs four rows beside its own."""
    convs = [nn.Conv2d(4 if i else 2, 4, 3, padding=1) for i in range(4)]
    return nn.Sequential(*(layer for conv in convs for layer in (conv, nn.GELU())))


def counted():
    """A buffer that counts calls, a mask, every other row, in a dict."""

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.deep = deep()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x, weight):
            self.calls += 1
            return {"y": self.deep(x * weight)[:, :, ::2], "name": "y"}

    return Counted()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A plan is of parts that meet."""
    monkeypatch.setattr(pager, "LEAST", 512)
    monkeypatch.setattr(width, "MORE", -1.0)


def ran(make, shape, parts, memory, train, folder, *others):
    """`tiled` after a step in parts."""
    torch.manual_seed(0)
    run = st.tiled(make().train(train), parts, 2, memory=memory, spill=folder)
    # attention as the device of the plan has it
    chosen = assume(attention_rates(CPU, DGX_H100, parts))
    with torch.set_grad_enabled(train), chosen:
        y = run(torch.randn(shape), *map(torch.randn, others))
        if train:
            sum(v.square().mean() for v in containers.tensors(y)).backward()
    return run


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_what_is_said_to_lie_in_files_does(name, train, tmp_path, plain_transport):
    make, shape = CASES[name]
    task = Task(make, [shape], dims=(2,), train=train)
    said = in_parts(task, CPU, memory=2**16, parts=[4])
    moved = ran(make, shape, 4, 2**16, train, tmp_path).paging
    assert not said.refused and (said.parts, said.dim) == (4, 2)
    assert 0.85 < said.spilled / moved.spilled < 1.15
    assert 0.6 < said.most / moved.most < 1.2
    assert said.times > 1


def test_what_is_proposed_runs_within_the_memory(tmp_path):
    make, shape = CASES["unet"]
    task = Task(make, [shape], dims=(2,), train=False)
    found = in_parts(task, CPU, memory=2**18)
    assert 2 <= found.parts <= 32 and not found.refused
    # an op's result may be larger than what it reads
    peak = ran(make, shape, found.parts, found.memory, False, tmp_path).paging.peak
    assert peak <= 1.25 * 2**18
    # with more memory fewer parts, in the end nothing in files
    more = in_parts(task, CPU, memory=2**24)
    assert more.parts == 2 and more.spilled == more.most == 0
    assert more.times < found.times
    one = in_parts(task, CPU, memory=2**24, parts=[1])
    assert one.parts == 1 and one.spilled == 0


# a model, its inputs, (parts, memory), and how many rows parts may make once more
APART = {
    "one part": (deep, [(1, 2, 256, 16)], 1, 2**14, 0.25),
    "parts that spill": (deep, [(1, 2, 256, 16)], 4, 2**14, 0.25),
    "uneven": (deep, [(1, 2, 256, 16)], 7, 2**15, 0.25),
    "a mask, a dict": (counted, [(2, 2, 256, 8), (256, 8)], 4, 2**14, 0.25),
    "pools and skips": (CASES["unet"][0], [(1, 1, 192, 64)], 2, 2**17, 2.0),
    "too many rows made twice": (deep, [(1, 2, 256, 16)], 32, 2**12, 0.25),
    "a norm over rows": (lambda: nn.Sequential(deep(), nn.GroupNorm(2, 4)),
                         [(1, 2, 256, 16)], 4, 2**14, 0.25),
    "all in memory": (deep, [(1, 2, 256, 16)], 4, 2**16, 0.25),
}  # fmt: skip


@pytest.mark.parametrize("name", APART)
def test_parts_that_do_not_meet(name, tmp_path, monkeypatch):
    make, shapes, parts, memory, more = APART[name]
    monkeypatch.setattr(width, "MORE", more)
    said = in_parts(Task(make, shapes, dims=(2,), train=False), CPU, memory=memory, parts=[parts])
    run = ran(make, shapes[0], parts, memory, False, tmp_path, *shapes[1:])
    halo = None if run.halo is None else run.halo[0]
    assert not said.refused and said.halo == halo
    assert (halo is None) == ("norm" in name or "too" in name or "all" in name)
    if halo is not None:
        assert (said.spilled, said.most) == (run.paging.spilled, run.paging.most)
        assert said.times > 1


def clipped():
    """Gradients of all rows, of which those of parts are no sums."""
    model = deep()
    model[2].register_full_backward_hook(lambda m, into, out: (into[0].clamp(-0.1, 0.1),))
    return model


# a model, its inputs, (parts, memory), whether parts meet
LEARNT = {
    "most are kept": (deep, [(1, 2, 256, 16)], 4, 2**18, False),
    "some are kept": (deep, [(1, 2, 256, 16)], 7, 2**17, False),
    "none is, which spills": (deep, [(1, 2, 256, 16)], 7, 3 * 2**15, False),
    "a mask, a dict": (counted, [(2, 2, 256, 8), (256, 8)], 4, 2**18, False),
    "pools and dropout": (
        lambda: nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.AvgPool2d(2), nn.Dropout(),
                              nn.Upsample(scale_factor=4), nn.Conv2d(4, 1, 3, padding=1)),
        [(1, 1, 768, 32)], 3, 2**19, False,
    ),
    "a part's own does not fit": (deep, [(1, 2, 256, 16)], 4, 2**16, True),
    "all fits": (deep, [(1, 2, 256, 16)], 4, 2**22, True),
    "a hook": (clipped, [(1, 2, 256, 16)], 4, 2**18, True),
    "statistics": (lambda: nn.Sequential(deep(), nn.BatchNorm2d(4)), [(1, 2, 256, 16)], 4, 2**18, True),
}  # fmt: skip


@pytest.mark.parametrize("name", LEARNT)
def test_parts_that_do_not_meet_in_training(name, tmp_path, monkeypatch):
    make, shapes, parts, memory, meet = LEARNT[name]
    monkeypatch.setattr(width, "MORE", 0.25)
    monkeypatch.setattr(files, "_free", lambda: 0)
    full = replace(CPU, memory=memory)
    said = in_parts(Task(make, shapes, dims=(2,)), full, memory=memory, parts=[parts])
    run = ran(make, shapes[0], parts, memory, True, tmp_path, *shapes[1:])
    assert not said.refused and said.halo == (run.halo and run.halo[0])
    assert (said.halo is None) == meet
    if not meet:
        assert (said.spilled, said.most) == (run.paging.spilled, run.paging.most)
        assert said.times > 1


def test_parts_that_draw_meet_on_a_gpu(monkeypatch):
    make, shape = CASES["dropout"]
    monkeypatch.setattr(width, "MORE", 0.25)
    task = Task(make, [shape], dims=(2,), train=False)
    drawing = replace(task, make=lambda: Drawn())
    for asked, host, gpu in ((task, 2, 2), (drawing, 2, None)):
        for device, halo in ((CPU, host), (H100, gpu)):
            assert in_parts(asked, device, memory=2**14, parts=[4]).halo == halo


class Drawn(nn.Module):
    """Noise, in inference too."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x):
        y = self.first(x)
        return self.last(y + torch.randn_like(y))


def test_what_is_not_proposed():
    make, shape = CASES["unet"]
    task = Task(make, [shape], dims=(2,), train=False)
    assert "96 rows in" in in_parts(task, CPU, memory=2**10).refused
    assert in_parts(task, CPU, memory=2**10).parts == 0
    tiny = Device("cpu", 2**10, 1e10, CPU.flops, 1.0, 2e-6)
    assert "do not fit" in in_parts(task, tiny).refused


def test_pages_of_plans_propose_it():
    task = Task(lambda: nn.Conv2d(1, 8, 3, padding=1), [(1, 1, 512, 512)], dims=(2,), train=False)
    small = Device("cpu", 6 * 2**20, 1e10, CPU.flops, 1.0, 2e-6)
    plans = st.plan(task.make, task.shapes, 2, small, dims=(2,), train=False, precisions=(None,))
    assert isinstance(plans, Plans)
    said = plans.in_parts()
    assert str(said).startswith("one device in parts: st.tiled(model, ") and said.parts > 1
    assert str(said) in plans.to_html(devices=(2,), factors=(1,)).replace("&#x27;", "'")


def test_the_command_proposes_it_and_uneven_sizes(tmp_path, monkeypatch, command):
    monkeypatch.setenv("SHARDTENSOR_HOME", str(tmp_path))
    model = tmp_path / "wide.py"
    model.write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.Conv2d(1, 8, 3, padding=1)\n"
    )
    monkeypatch.setattr(cli, "measured_here", lambda ranks: replace(CPU, memory=6 * 2**20))
    args = ["plan", f"{model}:net", "--input", "1x1x512x512", "--shard", "2", "--inference",
            "--device", "cpu", "--speeds", "1,0.5", "--multiple", "8"]  # fmt: skip
    for _ in range(2):
        # the second time as it was kept
        code, out, err = command(*args)
        assert code == 0, err
        assert "or one device in parts: st.tiled(model, " in out
        assert "dim2 2 in [344, 168]" in out and "dim2 2, bf16" in out
    code, out, err = command(*args[:-4], "--speeds", "1,fast")
    assert code and "--speeds 1,fast: numbers" in err + out
