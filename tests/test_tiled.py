"""`tiled`: a model in parts on one device, beside the plain model."""

import copy
import errno
import gc
import threading
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from growth import python_calls
from models import UNet, ViT
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor._torch.world import AllToAll
from shardtensor.errors import RankError, UnsupportedOpError
from shardtensor.paged import files, pager

BUDGET = 2**14


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Nearly everything is paged."""
    monkeypatch.setattr(pager, "LEAST", 512)


class Mixed(nn.Module):
    """Keywords, a dict of outputs of which one is no tensor, dropout, buffers, a frozen weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(4, 1, 1), requires_grad=False)
        self.out = nn.Conv2d(4, 1, 1)

    def forward(self, x, *, t, mask=None):
        h = F.dropout(self.norm(self.conv(x)) * self.scale, 0.3, self.training) * t
        h = F.gelu(h).masked_fill(mask, 0.0) if mask is not None else F.gelu(h)
        y = self.out(h)
        return {"y": y, "parts": (y.mean((2, 3)), h.argmax(1)), "name": "mixed"}


def spectral():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 4, 3, 2))

        def forward(self, x):
            z = torch.fft.rfft2(x)
            out = torch.zeros_like(z)
            out[..., :4, :3] = z[..., :4, :3] * torch.view_as_complex(self.w)
            return x + torch.fft.irfft2(out, s=x.shape[-2:])

    return Spectral()


CASES = {
    "unet": (lambda: UNet(2, 1, width=4), (2, 2, 24, 16), (3,), (2,)),
    "unet on 2 x 2": (lambda: UNet(2, 1, width=4), (1, 2, 24, 16), (2, 2), (2, 3)),
    "vit": (lambda: ViT((16, 16), 4, 2, 1, width=8), (2, 2, 16, 16), (3,), (2,)),
    "spectral": (spectral, (2, 2, 12, 10), (4,), (2,)),
    "more parts than rows": (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 2, 3), (4,), (2,)),
}


def runs(model, x, call, seed=5, **kwargs):
    """(outputs, gradients of x and parameters, buffers, next random number)."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    outputs = call(x, **kwargs)
    leaves = [v for v in torch.utils._pytree.tree_leaves(outputs) if isinstance(v, torch.Tensor)]
    sum(v.square().sum() for v in leaves if v.requires_grad).backward()
    grads = [x.grad, *(p.grad for p in model.parameters())]
    return [*leaves, *grads, *model.buffers(), torch.rand(2)]


def same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert type(a) is type(b) and a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_values_gradients_and_buffers_are_those_of_the_plain_model(name, tmp_path):
    make, shape, parts, dim = CASES[name]
    torch.manual_seed(0)
    model, x = make().double(), torch.randn(shape, dtype=torch.float64)
    twin = copy.deepcopy(model)
    run = st.tiled(twin, parts, dim, memory=BUDGET, spill=tmp_path)
    same(runs(twin, x, run), runs(model, x, model))
    # all but the smallest models are in files for the most part
    assert run.paging.returned > BUDGET or x.numel() < 100
    assert not list(tmp_path.iterdir())


def test_keywords_dicts_dropout_and_frozen_weights(tmp_path):
    torch.manual_seed(0)
    model, x = Mixed().double(), torch.randn(2, 2, 20, 6, dtype=torch.float64)
    twin = copy.deepcopy(model)
    run = st.tiled(twin, 3, 2, memory=BUDGET, spill=tmp_path)
    times = [torch.tensor(2.0, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    mask = torch.rand(10, 3) < 0.3
    got = runs(twin, x, run, t=times[0], mask=mask)
    same(got, runs(model, x, model, t=times[1], mask=mask))
    same([times[0].grad], [times[1].grad])
    assert run(x, t=1.0)["name"] == "mixed"


class Labels(nn.Module):
    """Scores, their softmax without a history, and labels."""

    def __init__(self, scores):
        super().__init__()
        self.conv, self.scores = nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64), scores

    def forward(self, x):
        y = self.conv(x)
        rest = y.detach().softmax(1), y.argmax(1)
        return (y, *rest) if self.scores else rest


def test_outputs_lie_as_the_plain_models(tmp_path):
    model = nn.Conv2d(2, 4, 3, padding=1)
    x = torch.randn(2, 2, 12, 4).to(memory_format=torch.channels_last).requires_grad_()
    run = st.tiled(model, 3, 2, memory=BUDGET, spill=tmp_path)
    found, want = run(x), model(x)
    assert found.stride() == want.stride() and not want.is_contiguous()
    grads = [torch.autograd.grad(y.sum(), x)[0].stride() for y in (found, want)]
    assert grads[0] == grads[1]


@pytest.mark.parametrize("scores", [True, False])
def test_outputs_without_gradients(scores, tmp_path):
    model = Labels(scores)
    x = torch.randn(1, 2, 9, 4, dtype=torch.float64, requires_grad=True)
    wants = model(x)
    found = st.tiled(model, 3, dim=2, memory=2**20, spill=tmp_path)(x)
    for want, got in zip(wants, found, strict=True):
        assert want.requires_grad == got.requires_grad
        torch.testing.assert_close(got, want)
    if scores:
        (want,), (got,) = (torch.autograd.grad(y[0].square().sum(), x) for y in (wants, found))
        torch.testing.assert_close(got, want)


def test_inference_leaves_nothing_behind(tmp_path):
    torch.manual_seed(0)
    model, x = UNet(2, 1, width=4).double().eval(), torch.randn(1, 2, 32, 16, dtype=torch.float64)
    run = st.tiled(model, 4, 2, memory=BUDGET, spill=tmp_path)
    threads = threading.active_count()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y, want = run(x), model(x)
        assert not y.requires_grad and y.is_inference() == want.is_inference()
        torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-11)
        assert threading.active_count() == threads
    assert run.paging.spilled > 0


def test_autocast_reaches_the_parts(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Conv2d(2, 3, 3, padding=1), torch.randn(1, 2, 16, 8)
    run = st.tiled(model, 2, 2, memory=BUDGET, spill=tmp_path)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, want = run(x), model(x)
    assert y.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(y, want)


def test_memory_in_use_stays_near_the_budget(tmp_path):
    """Beyond the budget there is what one op reads and makes, here a third of a MiB each."""
    torch.manual_seed(0)
    layers = [m for _ in range(6) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.GELU())]
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *layers)
    run = st.tiled(model, 8, 2, memory=2**20, spill=tmp_path)
    run(torch.randn(1, 1, 512, 128)).square().mean().backward()
    kept = 13 * 8 * 512 * 128 * 4
    assert run.paging.most > kept / 2
    assert run.paging.peak < 2**20 + 4 * 8 * 66 * 130 * 4


def test_two_calls_wait_for_backward_at_once(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)).double()
    twin, xs = copy.deepcopy(model), torch.randn(2, 1, 1, 12, 8, dtype=torch.float64)
    run = st.tiled(twin, 3, 2, memory=BUDGET, spill=tmp_path)
    for f in (run, model):
        a, b = f(xs[0]), f(xs[1])
        ((a * b.detach()).sum() + f(xs[0] + xs[1]).square().sum()).backward(retain_graph=False)
        (b**3).sum().backward()
    same([p.grad for p in twin.parameters()], [p.grad for p in model.parameters()])


def test_a_dropped_output_ends_its_ranks(tmp_path):
    model = nn.Conv2d(1, 2, 3, padding=1)
    run = st.tiled(model, 3, 2, memory=BUDGET, spill=tmp_path)
    threads = threading.active_count()
    y = run(torch.randn(1, 1, 9, 4))
    assert threading.active_count() == threads + 3
    del y
    gc.collect()
    assert threading.active_count() == threads


def test_a_step_of_its_own_reads_and_writes_files(tmp_path):
    torch.manual_seed(0)
    model = UNet(1, 1, width=4).double()
    twin = copy.deepcopy(model)
    source = np.random.default_rng(0).standard_normal((1, 1, 24, 16))
    target = np.lib.format.open_memmap(tmp_path / "y.npy", "w+", np.float64, source.shape)

    def step(model, mesh):
        spec = st.Spec.of(mesh, [Shard(2)], source.shape)
        a, b = spec.spans[2]
        x = st.ShardTensor.from_local(torch.from_numpy(source[:, :, a:b]), mesh, [Shard(2)])
        y = model(x)
        target[:, :, a:b] = y.to_local().detach().numpy()
        loss = y.square().mean()
        loss.backward()
        return loss.item()

    run = st.tiled(twin, 3, 2, memory=BUDGET, spill=tmp_path)
    for _ in range(2):
        loss = run.run(step)
        y = model(torch.from_numpy(source))
        want = y.square().mean()
        want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-12)
    same([torch.from_numpy(np.array(target))], [y.detach()])
    same([p.grad for p in twin.parameters()], [p.grad for p in model.parameters()])
    same(list(twin.buffers()), list(model.buffers()))


def test_an_array_keeps_its_memory(tmp_path):
    """What numpy sees while its tensor's memory is moved to a file."""

    def step(model, mesh):
        local = torch.arange(4096.0) + mesh.get_rank()
        array, other = local.numpy(), np.asarray(local.view(64, 64))
        for _ in range(3):
            x = st.ShardTensor.from_local(torch.ones(1, 1, 64, 64), mesh, [Shard(2)])
            model(x)
        local += 1
        want = np.arange(4096.0) + mesh.get_rank() + 1
        assert (array == want).all() and (other.ravel() == want).all()
        return True

    run = st.tiled(nn.Conv2d(1, 4, 3, padding=1), 4, 2, memory=2**10, spill=tmp_path)
    assert run.run(step)
    assert run.paging.spilled > 4 * 4 * 4096


def test_mistakes(tmp_path):
    model, x = nn.Conv2d(1, 2, 3, padding=1), torch.randn(1, 1, 8, 4)
    good = dict(memory=BUDGET, spill=tmp_path)
    with pytest.raises(ValueError, match="one number of parts for each dim"):
        st.tiled(model, (2, 2), 2, **good)
    with pytest.raises(ValueError, match="no folder"):
        st.tiled(model, 2, 2, memory=BUDGET, spill=tmp_path / "none")
    with pytest.raises(ValueError, match="memory is 0"):
        st.tiled(model, 2, 2, memory=0, spill=tmp_path)
    with pytest.raises(ValueError, match="needs them"):
        st.tiled(model, 2, 4, **good)(x)
    with pytest.raises(UnsupportedOpError, match="runs on CPUs and CUDA GPUs"):
        st.tiled(model, 2, 2, **good)(x.to("meta"))
    with pytest.raises(ValueError, match="on a CPU give a folder"):
        st.tiled(model, 2, 2, memory=BUDGET, spill="cpu")(x)
    run = st.tiled(model, 2, 2, **good)
    with pytest.raises(RankError, match="rank 0: ValueError: the step returned a ShardTensor"):
        run.run(lambda model, mesh: st.distribute_tensor(x, mesh, [Shard(2)]))
    with pytest.raises(RankError, match="Given groups=1"):
        run(torch.randn(1, 3, 8, 4))
    y = run(x.requires_grad_())
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()
    with pytest.raises(RuntimeError, match="a second time"):
        y.sum().backward()


def test_what_comes_back_is_asked_for_ahead(tmp_path, monkeypatch):
    """Of the system, in one piece before an op touches it."""
    libc, asked = files._libc(), []

    class Recorded:
        def madvise(self, at, nbytes, advice):
            asked.append((nbytes, advice))
            return libc.madvise(at, nbytes, advice)

    monkeypatch.setattr(files, "_libc", Recorded)
    run = st.tiled(UNet(2, 1, width=4), 4, 2, memory=BUDGET, spill=tmp_path)
    run(torch.randn(1, 2, 32, 16)).sum().backward()
    ahead = sum(n for n, advice in asked if advice == files._MADV_WILLNEED)
    assert ahead == run.paging.returned > 0


def test_an_op_does_not_look_at_what_is_in_files(tmp_path):
    """What a place in memory takes does not grow with what has gone, or has ended."""
    found = []
    for count in (8, 64):
        pages = pager.Pager(4 * 2**10, files.Files(tmp_path))
        with pager.Paged(pages):
            kept = [torch.full((256,), float(i)) for i in range(count)]
            ends = [x + 1 for x in kept]
            calls = python_calls(lambda kept=kept: kept[0] + kept[1], ["call"])
            assert all(bool((x == i).all()) for i, x in enumerate(kept))
        assert len(pages.pages) + len(pages.gone) >= 2 * count
        filed = pages.filed
        del ends
        pages.room(2**12)
        assert filed - pages.filed >= (count - 4) * 2**10
        found.append(calls)
    assert found[0] == found[1]


class Looked(OrderedDict):
    """Counts the keys that are looked at."""

    keys_seen = 0

    def __iter__(self):
        for key in super().__iter__():
            self.keys_seen += 1
            yield key


def test_making_room_looks_at_what_goes_and_what_is_used(tmp_path):
    """Not at all that stays, which may be many."""
    pages = pager.Pager(64 * 2**10, files.Files(tmp_path))
    pages.pages = looked = Looked()
    with pager.Paged(pages):
        kept = [torch.full((256,), float(i)) for i in range(200)]
        assert looked.keys_seen <= 2 * 200
        for i, x in enumerate(kept):
            # those used longest ago come back, others go, and not what the op reads
            before = looked.keys_seen
            assert bool((x + kept[-i] == i + (200 - i) % 200).all())
            assert looked.keys_seen - before <= 24
    assert pages.done.returned > 0 and pages.done.peak <= 66 * 2**10


def test_a_full_disk_is_an_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "posix_fallocate", full)
    run = st.tiled(UNet(1, 1, width=4), 2, 2, memory=BUDGET, spill=tmp_path)
    with pytest.raises(RankError, match="No space left"):
        run(torch.randn(1, 1, 32, 16))
    assert not list(tmp_path.iterdir())


def test_the_exchange_of_simulated_ranks():
    rng = np.random.default_rng(3)
    gives = rng.integers(0, 4, (3, 3))
    sends = [torch.arange(int(g.sum())) + 100 * r for r, g in enumerate(gives)]
    into = [torch.zeros(int(gives[:, r].sum()), dtype=torch.int64) for r in range(3)]
    datas = zip(into, sends, gives.T.tolist(), gives.tolist(), strict=True)
    AllToAll().work(list(datas))
    for r in range(3):
        parts = [s.split(g.tolist())[r] for s, g in zip(sends, gives, strict=True)]
        assert torch.equal(into[r], torch.cat(parts))
