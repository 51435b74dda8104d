"""The solver of the examples against exact flows, conservation laws and its own order."""

import math

import navier_stokes as ns
import pytest
import torch

from shardtensor.io import WellFile

TAU = 2 * math.pi


def axes(shape):
    """x (X, 1) and y (1, Y) on the unit square."""
    x, y = (torch.arange(n, dtype=torch.float64) / n for n in shape)
    return x[:, None], y[None]


def random_flow(shape, batch=2):
    """Vortices that turn within about 3 units of time."""
    generator = torch.Generator().manual_seed(0)
    return ns.sample_vorticity(batch, shape, generator, variance=300 * 7**3)


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("shape", [(16, 16), (32, 12), (15, 24)])
def test_taylor_green_decays(shape):
    """w = 2k cos(kx) cos(ky) exp(-2 nu k^2 t) solves the equations: its advection is nothing.

    What is left is the error of Crank-Nicolson. Over a time h it multiplies by
    (1 - z/2) / (1 + z/2) = exp(-z - z^3/12 - ...), z = 2 nu k^2 h: relative z^3/12 for each stage.
    """
    x, y = axes(shape)
    k, nu, end, steps = TAU, 0.05, 0.2, 16
    start = 2 * k * torch.cos(k * x) * torch.cos(k * y)
    rate = 2 * nu * k**2
    stages = [(a + b) * end / steps for a, b in ns.STAGES]
    assert sum(stages) == pytest.approx(end / steps)
    bound = steps * sum((rate * h) ** 3 for h in stages) / 12
    found = ns.simulate(start[None], [end], viscosity=nu, max_step=end / steps)[0, 0]
    error = difference(found, start * math.exp(-rate * end))
    assert 0.9 * bound < error < 1.1 * bound


def test_velocity_of_taylor_green():
    """Of the same w: u = -cos(kx) sin(ky), v = sin(kx) cos(ky)."""
    x, y = axes((16, 12))
    k = 2 * TAU
    w = 2 * k * torch.cos(k * x) * torch.cos(k * y)
    exact = torch.stack([-torch.cos(k * x) * torch.sin(k * y), torch.sin(k * x) * torch.cos(k * y)])
    torch.testing.assert_close(ns.velocity(w), exact.movedim(0, -1), rtol=0, atol=1e-12)
    single = ns.velocity(w.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact.movedim(0, -1), rtol=0, atol=1e-5)


def two_waves(shape):
    """w = cos(ax) + cos(by) and u . grad w = (a/b - b/a) sin(ax) sin(by)."""
    x, y = axes(shape)
    a, b = TAU, 2 * TAU
    w = torch.cos(a * x) + torch.cos(b * y)
    return w, (a / b - b / a) * torch.sin(a * x) * torch.sin(b * y), a, b, x, y


def test_advection_is_exact_for_modes_that_it_keeps():
    w, advection, *_ = two_waves((16, 20))
    grid = ns.Grid.of((16, 20))
    tendency, _ = ns.advect(torch.fft.rfft2(w)[None], grid)
    torch.testing.assert_close(grid.invert(tendency)[0], -advection, rtol=0, atol=1e-13)


def test_steady_flow_stays():
    """Forced with u . grad w - nu lap w, a flow doesn't change: signs, forcing, every stage."""
    w, advection, a, b, x, y = two_waves((16, 20))
    nu = 0.02
    forcing = advection + nu * (a**2 * torch.cos(a * x) + b**2 * torch.cos(b * y))
    found = ns.simulate(w[None], [1.0], viscosity=nu, forcing=forcing, max_step=0.05)
    assert difference(found[0, 0], w) < 1e-10


@pytest.mark.parametrize("nu,expected", [(0.0, 3), (5e-3, 2)])
def test_order_in_time(nu, expected):
    start = random_flow((24, 24), 1)

    def run(steps):
        return ns.simulate(start, [1.0], viscosity=nu, cfl=math.inf, max_step=1 / steps)

    exact = run(2048)
    coarse, fine = (difference(run(steps), exact) for steps in (128, 256))
    assert fine < 1e-5
    assert math.log2(coarse / fine) == pytest.approx(expected, abs=0.15)


def invariants(w):
    """Energy and enstrophy (2, ...): mean square velocity and vorticity of (..., X, Y)."""
    energy = ns.velocity(w).square().sum(-1).mean((-2, -1))
    return torch.stack([energy, w.square().mean((-2, -1))])


def test_energy_and_enstrophy_are_conserved():
    """Without viscosity and forcing the truncated equations keep both: only the steps err."""
    start = random_flow((32, 48))

    def drift(steps):
        frames = ns.simulate(start, [0.0, 1.0], viscosity=0.0, cfl=math.inf, max_step=1 / steps)
        # the flow has moved: conservation is no accident
        assert difference(frames[:, 1], frames[:, 0]) > 0.3
        before, after = invariants(frames).unbind(-1)  # each (2, B)
        return ((after - before) / before).abs().amax(-1)

    coarse, fine = drift(128), drift(256)
    assert (fine < 1e-5).all()
    assert (torch.log2(coarse / fine) > 2.8).all()  # of third order


def test_mirror_image():
    """With x and y exchanged, the flow turns the other way: no dim is special."""
    start = random_flow((24, 40), 1)
    options = dict(viscosity=1e-3, max_step=0.02)
    found = ns.simulate(start, [0.5], forcing=ns.force((24, 40)), **options)
    mirrored = ns.simulate(-start.mT, [0.5], forcing=-ns.force((40, 24)), **options)
    assert difference(-mirrored.mT, found) < 1e-10


def test_modes_that_products_would_alias_are_dropped():
    """Left in, they would not be advected: frozen noise on the flow."""
    x, _ = axes((18, 16))
    w = [torch.cos(TAU * m * x).expand(18, 16) for m in (5, 6)]
    found = ns.simulate(sum(w)[None], [0.0], viscosity=0.0)[0, 0]
    torch.testing.assert_close(found, w[0], rtol=0, atol=1e-13)


def test_default_steps_are_stable():
    """Inviscid, at the default cfl: nothing grows, though each trajectory has its own speed."""
    start = random_flow((32, 32))
    start[1] *= 10
    frames = ns.simulate(start, [0.0, 1.0], viscosity=0.0)
    before, after = invariants(frames).unbind(-1)
    assert (after <= before * 1.001).all()


def test_random_field():
    """The variance of each mode is that of the covariance operator; the mean is zero."""
    count, shape = 2048, (8, 12)
    w = ns.sample_vorticity(count, shape, torch.Generator().manual_seed(0))
    assert w.shape == (count, *shape) and w.dtype == torch.float64
    power = (torch.fft.fft2(w).abs() / math.prod(shape)).square().mean(0)
    assert power[0, 0] < 1e-20
    for m, n in [(1, 0), (0, 1), (2, -1), (3, 5)]:
        exact = 7**1.5 * (TAU**2 * (m**2 + n**2) + 49) ** -2.5
        # the mean of `count` squares of a complex Gaussian: one standard error is 1 / sqrt(count)
        assert power[m, n].item() == pytest.approx(exact, rel=5 / math.sqrt(count))


def test_generate(tmp_path):
    path, calls = tmp_path / "flow.hdf5", []
    ns.generate(path, (16, 24), 3, 4, progress=lambda *done: calls.append(done))
    assert calls[-1] == (12, 12)
    with WellFile(path) as file:
        assert (file.shape, file.n_trajectories, file.n_steps) == ((16, 24), 3, 4)
        first, last = (file.read(["vorticity", "velocity"], 2, step) for step in (0, 3))
    assert difference(last, first) > 0.1
    torch.testing.assert_close(ns.velocity(last[0]).movedim(-1, 0), last[1:], rtol=0, atol=1e-5)


def test_generate_in_batches(tmp_path):
    """A grid too large for more than one trajectory at a time."""
    path, shape = tmp_path / "flow.hdf5", (192, 180)
    ns.generate(path, shape, 3, 1, start=0.0)  # the initial fields
    expected = ns.simulate(random_flow(shape, 3), [0.0], viscosity=0.0).float()
    with WellFile(path) as file:
        for trajectory in range(3):
            found = file.read(["vorticity"], trajectory, 0)
            torch.testing.assert_close(found, expected[trajectory], rtol=0, atol=1e-5)
