"""Two-dimensional turbulence on the periodic unit square, by a pseudo-spectral method.

    python examples/navier_stokes.py out/navier_stokes.hdf5 --resolution 128 128

The setting of Li et al. 2020, arXiv:2010.08895, section 5.3: the vorticity w = dv/dx - du/dy obeys

    dw/dt + u . grad w = viscosity * laplacian w + f

where the velocity (u, v) is free of divergence and of mean. Lengths are in units of the side of the
square, times in those of the equation. Tensor dims are (..., x, y), which may differ in size.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Three Runge-Kutta stages (Wray; Spalart, Moser & Rogers 1991, J. Comput. Phys. 96, appendix A):
# weights of the new and of the previous tendency. A stage lasts their sum; diffusion is
# Crank-Nicolson over it. Order 3 without viscosity, 2 with it; stable for waves up to 1.73 / step.
STAGES = ((8 / 15, 0.0), (5 / 12, -17 / 60), (3 / 4, -5 / 12))


@dataclass(frozen=True)
class Grid:
    """What turns the spectrum of the vorticity, rfft2's (..., X, Y // 2 + 1), into other fields."""

    shape: tuple[int, int]
    laplacian: Tensor  # (X, Y // 2 + 1)
    kept: Tensor  # (X, Y // 2 + 1), the modes that products do not alias: the 2/3 rule
    fields: Tensor  # (3, 1, X, Y // 2 + 1), to u, v and w
    divergence: Tensor  # (2, 1, X, Y // 2 + 1), of a flux

    @classmethod
    def of(cls, shape: tuple[int, int], device: torch.device | str = "cpu") -> "Grid":
        nx, ny = shape
        options = {"dtype": torch.float64, "device": device}
        x = torch.fft.fftfreq(nx, 1 / nx, **options)[:, None]
        y = torch.fft.rfftfreq(ny, 1 / ny, **options)
        kept = (x.abs() < nx / 3) & (y < ny / 3)
        dx, dy = 2j * math.pi * x * kept, 2j * math.pi * y * kept
        laplacian = -((2 * math.pi) ** 2) * (x**2 + y**2)
        # w = -laplacian psi, u = dpsi/dy, v = -dpsi/dx; the mean of psi is nothing
        psi = kept / (-laplacian).clamp(min=1)
        fields = torch.stack([dy * psi, -dx * psi, kept + 0j])
        return cls(shape, laplacian, kept, fields[:, None], torch.stack([dx, dy])[:, None])

    def invert(self, spectrum: Tensor) -> Tensor:
        return torch.fft.irfft2(spectrum, s=self.shape)


def sample_vorticity(
    trajectories: int,
    shape: tuple[int, int],
    generator: torch.Generator | None = None,
    *,
    variance: float = 7**1.5,
) -> Tensor:
    """Random fields (trajectories, X, Y) from N(0, variance (-laplacian + 49)^-2.5), mean zero.

    The variance is the paper's; its published code has 7^3. Float64.
    """
    noise = torch.randn(trajectories, *shape, generator=generator, dtype=torch.float64)
    # of white noise a mode of the unitary transform has variance 1, a mode of the field X Y of it
    eigenvalues = variance * (49 - Grid.of(shape).laplacian) ** -2.5
    spectrum = torch.fft.rfft2(noise) * (eigenvalues * math.prod(shape)).sqrt()
    spectrum[:, 0, 0] = 0
    return torch.fft.irfft2(spectrum, s=shape)


def force(shape: tuple[int, int]) -> Tensor:
    """The paper's forcing (X, Y): 0.1 (sin(2 pi (x + y)) + cos(2 pi (x + y)))."""
    x, y = (torch.arange(n, dtype=torch.float64) / n for n in shape)
    phase = 2 * math.pi * (x[:, None] + y)
    return 0.1 * (phase.sin() + phase.cos())


def velocity(vorticity: Tensor) -> Tensor:
    """The velocity (..., X, Y, 2) of a vorticity (..., X, Y), of the modes that `advance` keeps."""
    shape = vorticity.shape[-2:]
    spectrum = torch.fft.rfft2(vorticity)
    to_u, to_v = Grid.of(tuple(shape), vorticity.device).fields[:2, 0].to(spectrum.dtype)
    return torch.stack([torch.fft.irfft2(spectrum * k, s=shape) for k in (to_u, to_v)], -1)


def advect(spectrum: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The spectrum of -u . grad w, and the velocity (2, B, X, Y) on the grid."""
    fields = grid.invert(grid.fields * spectrum)  # (3, B, X, Y)
    flux = torch.fft.rfft2(fields[:2] * fields[2])  # the flow is free of divergence
    return -(grid.divergence * flux).sum(0), fields[:2]


def advance(
    spectrum: Tensor,
    duration: float,
    grid: Grid,
    *,
    viscosity: float,
    forcing: Tensor | float = 0.0,
    cfl: float = 0.7,
    max_step: float = math.inf,
) -> Tensor:
    """The spectrum (B, X, Y // 2 + 1) of the vorticity after `duration`.

    forcing: a spectrum. cfl: largest part of a grid cell that the fluid crosses in a step, summed
    over x and y. Waves of up to pi * 2/3 a cell are kept, hence steps are stable below 0.83.
    """
    # a mode that is not advected would stay in the field as frozen noise
    spectrum, forcing = spectrum * grid.kept, forcing * grid.kept
    cells = torch.tensor(grid.shape, device=spectrum.device).view(2, 1, 1, 1)
    remaining = duration
    while remaining > 0:
        previous = 0.0
        for stage, (new, old) in enumerate(STAGES):
            tendency, flow = advect(spectrum, grid)
            tendency += forcing
            if stage == 0:
                crossed = (flow.abs_() * cells).sum(0).max().item()
                fastest = min(max_step, cfl / crossed if crossed else math.inf)
                # equal steps for the rest: no sliver at the end
                count = max(1, math.ceil(remaining / fastest * (1 - 1e-9)))
                step = remaining / count
            implicit = step * (new + old) / 2 * viscosity * grid.laplacian
            explicit = step * (new * tendency + old * previous)
            # a complex tensor is divided 5 times slower than multiplied
            spectrum = (1 - implicit).reciprocal() * ((1 + implicit) * spectrum + explicit)
            previous = tendency
        remaining = remaining - step if count > 1 else 0.0
    return spectrum


def simulate(
    vorticity: Tensor,
    times: Sequence[float],
    *,
    viscosity: float,
    forcing: Tensor | None = None,
    cfl: float = 0.7,
    max_step: float = math.inf,
    on_frame: Callable[[], None] = lambda: None,
) -> Tensor:
    """The vorticity (B, len(times), X, Y) at increasing times, from (B, X, Y) at time 0. Float64.

    forcing: a field (X, Y). Modes from a third of the resolution up are dropped: they would alias.
    """
    grid = Grid.of(tuple(vorticity.shape[-2:]), vorticity.device)
    spectrum = torch.fft.rfft2(vorticity.double())
    push = torch.fft.rfft2(forcing.double()) if forcing is not None else 0.0
    frames, now = [], 0.0
    for time in times:
        spectrum = advance(
            spectrum, time - now, grid,
            viscosity=viscosity, forcing=push, cfl=cfl, max_step=max_step,
        )  # fmt: skip
        now = time
        frames.append(grid.invert(spectrum))
        on_frame()
    return torch.stack(frames, 1)


def generate(
    path: str | Path,
    resolution: int | tuple[int, int],
    trajectories: int,
    steps: int,
    *,
    viscosity: float = 1e-4,
    interval: float = 0.25,
    start: float = 1.0,
    variance: float = 300 * 7**3,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Simulate trajectories of `steps` frames, `interval` apart, and write them as The Well does.

    The file has the scalar field vorticity and the vector field velocity, in float32. The first
    frame is at time `start`. variance: of `sample_vorticity`; the default gives vortices that turn
    once in about 3 units of time, where the paper's wait for 20 until the forcing moves them.
    """
    from shardtensor.io import write_well  # the solver above needs torch only

    shape = (resolution, resolution) if isinstance(resolution, int) else resolution
    generator = torch.Generator().manual_seed(seed)
    initial = sample_vorticity(trajectories, shape, generator, variance=variance)
    times = [start + interval * i for i in range(steps)]
    done = 0

    def tick() -> None:
        nonlocal done
        done += len(batch)
        progress(done, trajectories * steps)

    frames = torch.empty(trajectories, steps, *shape)
    # batches that fit the cache: at 128 x 128 one of 16 takes 3 times as long for each trajectory
    size = max(1, 2**15 // math.prod(shape))
    for first in range(0, trajectories, size):
        batch = initial[first : first + size]
        frames[first : first + size] = simulate(
            batch, times, viscosity=viscosity, forcing=force(shape), on_frame=tick
        )
    write_well(
        path,
        {"vorticity": frames, "velocity": velocity(frames)},
        name="navier_stokes",
        times=times,
        parameters={"viscosity": viscosity},
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--resolution", type=int, nargs=2, default=(128, 128))
    parser.add_argument("--trajectories", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--viscosity", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generate(
        args.path, tuple(args.resolution), args.trajectories, args.steps,
        viscosity=args.viscosity, seed=args.seed,
        progress=lambda done, total: print(f"\r{done}/{total} frames", end="", flush=True),
    )  # fmt: skip
    print(f"\n{args.path}")


if __name__ == "__main__":
    main()
