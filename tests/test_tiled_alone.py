"""`tiled` without gradients: parts that do not meet, where all that the model does is local."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from models import UNet
from torch import nn

import shardtensor as st
from shardtensor.paged import pager, ranks, width
from shardtensor.ranks.simulate import Turns

BUDGET = 2**12


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Nearly everything would be paged, and the rows made twice may be as many as those made."""
    monkeypatch.setattr(pager, "LEAST", 512)
    monkeypatch.setattr(width, "MORE", 2.0)


class Net(nn.Module):
    """Modules by name, and what to do with them."""

    def __init__(self, call, **parts):
        super().__init__()
        self.parts = nn.ModuleDict(parts)
        self.call = call

    def forward(self, *args, **kwargs):
        return self.call(self.parts, *args, **kwargs)


def conv(a, b, k=3, **more):
    return nn.Conv2d(a, b, k, **{"padding": k // 2, **more})


def resnet():
    """Sums in place, of what has more rows to what has fewer."""

    def call(m, x):
        x = F.relu(m["a"](x), inplace=True)
        y = m["c"](F.relu_(m["b"](x)))
        y += x
        return F.max_pool2d(y, 3, 2, 1)

    return Net(call, a=conv(2, 4, 5), b=conv(4, 4), c=conv(4, 4, dilation=2, padding=2))


def pyramid():
    """Pools, sizes that are read, positions for every row, two outputs of other sizes."""

    def call(m, x):
        y = F.avg_pool2d(m["a"](x), 2)
        y = y + torch.arange(y.shape[2], dtype=x.dtype)[:, None] / y.shape[2]
        z = F.interpolate(y, scale_factor=2, mode="bilinear")
        return {"y": y.permute(0, 2, 3, 1), "z": (m["b"](F.interpolate(z, scale_factor=2)), "two")}

    return Net(call, a=conv(2, 3), b=conv(3, 2, 1))


def causal():
    """Rows of one side alone, a norm over channels, a transposed convolution with gaps."""

    def call(m, x):
        y = m["a"](F.pad(x, (0, 0, 4, 0)))
        y = m["norm"](y.movedim(1, -1)).movedim(-1, 1)
        return m["up"](y).where(m["up"](y) > 0, -1.0), y.chunk(2, 1)[0]

    up = nn.ConvTranspose2d(
        4, 2, 3, stride=(3, 1), padding=1, output_padding=(1, 0), dilation=(2, 1)
    )
    return Net(call, a=nn.Conv2d(2, 4, (3, 1), dilation=(2, 1)), norm=nn.LayerNorm(4), up=up)


def unet():
    return UNet(2, 1, width=4).eval()


def dropout():
    return Net(lambda m, x: m["b"](F.dropout(m["a"](x), 0.5)) + torch.rand_like(x),
               a=conv(2, 3), b=conv(3, 2))  # fmt: skip


CASES = {
    "unet": (unet, (2, 2, 80, 8), 2, 2),
    "unet, uneven": (unet, (1, 2, 100, 8), 3, 2),
    "unet on 2 x 2": (unet, (1, 2, 96, 96), (2, 2), (2, 3)),
    "unet, parts narrower than the halo": (unet, (1, 2, 72, 8), 6, 2),
    "resnet": (resnet, (1, 2, 41, 9), 4, -2),
    "pyramid": (pyramid, (1, 2, 52, 8), 3, 2),
    "causal, two parts": (causal, (1, 2, 40, 6), 2, 2),
    "causal, with an empty part": (causal, (1, 2, 41, 6), 16, 2),
    "dropout": (dropout, (1, 2, 30, 8), 3, 2),
    "one part": (resnet, (1, 2, 41, 9), 1, 2),
    "signals": (lambda: nn.Conv1d(2, 3, 5, stride=2), (2, 2, 90), 3, 2),
}


def same(got, want):
    got, shape = torch.utils._pytree.tree_flatten(got)
    want, other = torch.utils._pytree.tree_flatten(want)
    assert shape == other
    for a, b in zip(got, want, strict=True):
        if isinstance(a, torch.Tensor):
            assert type(a) is torch.Tensor and a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        else:
            assert a == b


@torch.no_grad()
def called(call, net, args, kwargs):
    """What a call leaves: outputs, what it was given, buffers, the next random number."""
    own = copy.deepcopy(args)
    torch.manual_seed(3)
    return call(*own, **kwargs), own, list(net.buffers()), torch.rand(2)


def held(model, args, parts, dim, folder, budget=BUDGET, leaves=called, **kwargs):
    """The tiled model, of which leaves(call, net, args, kwargs) is what it is of the plain one."""
    twin = copy.deepcopy(model)
    run = st.tiled(twin, parts, dim, memory=budget, spill=folder)
    same(leaves(run, twin, args, kwargs), leaves(model, model, args, kwargs))
    return run


def held_apart(name, folder, monkeypatch, leaves=called):
    """One of the CASES, whose parts do not meet."""
    if "narrower" in name or "empty" in name:
        monkeypatch.setattr(width, "MORE", 50.0)
    make, shape, parts, dim = CASES[name]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    run = held(model, (x,), parts, dim, folder, 2**9, leaves)
    assert run.halo is not None


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_the_plain_model(name, tmp_path, monkeypatch):
    held_apart(name, tmp_path, monkeypatch)


def test_keywords_masks_and_what_is_the_same_for_all(tmp_path):
    def call(m, x, *, t, mask, names, z):
        y = m["b"](F.gelu(m["a"](x) * t) + z.mean(1, keepdim=True)).masked_fill(mask, 0.0)
        return {"y": (y, y[:, :, 1:-1]), "t": t + 1, "names": [*names, "end"]}

    torch.manual_seed(0)
    model, x = Net(call, a=conv(2, 3), b=conv(3, 2)).double(), torch.randn(1, 2, 30, 8).double()
    given = dict(z=x[:1].clone(), t=torch.tensor(2.0), mask=torch.rand(30, 8) < 0.3, names=["a"])
    run = held(model, (x.to(memory_format=torch.channels_last),), 3, 2, tmp_path, 2**9, **given)
    assert run.halo is not None


def test_inference_mode_and_autocast(tmp_path):
    torch.manual_seed(0)
    model, x = (
        Net(lambda m, x: m["b"](m["a"](x)), a=conv(2, 3), b=conv(3, 2)),
        torch.randn(1, 2, 30, 8),
    )
    run = st.tiled(model, 3, 2, memory=2**9, spill=tmp_path)
    with torch.inference_mode():
        torch.testing.assert_close(run(x), model(x))
        assert run(x).is_inference() and run.halo == (2,)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(run(x), model(x))
            assert run.halo == (2,) and run(x).dtype == torch.bfloat16


def test_results_lie_in_memory_as_the_plain_model_lays_them(tmp_path):
    torch.manual_seed(0)
    model = Net(lambda m, x: (m["a"](x), m["a"](x).mT), a=conv(2, 3)).double()
    x = torch.randn(2, 2, 30, 6).double().to(memory_format=torch.channels_last)
    run = st.tiled(model, 3, 2, memory=2**9, spill=tmp_path)
    with torch.no_grad():
        assert [y.stride() for y in run(x)] == [y.stride() for y in model(x)]
    assert run.halo is not None


def hooked():
    model = Net(lambda m, x: m["a"](x), a=conv(2, 3))
    model.parts["a"].register_forward_hook(lambda m, args, y: y + y.abs().max())
    return model


class Kept:
    """What a module of no model keeps between calls, by shape."""

    grids: dict[int, torch.Tensor] = {}  # noqa: RUF012

    def of(self, x):
        n = x.shape[2]
        if n not in self.grids:
            self.grids[n] = torch.arange(n, dtype=x.dtype, device=x.device)[:, None]
        return self.grids[n]


def test_what_the_program_keeps_is_real(tmp_path):
    kept = Kept()
    model = Net(lambda m, x: m["a"](x) * kept.of(x), a=conv(2, 3)).double()
    x = torch.randn(1, 2, 30, 6).double()
    run = st.tiled(model, 3, 2, memory=2**9, spill=tmp_path)
    with torch.no_grad():
        y = run(x)
        # by what the parts left
        same(y, model(x))
    assert run.halo == (1,) and kept.grids[30].tolist() == [[float(i)] for i in range(30)]


def buffers():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(2, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.conv(x) * self.calls

    return Counting()


def narrowed_and_written(m, x):
    """A view of some of the rows, which is written to."""
    y = m["a"](x)
    x.view_as(y).add_(1)
    return m["b"](x)


MEETING = {
    "a norm over rows": Net(lambda m, x: m["n"](m["a"](x)), a=conv(2, 4), n=nn.GroupNorm(2, 4)),
    "a sum": Net(lambda m, x: m["a"](x) / (1 + m["a"](x).square().mean()), a=conv(2, 3)),
    "a number": Net(lambda m, x: m["a"](x) * (2 if x.sum() > 0 else 3), a=conv(2, 3)),
    "rows across the border": Net(lambda m, x: m["a"](x).roll(1, 2), a=conv(2, 3)),
    "rows backwards": Net(lambda m, x: m["a"](x).flip(2), a=conv(2, 3)),
    "rows and columns": Net(lambda m, x: m["a"](x) @ m["a"](x).mT, a=conv(2, 3)),
    "circular": Net(lambda m, x: m["a"](x), a=conv(2, 3, padding_mode="circular")),
    "batch statistics": Net(lambda m, x: m["n"](m["a"](x)), a=conv(2, 3), n=nn.BatchNorm2d(3)),
    "a hook": hooked(),
    "the input is written": Net(lambda m, x: m["a"](x.mul_(2)), a=conv(2, 3)),
    "some rows are written": Net(narrowed_and_written, a=conv(2, 2), b=conv(2, 2)),
    "a part is written": Net(
        lambda m, x: m["b"](m["a"](x).index_fill_(2, torch.tensor([9, 11]), 0.0)),
        a=conv(2, 2), b=conv(2, 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEETING)
def test_parts_meet_where_they_must(name, tmp_path):
    torch.manual_seed(0)
    model, x = copy.deepcopy(MEETING[name]).double(), torch.randn(1, 2, 36, 6).double()
    run = held(model, (x,), 3, 2, tmp_path, 2**9)
    assert run.halo is None or name == "a part is written"


DRAWS = {
    "dropout": (lambda x: F.dropout(x, 0.5), True),
    "noise": (torch.rand_like, True),
    "what all parts have": (lambda x: x * torch.rand(6), False),
}


@pytest.mark.parametrize("name", DRAWS)
def test_parts_whose_draws_are_their_own_meet(name, tmp_path, monkeypatch):
    # as on a GPU, where no part can draw what one device does
    monkeypatch.setattr(ranks, "match_single_device", nullcontext)
    draw, meet = DRAWS[name]
    model = Net(lambda m, x: draw(m["a"](x)), a=conv(2, 3, 1))
    run = st.tiled(model, 3, 2, memory=2**9, spill=tmp_path)
    with torch.no_grad():
        y = run(torch.ones(1, 2, 36, 6))
    assert (run.halo is None) == meet
    assert meet != y[:, :, :12].equal(y[:, :, 12:24])


def test_buffers_and_calls_are_counted_once(tmp_path):
    run = held(buffers().double(), (torch.randn(1, 2, 30, 6).double(),), 3, 2, tmp_path, 2**9)
    assert run.halo == (1,)


def test_parts_meet_where_that_is_cheaper(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, x = unet().double(), torch.randn(1, 2, 96, 8).double()
    monkeypatch.setattr(width, "MORE", 0.2)
    assert held(model, (x,), 4, 2, tmp_path, 2**9).halo is None
    monkeypatch.setattr(width, "MORE", 2.0)
    assert held(model, (x,), 4, 2, tmp_path, 2**30).halo is None
    assert held(model, (x,), 4, 2, tmp_path, 2**9).halo is not None


def test_nothing_is_exchanged_and_little_is_in_files(tmp_path, monkeypatch, plain_transport):
    torch.manual_seed(0)
    layers = [layer for i in range(4) for layer in (conv(4 if i else 2, 4), nn.GELU())]
    model = nn.Sequential(*layers).double()
    x = torch.randn(1, 2, 256, 16).double()
    turns, wait = [], Turns.wait
    monkeypatch.setattr(Turns, "wait", lambda *args: turns.append(1) or wait(*args))
    found = []
    for more in (-1.0, 0.5):
        monkeypatch.setattr(width, "MORE", more)
        turns.clear()
        run = held(model, (x,), 8, 2, tmp_path, 2**17 - 1)
        found.append((run.halo, len(turns), run.paging))
    (_, often, met), (halo, never, apart) = found
    # of an exchange the rank that comes last waits for nobody
    assert halo == (4,) and often == 4 * 7 and never == 0
    assert met.spilled > 2**17 and apart.spilled == 0 and apart.peak < 2**17 + 2**14
