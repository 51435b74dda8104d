"""Moist rotating shallow water: fields as a weather satellite and a radar would see them, as Zarr.

    d_t u + (f + zeta) k x u = -grad(g h + |u|^2 / 2) - nu grad^4 u
    d_t h + div(h u) = -beta C + (h_e(y) - h) / tau_r
    d_t Q + div(Q u) = E - C        E = max(Q_s - Q, 0) / tau_e
    d_t W + div(W u) = C - R        R = max(W - W_c, 0) / tau_p
    C = max(Q - Q_s, 0) / tau_c - W max(1 - Q / Q_s, 0) / tau_w

Water vapour Q condenses where it exceeds saturation, and condensation takes mass out of the layer:
the moist-convective model of Bouchut, Lambaerts, Lapeyre and Zeitlin (Phys. Fluids 21, 116604,
2009). Cloud water W evaporates again in dry air and rains out above a threshold (Kessler 1969). The
layer is relaxed to jets that are unstable, on an f-plane that is periodic in both directions.

Space: Sadourny's energy-conserving scheme on the C grid (J. Atmos. Sci. 32, 680, 1975); vapour and
cloud follow the mass flux with van Leer's limited slopes. Time: the three-stage third-order scheme
of Shu and Osher (1988). SI units; water in kg m-2, which are mm of rain. The solver needs torch
only, `generate` zarr too:

    python examples/shallow_water.py out/storms.zarr --shape 64 64 --frames 240
"""

import argparse
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

EARTH_RADIUS, EARTH_ROTATION = 6.371e6, 7.2921e-5  # m, s-1
LATITUDE, LONGITUDE = 40.0, -100.0  # of the domain's centre, degrees
X, Y = -1, -2
# name: (units, long name); what a satellite sees, and what a radar sees
SATELLITE = {
    "height": ("m", "thickness of the layer"),
    "vorticity": ("s-1", "relative vorticity"),
    "relative_humidity": ("%", "water vapour over its value at saturation"),
    "brightness_temperature": ("K", "brightness temperature at cloud top"),
}
RADAR = {"reflectivity": ("dBZ", "radar reflectivity of rain")}


@dataclass(frozen=True)
class Physics:
    """Constants of the equations above; a time scale of math.inf leaves its term out.

    depth: mean thickness (m). jet: amplitude (m) of h_e, which has `jets` waves in y. spacing: size
    of a cell (m). mixing: time (s) in which viscosity damps the shortest wave of the grid.
    """

    spacing: float = 20e3
    gravity: float = 9.81
    coriolis: float = 2 * EARTH_ROTATION * math.sin(math.radians(LATITUDE))
    depth: float = 100.0
    jet: float = 14.0
    jets: int = 2
    relaxation: float = 86400.0  # tau_r
    saturation: float = 50.0  # Q_s
    heating: float = 1.6  # beta, m of thickness for a kg m-2 of condensate
    condensation: float = 900.0  # tau_c
    evaporation: float = 6 * 3600.0  # tau_e
    clearing: float = 300.0  # tau_w
    threshold: float = 0.3  # W_c
    rain: float = 1800.0  # tau_p
    mixing: float = 1800.0


@dataclass(frozen=True)
class State:
    """Fields (..., Y, X): h, Q and W in the middle of cells, u and v on their west and south faces.

    fallen: the rain since the start, kg m-2.
    """

    h: Tensor
    u: Tensor
    v: Tensor
    vapour: Tensor
    cloud: Tensor
    fallen: Tensor

    def fields(self) -> tuple[Tensor, ...]:
        return tuple(vars(self).values())


def before(a: Tensor, dim: int) -> Tensor:
    """The neighbour at the next lower index, of every element."""
    return a.roll(1, dim)


def after(a: Tensor, dim: int) -> Tensor:
    return a.roll(-1, dim)


def to_face(a: Tensor, dim: int) -> Tensor:
    """Mean of a cell and the one before it: from cells to faces, or from faces to corners."""
    return (a + before(a, dim)) / 2


def to_cell(a: Tensor, dim: int) -> Tensor:
    return (a + after(a, dim)) / 2


def limited_slope(s: Tensor, dim: int) -> Tensor:
    """van Leer's: the harmonic mean of the differences to both sides, 0 at an extremum."""
    left = s - before(s, dim)
    right = after(left, dim)
    product = left * right
    # the sum cannot vanish where the product is positive
    return torch.where(product > 0, 2 * product / (left + right), torch.zeros_like(s))


def transport(s: Tensor, flux: Tensor, dim: int) -> Tensor:
    """Flux through faces of what has the ratio s (cells) to the mass, for a mass flux (faces)."""
    half = limited_slope(s, dim) / 2
    return flux * torch.where(flux > 0, before(s + half, dim), s - half)


def divergence(east: Tensor, north: Tensor, spacing: float) -> Tensor:
    return (after(east, X) - east + after(north, Y) - north) / spacing


def laplacian(a: Tensor, spacing: float) -> Tensor:
    neighbours = before(a, X) + after(a, X) + before(a, Y) + after(a, Y)
    return (neighbours - 4 * a) / spacing**2


def vorticity(s: State, p: Physics) -> Tensor:
    """At the south-west corners of cells."""
    return (s.v - before(s.v, X) - s.u + before(s.u, Y)) / p.spacing


def equilibrium(s: State, p: Physics) -> Tensor:
    """The thickness (Y, 1) that the layer is relaxed to: jets to the east and to the west."""
    n = s.h.shape[Y]
    phase = 2 * math.pi * p.jets * (torch.arange(n, dtype=s.h.dtype) + 0.5) / n
    return p.depth + p.jet * phase.cos()[:, None]


def rain_rate(s: State, p: Physics) -> Tensor:
    """kg m-2 s-1."""
    return (s.cloud - p.threshold).clamp(min=0) / p.rain


def tendency(s: State, p: Physics) -> State:
    dx = p.spacing
    east, north = to_face(s.h, X) * s.u, to_face(s.h, Y) * s.v
    q = (p.coriolis + vorticity(s, p)) / to_face(to_face(s.h, X), Y)
    bernoulli = p.gravity * s.h + (to_cell(s.u**2, X) + to_cell(s.v**2, Y)) / 2
    viscosity = dx**4 / (64 * p.mixing)  # 64 / dx^4: the largest eigenvalue of grad^4
    u = to_cell(q * to_face(north, X), Y) - (bernoulli - before(bernoulli, X)) / dx
    v = -to_cell(q * to_face(east, Y), X) - (bernoulli - before(bernoulli, Y)) / dx
    u, v = (d - viscosity * laplacian(laplacian(a, dx), dx) for d, a in ((u, s.u), (v, s.v)))
    excess = s.vapour - p.saturation
    dryness = (-excess).clamp(min=0) / p.saturation
    condensed = excess.clamp(min=0) / p.condensation - s.cloud * dryness / p.clearing
    evaporated = (-excess).clamp(min=0) / p.evaporation
    rain = rain_rate(s, p)
    moved = []
    for water in (s.vapour, s.cloud):
        ratio = water / s.h
        fluxes = transport(ratio, east, X), transport(ratio, north, Y)
        moved.append(divergence(*fluxes, dx))
    h = -divergence(east, north, dx) - p.heating * condensed
    h = h + (equilibrium(s, p) - s.h) / p.relaxation
    return State(h, u, v, evaporated - condensed - moved[0], condensed - rain - moved[1], rain)


def mix(*terms: tuple[float, State]) -> State:
    """Sum of states, each times a number."""
    return State(
        *(
            sum(w * f for (w, _), f in zip(terms, fields, strict=True))
            for fields in zip(*(s.fields() for _, s in terms), strict=True)
        )
    )


def step(s: State, dt: float, p: Physics) -> State:
    first = mix((1, s), (dt, tendency(s, p)))
    second = mix((3 / 4, s), (1 / 4, first), (dt / 4, tendency(first, p)))
    return mix((1 / 3, s), (2 / 3, second), (2 * dt / 3, tendency(second, p)))


def advance(
    s: State, duration: float, p: Physics, *, cfl: float = 0.35, max_step: float = math.inf
) -> State:
    """The state after `duration` seconds, in equal steps.

    cfl: part of a cell that the fastest wave crosses in a step. Stable below 0.6 with the flow.
    """
    speed = math.sqrt(p.gravity * s.h.max().item()) + (s.u**2 + s.v**2).max().sqrt().item()
    count = max(1, math.ceil(duration / min(max_step, cfl * p.spacing / speed) * (1 - 1e-9)))
    for _ in range(count):
        s = step(s, duration / count, p)
    return s


def balanced(shape: tuple[int, int], p: Physics, seed: int = 0, noise: float = 1.0) -> State:
    """The jets in geostrophic balance, disturbed by `noise` m of thickness, in humid air. Float64.

    The disturbance has waves of 2 to 6 lengths of the domain and its own balanced flow.
    """
    zero = torch.zeros(shape, dtype=torch.float64)
    s = State(zero, zero, zero, zero, zero, zero)
    h = equilibrium(s, p) + noise * smooth_noise(shape, seed)
    corners = to_face(to_face(h, X), Y)
    k = p.gravity / p.coriolis / p.spacing
    u, v = -k * (after(corners, Y) - corners), k * (after(corners, X) - corners)
    vapour = 0.95 * p.saturation + zero
    return State(h, u, v, vapour, zero.clone(), zero.clone())


def smooth_noise(shape: tuple[int, int], seed: int) -> Tensor:
    """A random field (Y, X) of wave numbers 2 to 6, of variance 1."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.rfft2(torch.randn(shape, generator=generator, dtype=torch.float64))
    m = torch.fft.fftfreq(shape[0], 1 / shape[0])[:, None]
    n = torch.fft.rfftfreq(shape[1], 1 / shape[1])
    size = (m**2 + n**2).sqrt()
    field = torch.fft.irfft2(spectrum * ((size >= 2) & (size <= 6)), s=shape)
    return field / field.std()


def observe(s: State, p: Physics) -> dict[str, Tensor]:
    """What instruments see, by name: the fields of SATELLITE and RADAR, in their units, at cells.

    A cloud has the emissivity 1 - exp(-a W) (the form of Stephens, J. Atmos. Sci. 35, 2123, 1978; a
    is a hundredth of his: W is spread over a cell). Its top at 220 K and the ground at 290 K
    radiate as T^4. Rain of R mm/h reflects Z = 200 R^1.6 mm^6 m-3 (Marshall and Palmer 1948); below
    1 mm^6 m-3, 0 dBZ, nothing is seen.
    """
    clear = (-1.3 * s.cloud).exp()
    z = 200 * (3600 * rain_rate(s, p)) ** 1.6
    return {
        "height": s.h,
        "vorticity": to_cell(to_cell(vorticity(s, p), X), Y),
        "relative_humidity": 100 * s.vapour / p.saturation,
        "brightness_temperature": (clear * 290.0**4 + (1 - clear) * 220.0**4) ** 0.25,
        "reflectivity": 10 * z.clamp(min=1).log10(),
    }


def frames(
    shape: tuple[int, int], count: int, p: Physics, *, interval: float, start: float, seed: int = 0
) -> Iterator[dict[str, Tensor]]:
    """`count` observations, `interval` seconds apart, the first after `start` seconds of storms."""
    s = advance(balanced(shape, p, seed), start, p)
    for i in range(count):
        s = advance(s, interval, p) if i else s
        yield observe(s, p)


def generate(
    path: str | Path,
    shape: tuple[int, int],
    count: int,
    *,
    physics: Physics | None = None,
    interval: float = 1800.0,
    start: float = 48 * 3600.0,
    chunks: tuple[int, int] | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write `count` observations of storms as one Zarr group (format 3) that xarray opens.

    Each field is an array (time, latitude, longitude) in float32, one frame a chunk or cut into
    `chunks` (rows, columns). Its attributes have units and the mean and std of all frames.
    Latitude and longitude are those of the tangent plane. The default physics has a domain of 1280
    km in latitude. The group appears under its name when it is complete.
    """
    import zarr

    p = physics or Physics(spacing=1280e3 / shape[0])
    whole = Path(path)
    part = whole.with_name(whole.name + ".part")
    root = zarr.create_group(part, overwrite=True)
    root.attrs.update({"Conventions": "CF-1.11", "source": "moist rotating shallow water"})
    for name, (values, attributes) in coordinates(shape, count, interval, p).items():
        data = root.create_array(
            name, shape=values.shape, chunks=values.shape, dtype="float64", dimension_names=[name],
            attributes=attributes,
        )  # fmt: skip
        data[:] = values.numpy()
    dims = ["time", "latitude", "longitude"]
    arrays = {
        name: root.create_array(
            name, shape=(count, *shape), chunks=(1, *(chunks or shape)), dtype="float32",
            dimension_names=dims, attributes={"units": units, "long_name": long},
        )
        for name, (units, long) in (SATELLITE | RADAR).items()
    }  # fmt: skip
    moments = {name: torch.zeros(2, dtype=torch.float64) for name in arrays}
    observed = frames(shape, count, p, interval=interval, start=start, seed=seed)
    for i, fields in enumerate(observed):
        for name, field in fields.items():
            arrays[name][i] = field.float().numpy()
            moments[name] += torch.stack([field.mean(), field.square().mean()]) / count
        progress(i + 1, count)
    for name, (mean, square) in moments.items():
        std = (square - mean**2).clamp(min=0).sqrt()
        arrays[name].attrs.update({"mean": mean.item(), "std": std.item()})
    part.rename(whole)


def coordinates(
    shape: tuple[int, int], count: int, interval: float, p: Physics
) -> Mapping[str, tuple[Tensor, dict[str, str]]]:
    """name: (values, attributes) of time, latitude and longitude."""
    degree = math.radians(1) * EARTH_RADIUS
    scales = degree, degree * math.cos(math.radians(LATITUDE))
    latitude, longitude = (
        centre + (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * p.spacing / scale
        for n, centre, scale in zip(shape, (LATITUDE, LONGITUDE), scales, strict=True)
    )
    hours = torch.arange(count, dtype=torch.float64) * interval / 3600
    return {
        "time": (hours, {"units": "hours since 2000-06-01", "standard_name": "time"}),
        "latitude": (latitude, {"units": "degrees_north", "standard_name": "latitude"}),
        "longitude": (longitude, {"units": "degrees_east", "standard_name": "longitude"}),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--shape", type=int, nargs=2, default=(64, 64))
    parser.add_argument("--frames", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generate(
        args.path, tuple(args.shape), args.frames, seed=args.seed,
        progress=lambda done, total: print(f"\r{done}/{total} frames", end="", flush=True),
    )  # fmt: skip
    print(f"\n{args.path}")


if __name__ == "__main__":
    main()
