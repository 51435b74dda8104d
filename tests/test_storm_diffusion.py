"""The diffusion recipe: EDM against its formulas, and sharded runs against one device, in float64."""

import csv
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import dit
import pytest
import shallow_water as sw
import storm_diffusion as sd
import torch
import zarr
from torch import nn
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor import testing as T
from shardtensor.ranks.testing import run_workers, simulate

D = torch.float64
TINY = dict(patch=2, width=16, depth=2, heads=2, kernel=3)
HERE = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """8 frames of 20 x 12 points; 10 rows of tokens do not divide by 4."""
    path = tmp_path_factory.mktemp("storms") / "storms.zarr"
    physics = sw.Physics(spacing=64e3)
    sw.generate(path, (20, 12), 8, physics=physics, start=36 * 3600.0, chunks=(5, 12))
    return path


# the model and EDM, on plain tensors --------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 2, 3, 5])
def test_attention_of_the_model(kernel):
    """Against the definition, token by token."""
    q, k, v = torch.randn(3, 2, 6, 5, 2, 4, dtype=D)
    got = dit.na2d(q, k, v, kernel)
    for i in range(6):
        for j in range(5):
            a, b = (min(max(p - kernel // 2, 0), n - kernel) for p, n in ((i, 6), (j, 5)))
            keys, values = (x[:, a : a + kernel, b : b + kernel].flatten(1, 2) for x in (k, v))
            weights = torch.einsum("bhd,bnhd->bhn", q[:, i, j], keys).div(2).softmax(-1)
            want = torch.einsum("bhn,bnhd->bhd", weights, values)
            torch.testing.assert_close(got[:, i, j], want, rtol=0, atol=1e-12)


def awake(model):
    """Weights that are nowhere zero, so that every part of the model counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.2 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def test_model_on_shards():
    """Values and gradients, rows cut in every way, and rows and columns."""
    torch.manual_seed(0)
    model = awake(dit.Denoiser((20, 12), 3, 2, **TINY).to(D))
    x, given = torch.randn(2, 2, 20, 12, dtype=D), torch.randn(2, 3, 20, 12, dtype=D)
    sigma = torch.tensor([0.3, 4.0], dtype=D)
    for cut in T.cuts(20):
        T.hold(model, [x, sigma, given], [T.shard(2, cut), None, T.shard(2, cut)], (len(cut),))
    both = T.On([Shard(2), Shard(3)], {2: (13, 7)})
    T.hold(model, [x, sigma, given], [both, None, both], (2, 2))


def test_preconditioning():
    """At first D = c_skip x, the best guess of white noise; c_in, c_out, c_skip of Table 1."""
    model = dit.Denoiser((20, 12), 3, 2, **TINY).to(D)
    x, given = torch.randn(2, 2, 20, 12, dtype=D), torch.randn(2, 3, 20, 12, dtype=D)
    sigma = torch.tensor([0.5, 3.0], dtype=D)
    s = sigma[:, None, None, None]
    torch.testing.assert_close(model(x, sigma, given), x / (s**2 + 1))
    seen = []

    class Fixed(nn.Module):
        def forward(self, y, level):
            seen.append((y, level))
            return torch.full_like(x, 2.0)

    model.network = Fixed()
    want = x / (s**2 + 1) + 2 * s / (s**2 + 1).sqrt()
    torch.testing.assert_close(model(x, sigma, given), want)
    ((y, level),) = seen
    torch.testing.assert_close(y, torch.cat([x / (s**2 + 1).sqrt(), given], 1))
    torch.testing.assert_close(level, sigma.log() / 4)


def test_loss_weights_levels_alike():
    """Of a network that says 0, lambda c_out^2 = 1: the effective target has variance 1."""
    y, noise = torch.randn(2, 4, 1, 64, 64, dtype=D)
    zero = lambda x, sigma, given: x / (sigma[:, None, None, None] ** 2 + 1)  # noqa: E731
    for level in (0.02, 1.0, 50.0):
        sigma = torch.full((4,), level, dtype=D)
        loss = dit.edm_loss(zero, y, y, sigma, noise).item()
        assert loss == pytest.approx(1, abs=0.1)


def gaussian(deviation):
    """The exact denoiser of numbers N(1, deviation^2)."""

    def denoise(x, sigma, given):
        s = sigma[:, None, None, None]
        return (x * deviation**2 + s**2) / (s**2 + deviation**2)

    return denoise


def test_sampler_solves_the_flow():
    """For Gaussian data dx/dsigma has a closed solution; Heun's method is of the second order."""
    noise = torch.randn(2, 1, 8, 8, dtype=D)
    for steps in (18, 36):
        assert dit.levels(steps)[:: steps - 1][:2] == pytest.approx([dit.SIGMA_MAX, dit.SIGMA_MIN])
        assert dit.levels(steps)[-1] == 0

    def error(steps):
        found = dit.heun(gaussian(0.7), noise, lambda i: noise, steps)
        scale = 0.7 / math.sqrt(dit.SIGMA_MAX**2 + 0.7**2)
        exact = 1 + (dit.SIGMA_MAX * noise - 1) * scale
        return (found - exact).abs().max().item()

    coarse, fine = error(32), error(64)
    assert fine < 0.01
    assert 3 < coarse / fine < 6


def test_stochastic_sampler_keeps_the_distribution():
    def noise(i):
        generator = torch.Generator().manual_seed(i)
        return torch.randn(1, 1, 128, 128, generator=generator, dtype=D)

    still, stirred = (dit.heun(gaussian(0.7), noise(0), noise, 40, churn) for churn in (0, 20))
    assert (stirred - still).abs().max() > 0.5
    assert stirred.mean().item() == pytest.approx(1, abs=0.03)
    assert stirred.std().item() == pytest.approx(0.7, abs=0.03)


# data, on ranks ------------------------------------------------------------------------------------


def meshes(shape):
    return st.init(**dict(zip(("data", "h", "w"), shape, strict=True)))[0]


def reading(store, shape):
    where = sd.Where(HERE, meshes(shape), D)
    storms = sd.Storms(store, where)
    read, original = [], zarr.Array.__getitem__

    def count(array, selection):
        found = original(array, selection)
        read.append((array.name, selection, found.size))
        return found

    zarr.Array.__getitem__ = count
    try:
        x = storms.read(list(sd.FIELDS), [1, 6])
    finally:
        zarr.Array.__getitem__ = original
    return (
        x.full_tensor(),
        sum(n for *_, n in read),
        x.to_local().numel(),
        storms.noise([5, 6], 3).full_tensor(),
    )


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 1), (1, 2, 2), (2, 1, 2)])
def test_ranks_read_and_draw_their_own(store, shape):
    alone = sd.Storms(store, sd.Where(HERE, None, D))
    want, noise = alone.read(list(sd.FIELDS), [1, 6]), alone.noise([5, 6], 3)
    root = zarr.open_group(store, mode="r")
    for i, name in enumerate(sd.FIELDS):
        mean, std = root[name].attrs["mean"], root[name].attrs["std"]
        frames = torch.from_numpy(root[name][:])[[1, 6]].double()
        torch.testing.assert_close(want[:, i], (frames - mean) / std, rtol=1e-5, atol=1e-5)
    assert noise.std() == pytest.approx(1, abs=0.1) and not torch.equal(noise[0], noise[1])
    for x, count, held, n in simulate(math.prod(shape), reading, store, shape):
        assert torch.equal(x, want) and torch.equal(n, noise)
        assert count == held and held <= want.numel() / (shape[1] * shape[2]) * 1.1


def test_batch_that_does_not_divide(store):
    def share():
        return sd.Where(HERE, meshes((2, 1, 1)), D).share([1, 2, 3])

    with pytest.raises(st.RankError, match="3 samples do not divide by 2 ranks"):
        simulate(2, share)


# training ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns(store):
    storms = sd.Storms(store, sd.Where(HERE, None, D))
    _, losses = sd.train("radar", storms, steps=80, batch=4, frames=7, rate=0.01, options=TINY)
    assert sum(losses[:10]) / 10 == pytest.approx(1, abs=0.2)  # of a network that says 0
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_weights_are_averaged(store):
    """After one step: a tenth of the first weights, nine tenths of AdamW's."""
    storms = sd.Storms(store, sd.Where(HERE, None, D))
    model, _ = sd.train("radar", storms, steps=1, batch=2, frames=6, rate=0.4, options=TINY)
    start = sd.build(sd.STAGES["radar"], storms, TINY)
    bias, before = model.network.head.bias, start.network.head.bias
    # AdamW's first step is the rate, at a twentieth in the first step of the schedule
    assert (bias - before).abs().detach() == pytest.approx(0.9 * 0.4 / 20, rel=1e-4)


# training and sampling, against one device ---------------------------------------------------------


def program(where, store, churn=0.0, steps=3):
    """Losses of both models, their EMA weights, and samples."""
    storms = sd.Storms(store, where)
    models, losses = {}, {}
    for name in sd.STAGES:
        models[name], losses[name] = sd.train(
            name, storms, steps=steps, batch=2, frames=6, rate=0.05, options=TINY
        )
    samples = sd.forecast(models, storms, 6, 2, steps=4, churn=churn)
    whole = {k: [full(p) for p in m.parameters()] for k, m in models.items()}
    return losses, whole, samples


def full(p):
    return (p.full_tensor() if isinstance(p, sd.DTensor) else p).detach()


def on_rank(shape, *args):
    with st.fallback("error"):  # nothing is gathered behind the scenes
        return program(sd.Where(HERE, meshes(shape), D), *args)


def same_as_one_device(found, store, *args):
    losses, whole, samples = program(sd.Where(HERE, None, D), store, *args)
    assert samples.shape == (2, len(sd.FIELDS), 20, 12) and samples.isfinite().all()
    for got, weights, drawn in found:
        for name in sd.STAGES:
            assert got[name] == pytest.approx(losses[name], rel=1e-9)
            # it trains: another weight than at the beginning, another loss
            assert len(set(losses[name])) == len(losses[name])
            for a, b in zip(weights[name], whole[name], strict=True):
                T.same(a, b, name, rtol=1e-9)
        for i, name in enumerate(sd.FIELDS):
            T.same(drawn[:, i], samples[:, i], name, rtol=1e-9)


@pytest.mark.parametrize("shape", [(1, 2, 1), (1, 1, 3), (1, 2, 2)])
def test_simulated_ranks(store, shape):
    same_as_one_device(simulate(math.prod(shape), on_rank, shape, store), store)


def test_stochastic_samples(store):
    same_as_one_device(simulate(2, on_rank, (1, 2, 1), store, 10.0, 1), store, 10.0, 1)


@pytest.mark.gloo
@pytest.mark.parametrize("shape", [(2, 2, 1), (2, 1, 2)])
def test_data_and_domain_with_fsdp2(store, shape):
    same_as_one_device(run_workers(4, on_rank, shape, store), store)


def sharded_parameters():
    where = sd.Where(HERE, meshes((2, 2, 1)), D)

    class Shape:
        shape = (20, 12)

    storms = Shape()
    storms.where = where
    model = sd.build(sd.STAGES["radar"], storms, TINY)
    before = [full(p).clone() for p in model.parameters()]
    sd.load(model, [b + 1 for b in before])
    local = sum(p.to_local().numel() for p in model.parameters())
    after = [full(p) for p in model.parameters()]
    loaded = all(torch.equal(a, b + 1) for a, b in zip(after, before, strict=True))
    return local, sum(p.numel() for p in before), loaded


@pytest.mark.gloo
def test_fsdp2_shards_and_weights_load():
    for local, whole, loaded in run_workers(4, sharded_parameters):
        assert local < 0.55 * whole and loaded


# the program ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_program(tmp_path):
    """From nothing to the picture, in processes that it starts itself."""
    script = Path(sd.__file__)
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    options = [
        "--ranks",
        "2",
        "--resolution",
        "32",
        "--frames",
        "12",
        "--steps",
        "3",
        "--batch",
        "2",
        "--members",
        "1",
    ]
    ran = subprocess.run(
        [sys.executable, script, *options, "--out", tmp_path],
        env=clean, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "satellite loss: relative difference" in ran.stdout
    assert (tmp_path / "storm_diffusion.png").read_bytes()[:4] == b"\x89PNG"
    with (tmp_path / "storm_losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["stage"], r["step"]) for r in rows] == [
        (s, str(i)) for s in sd.STAGES for i in range(3)
    ]
    for r in rows:
        assert float(r["sharded"]) == pytest.approx(float(r["one_device"]), rel=1e-4)
    with (tmp_path / "storm_samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["field"] for r in rows] == list(sd.FIELDS)
    assert all(float(r["same_weights"]) < 1e-3 for r in rows)


def test_the_example_of_the_page():
    page = Path(__file__).parent.parent / "docs" / "recipes" / "diffusion.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    exec(block, {})


def test_settings_that_differ(tmp_path):
    class Args:
        out = tmp_path
        resolution = frames = steps = batch = members = 1
        churn = 0.0

    assert sd.single(Args) is None
    torch.save({"settings": sd.settings(Args)}, tmp_path / "storm_single.pt")
    assert sd.single(Args)
    Args.steps = 2
    with pytest.raises(ValueError, match="--plain"):
        sd.single(Args)
