"""The moist shallow-water solver of the examples: conservation, balance, waves, order, the file."""

import math
from dataclasses import replace

import pytest
import shallow_water as sw
import torch

NEVER = math.inf
# no source or sink but those that a test puts back
IDEAL = sw.Physics(
    spacing=50e3,
    relaxation=NEVER,
    condensation=NEVER,
    evaporation=NEVER,
    clearing=NEVER,
    rain=NEVER,
    mixing=NEVER,
)
# vapour changes phase, and rain falls
MOIST = replace(IDEAL, condensation=900.0, clearing=300.0, rain=1800.0)


def relative(a, b):
    return abs((a - b) / b).max().item()


def energy(s, p):
    squares = sw.to_cell(s.u**2, sw.X) + sw.to_cell(s.v**2, sw.Y)
    return (p.gravity * s.h**2 / 2 + s.h * squares / 2).sum()


def storm(shape=(24, 32), p=IDEAL):
    """Jets with a disturbance as strong, and humid air of uneven mixing ratio."""
    s = sw.balanced(shape, p, 0, noise=4.0)
    vapour = s.vapour * (1 + 0.05 * sw.smooth_noise(shape, 1))
    return replace(s, vapour=vapour)


def moved(before, after):
    """The flow has changed: what it keeps, it keeps by no accident."""
    return (after.u - before.u).abs().max() > 1.0


def test_mass_and_water_are_conserved():
    start = storm()
    end = sw.advance(start, 6 * 3600, IDEAL)
    assert moved(start, end)
    for name in ("h", "vapour"):
        assert relative(getattr(end, name).sum(), getattr(start, name).sum()) < 1e-13
    # also where water changes phase and falls, and heat follows it: h - beta Q, and all water
    wet = sw.advance(start, 6 * 3600, MOIST)
    assert wet.fallen.max() > 0.1 and wet.cloud.max() > 0.1
    water = (wet.vapour + wet.cloud + wet.fallen).sum()
    assert relative(water, start.vapour.sum()) < 1e-13
    enthalpy = [(s.h - MOIST.heating * s.vapour).sum() for s in (start, wet)]
    assert relative(enthalpy[1], enthalpy[0]) < 1e-12
    # with evaporation from the ground water is gained
    more = sw.advance(start, 6 * 3600, replace(MOIST, evaporation=6 * 3600.0))
    assert (more.vapour + more.cloud + more.fallen).sum() > 1.005 * water


def test_energy_drifts_only_by_time_steps():
    """Sadourny's scheme keeps energy; what is lost is of the third order in the step."""
    start = storm()

    def drift(dt):
        end = sw.advance(start, 4 * 3600, IDEAL, max_step=dt, cfl=NEVER)
        assert moved(start, end)
        return relative(energy(end, IDEAL), energy(start, IDEAL))

    coarse, fine = drift(160.0), drift(80.0)
    assert fine < 1e-6
    assert math.log2(coarse / fine) > 2.7


def jet(n, p=IDEAL):
    """A zonal jet u(y) in geostrophic balance: f u = -g dh/dy holds exactly in its continuum."""
    p = replace(p, spacing=1280e3 / n)
    y = 2 * math.pi * (torch.arange(n, dtype=torch.float64) + 0.5)[:, None] / n
    zero = torch.zeros(n, 4, dtype=torch.float64)
    slope = -p.jet * y.sin() * 2 * math.pi / 1280e3
    u = -p.gravity / p.coriolis * slope + zero
    return sw.State(p.depth + p.jet * y.cos() + zero, u, zero, zero, zero, zero), p


def test_geostrophic_balance_stays():
    """Nothing moves but by the error in space, which is of the second order."""

    def error(n):
        start, p = jet(n)
        end = sw.advance(start, 12 * 3600, p)
        assert start.u.max() > 4
        return (end.v.abs().max() + (end.u - start.u).abs().max()).item()

    coarse, fine = error(24), error(48)
    assert fine < 0.05
    assert math.log2(coarse / fine) == pytest.approx(2, abs=0.3)


def plane_wave(n, p, dim):
    """A small wave (h, u along it, v across) of one length in n cells, at time 0, and its numbers.

    On the C grid k becomes 2 sin(k dx / 2) / dx, and the Coriolis terms carry cos(k dx / 2).
    """
    k = 2 * math.pi / n
    gradient, mean = 2 * math.sin(k / 2) / p.spacing, math.cos(k / 2)
    f = p.coriolis * mean
    omega = math.sqrt(f**2 + p.gravity * p.depth * gradient**2)
    return k, gradient, f, omega


@pytest.mark.parametrize("dim", [sw.X, sw.Y])
@pytest.mark.parametrize("coriolis", [0.0, IDEAL.coriolis])
def test_waves(dim, coriolis):
    """sqrt(g H) without rotation, omega^2 = f^2 + g H k^2 (Poincare) with it."""
    n, p, a = 32, replace(IDEAL, coriolis=coriolis), 1e-4
    k, gradient, f, omega = plane_wave(n, p, dim)
    x = torch.arange(n, dtype=torch.float64).view((1, n) if dim == sw.X else (n, 1))

    def wave(phase):
        return (k * x - phase).cos().expand(n, n)

    # along: omega u = g k h at faces, half a cell before; across: d_t v = -+ f u, a quarter later
    along = a * omega / (p.depth * gradient) * wave(k / 2)
    turn = 1 if dim == sw.X else -1
    across = turn * a * f / (p.depth * gradient) * wave(math.pi / 2)
    zero = torch.zeros(n, n, dtype=torch.float64)
    u, v = (along, across) if dim == sw.X else (across, along)
    start = sw.State(p.depth + a * wave(0.0), u, v, zero, zero, zero)
    period = 2 * math.pi / omega
    end = sw.advance(start, period / 3, p, cfl=0.05)
    want = a * wave(2 * math.pi / 3)
    assert (end.h - p.depth - want).abs().max() < 2e-3 * a
    speed = omega / (k / p.spacing)
    limit = math.sqrt(p.gravity * p.depth + (coriolis * n * p.spacing / (2 * math.pi)) ** 2)
    assert speed == pytest.approx(limit, rel=0.01)


def test_order_in_space():
    """The same smooth flow on finer grids: of the second order, on cells that all grids have."""

    def run(n):
        p = replace(IDEAL, spacing=1280e3 / n)
        at = 2 * math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n
        west, here = at - math.pi / n, at
        y, x = here[:, None], here[None]
        h = p.depth + 4 * x.cos() * y.sin()
        u = 5 * (y.cos() + west[None].sin() * 0.5)
        v = 5 * (x.sin() + west[:, None].cos() * 0.5)
        zero = torch.zeros_like(h)
        s = sw.State(h, u, v, 0.4 * h, zero, zero)
        # cells are averaged to those of the coarsest grid
        end = sw.advance(s, 3600.0, p, max_step=40.0)
        return end.h.unflatten(0, (12, -1)).unflatten(2, (12, -1)).mean((1, 3))

    exact = run(96)
    coarse, fine = (relative(run(n), exact) for n in (12, 24))
    # of second order, and the reference errs too: (1 - 1/64) / (1/4 - 1/64)
    assert coarse / fine == pytest.approx(4.2, rel=0.2)


def test_order_in_time():
    start = storm((16, 16))

    def run(dt):
        return sw.advance(start, 1920.0, IDEAL, max_step=dt, cfl=NEVER)

    exact = run(5.0).u
    errors = [(run(dt).u - exact).abs().max().item() for dt in (160.0, 80.0)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(3, abs=0.3)


def test_vapour_follows_the_mass():
    """A uniform mixing ratio stays so, and no new extremes appear: water is never negative."""
    start = storm()
    uniform = replace(start, vapour=0.4 * start.h)
    end = sw.advance(uniform, 6 * 3600, IDEAL)
    assert relative(end.vapour, 0.4 * end.h) < 1e-12
    blob = torch.zeros_like(start.h)
    blob[4:9, 20:27] = 10.0
    end = sw.advance(replace(start, vapour=blob * start.h), 6 * 3600, IDEAL)
    ratio = end.vapour / end.h
    assert ratio.min() > -1e-12 and ratio.max() < 10 + 1e-12
    assert ratio.max() > 3  # and it is not smeared out


@pytest.mark.parametrize("dim", [sw.X, sw.Y])
@pytest.mark.parametrize("way", [10.0, -10.0])
def test_transport_is_of_second_order(dim, way):
    """A smooth wave of vapour, carried by a uniform wind along a quarter of the domain."""

    def error(n):
        p = replace(IDEAL, spacing=640e3 / n, coriolis=0.0)
        x = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
        wave = (2 + x.cos()).view((1, n) if dim == sw.X else (n, 1)).expand(n, n)
        zero = torch.zeros(n, n, dtype=torch.float64)
        u, v = (zero + way, zero) if dim == sw.X else (zero, zero + way)
        start = sw.State(zero + p.depth, u, v, wave * p.depth, zero, zero)
        end = sw.advance(start, 160e3 / abs(way), p)
        moved = wave.roll(n // 4 if way > 0 else -n // 4, dim)
        return (end.vapour / end.h - moved).abs().mean().item()

    coarse, fine = error(16), error(32)
    assert fine < 0.02  # without slopes, the first order: 0.09
    assert math.log2(coarse / fine) > 1.6


def test_a_shift_changes_nothing():
    """No place of the periodic plane is special, but for the jets' rows."""
    p = replace(sw.Physics(), jet=0.0)
    start = storm(p=p)
    end = sw.advance(start, 3600, p)
    rolled = sw.State(*(f.roll((5, -7), (0, 1)) for f in start.fields()))
    found = sw.advance(rolled, 3600, p)
    for a, b in zip(found.fields(), end.fields(), strict=True):
        torch.testing.assert_close(a, b.roll((5, -7), (0, 1)), rtol=0, atol=1e-10)


def test_default_storms_last():
    """Three days at the default physics: bounded, raining, dry in most places."""
    p = replace(sw.Physics(), spacing=1280e3 / 32)
    for fields in sw.frames((32, 32), 3, p, interval=86400.0, start=86400.0):
        assert fields["height"].min() > 50 and fields["height"].max() < 130
        assert fields["relative_humidity"].min() > 60
        assert fields["brightness_temperature"].min() > 219
        assert fields["brightness_temperature"].max() <= 290
        wet = (fields["reflectivity"] > 5).double().mean()
        assert 0.02 < wet < 0.5 and fields["reflectivity"].max() < 60


def test_instruments():
    """Marshall and Palmer: 1 mm/h is 23 dBZ, 10 mm/h 39 dBZ. Without a cloud the ground is seen."""
    p = sw.Physics()
    zero = torch.zeros(1, 3, dtype=torch.float64)
    rates = torch.tensor([[0.0, 1.0, 10.0]], dtype=torch.float64) / 3600
    cloud = torch.where(rates > 0, p.threshold + rates * p.rain, 0.0)
    s = sw.State(zero + p.depth, zero, zero, zero + 25.0, cloud, zero)
    seen = sw.observe(s, p)
    assert seen.keys() == (sw.SATELLITE | sw.RADAR).keys()
    torch.testing.assert_close(
        seen["reflectivity"][0], torch.tensor([0.0, 23.01, 39.01]).double(), rtol=0, atol=0.01
    )
    t = seen["brightness_temperature"][0]
    assert t[0].item() == pytest.approx(290) and 220 < t[2] < t[1] < 290
    assert (seen["relative_humidity"] == 50).all()


def test_file(tmp_path):
    """xarray opens it: names, coordinates, units; the values are the solver's."""
    xarray = pytest.importorskip("xarray")
    path = tmp_path / "storms.zarr"
    calls = []
    sw.generate(
        path, (16, 24), 3, start=86400.0, chunks=(8, 24), progress=lambda *done: calls.append(done)
    )
    assert calls == [(1, 3), (2, 3), (3, 3)]
    with xarray.open_zarr(path, consolidated=False) as data:
        assert dict(data.sizes) == {"time": 3, "latitude": 16, "longitude": 24}
        assert set(data.data_vars) == set(sw.SATELLITE | sw.RADAR)
        for name, (units, _) in (sw.SATELLITE | sw.RADAR).items():
            assert data[name].dims == ("time", "latitude", "longitude")
            assert data[name].attrs["units"] == units
        assert str(data.time.values[1]) == "2000-06-01T00:30:00.000000000"
        # 80 km of a meridian, and of a circle of latitude 40
        assert data.latitude.diff("latitude").values == pytest.approx(80 / 111.195, rel=1e-4)
        assert data.longitude.diff("longitude").values == pytest.approx(80 / 85.18, rel=1e-4)
        p = sw.Physics(spacing=80e3)
        want = list(sw.frames((16, 24), 3, p, interval=1800.0, start=86400.0))
        for name in want[0]:
            frames = torch.stack([w[name] for w in want])
            found = torch.from_numpy(data[name].values)
            torch.testing.assert_close(found, frames.float())
            assert data[name].attrs["mean"] == pytest.approx(frames.mean().item(), rel=1e-9)
            std = frames.std(correction=0).item()
            assert data[name].attrs["std"] == pytest.approx(std, rel=1e-6, abs=1e-12)
    assert not list(tmp_path.glob("*.part"))
