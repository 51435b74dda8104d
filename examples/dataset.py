"""A file of forced turbulence for the examples, made by the solver in navier_stokes.py."""

from collections.abc import Callable
from pathlib import Path

import torch
from navier_stokes import Grid, advance, force, sample_vorticity, velocity

from shardtensor.io import write_well


def generate(
    path: str | Path,
    shape: tuple[int, int],
    trajectories: int,
    frames: int,
    *,
    viscosity: float = 1e-5,
    variance: float = 7.0**5,
    interval: float = 0.5,
    spin_up: float = 3.0,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Simulate, and store vorticity and velocity as a file of The Well.

    frames: how many, `interval` apart. variance: of the random start; the default stirs harder than
    the paper's, so that filaments form. spin_up: the time before the first frame.
    progress(done, total) is called after each frame.
    """
    grid = Grid.of(shape)
    start = sample_vorticity(
        trajectories, shape, torch.Generator().manual_seed(seed), variance=variance
    )
    forcing = torch.fft.rfft2(force(shape))
    spectrum = torch.fft.rfft2(start)
    kept = []
    for frame in range(frames):
        duration = interval if frame else spin_up
        spectrum = advance(spectrum, duration, grid, viscosity=viscosity, forcing=forcing)
        kept.append(grid.invert(spectrum))
        progress(frame + 1, frames)
    vorticity = torch.stack(kept, 1)
    write_well(
        path,
        {"vorticity": vorticity, "velocity": velocity(vorticity)},
        name="navier_stokes_2d",
        times=[spin_up + interval * i for i in range(frames)],
        parameters={"viscosity": viscosity},
    )
