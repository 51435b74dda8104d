"""Potential flow around closed bodies, by a panel method: data of vehicle-like shapes.

    python examples/panels.py out/vehicles --bodies 16 --level 3

writes DrivAerML's layout (run_i/boundary_i.vtp with CpMeanTrim on cells, run_i/volume_i.vtu with
UMeanTrim on cells, run_i/drivaer_i.stl). Needs pyvista (extra `mesh`). The flow is incompressible,
without vorticity, over a ground that is a mirror; so there is no wake and no drag.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

D = torch.float64
MIRROR = torch.tensor([1.0, 1.0, -1.0], dtype=D)


@dataclass(frozen=True)
class Body:
    """Vehicle-like shapes: lengths in m, z = 0 the ground. roundness: 2 is an ellipsoid."""

    length: float = 4.5
    width: float = 1.8
    height: float = 1.2
    clearance: float = 0.2
    cabin: float = 0.5
    cabin_at: float = 0.1
    taper: float = 0.2
    roundness: float = 3.0

    @classmethod
    def random(cls, seed: int) -> "Body":
        g = torch.Generator().manual_seed(seed)
        u = torch.rand(8, generator=g).tolist()
        return cls(4 + u[0], 1.6 + 0.4 * u[1], 1 + 0.4 * u[2], 0.15 + 0.15 * u[3], 0.3 + 0.4 * u[4],
                   0.3 * (u[5] - 0.3), 0.3 * u[6], 2.4 + 1.2 * u[7])  # fmt: skip

    def surface(self, level: int) -> tuple[Tensor, Tensor]:
        """Points (V, 3) and triangles (T, 3), counterclockwise from outside; T = 20 * 4^level."""
        points, faces = sphere(level)
        # a superellipsoid of half lengths 1
        radius = (points.abs() ** self.roundness).sum(1, keepdim=True) ** (-1 / self.roundness)
        x, y, z = (points * radius).unbind(1)
        # a cabin on top, a narrower tail
        up = 1 + self.cabin * torch.exp(-(((x - self.cabin_at) / 0.45) ** 2)) * (z > 0)
        narrow = 1 - self.taper * ((x + 1) / 2) ** 2
        half = 0.5 * self.height
        shape = torch.stack(
            [0.5 * self.length * x, 0.5 * self.width * y * narrow, half * z * up], 1
        )
        return shape + torch.tensor([0, 0, self.clearance + half], dtype=D), faces


def sphere(level: int) -> tuple[Tensor, Tensor]:
    """A unit sphere of 20 * 4^level triangles: an icosahedron whose edges are halved."""
    t = (1 + math.sqrt(5)) / 2
    points = torch.tensor(
        [[-1, t, 0], [1, t, 0], [-1, -t, 0], [1, -t, 0], [0, -1, t], [0, 1, t],
         [0, -1, -t], [0, 1, -t], [t, 0, -1], [t, 0, 1], [-t, 0, -1], [-t, 0, 1]], dtype=D,
    )  # fmt: skip
    faces = torch.tensor(
        [[0, 11, 5], [0, 5, 1], [0, 1, 7], [0, 7, 10], [0, 10, 11], [1, 5, 9], [5, 11, 4],
         [11, 10, 2], [10, 7, 6], [7, 1, 8], [3, 9, 4], [3, 4, 2], [3, 2, 6], [3, 6, 8], [3, 8, 9],
         [4, 9, 5], [2, 4, 11], [6, 2, 10], [8, 6, 7], [9, 8, 1]]
    )  # fmt: skip
    points = torch.nn.functional.normalize(points, dim=1)
    for _ in range(level):
        edges = torch.stack([faces, faces.roll(-1, 1)], 2).sort(2).values.view(-1, 2)
        unique, number = edges.unique(dim=0, return_inverse=True)
        middle = torch.nn.functional.normalize(points[unique].mean(1), dim=1)
        ab, bc, ca = (number.view(-1, 3) + len(points)).unbind(1)
        points = torch.cat([points, middle])
        a, b, c = faces.unbind(1)
        faces = torch.cat(
            [torch.stack(f, 1) for f in ((a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca))]
        )
    return points, faces


@dataclass(frozen=True)
class Panels:
    """Flat triangles: corners (T, 3, 3), centres (T, 3), outward normals (T, 3), areas (T,)."""

    corners: Tensor
    centres: Tensor
    normals: Tensor
    areas: Tensor

    @classmethod
    def of(cls, points: Tensor, faces: Tensor) -> "Panels":
        corners = points[faces]
        cross = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        double = cross.norm(dim=1)
        return cls(corners, corners.mean(1), cross / double[:, None], double / 2)


def induced(at: Tensor, panels: Panels) -> tuple[Tensor, Tensor]:
    """Velocity (P, T, 3) at points (P, 3) of panels with unit source strength, and solid angles.

    Exact for flat panels (Hess, Smith 1967), in the form of line integrals over edges and the solid
    angle (van Oosterom, Strackee 1983): (sum_e m_e ln((a + b + l) / (a + b - l)) + n O) / 4 pi,
    m_e: outward normal of an edge within the panel, a, b: distances to its ends, l: its length,
    O: the solid angle (P, T), positive on the side of n; on the panel itself 2 pi.
    """
    r = panels.corners - at[:, None, None]  # (P, T, 3, 3)
    d = r.norm(dim=-1)
    along = panels.corners.roll(-1, 1) - panels.corners
    length = along.norm(dim=-1)
    out = torch.linalg.cross(along / length[..., None], panels.normals[:, None].expand(-1, 3, -1))
    both = d + d.roll(-1, -1)
    log = torch.log((both + length) / (both - length).clamp(min=1e-12))
    a, b, c = r.unbind(2)
    da, db, dc = d.unbind(2)
    up = -(a * torch.linalg.cross(b, c)).sum(-1)
    down = da * db * dc + (a * b).sum(-1) * dc + (b * c).sum(-1) * da + (c * a).sum(-1) * db
    # on the panel: its outer side
    up = torch.where(up.abs() < 1e-12 * (da * db * dc), up.abs(), up)
    angle = 2 * torch.atan2(up, down)
    velocity = torch.einsum("pte,tex->ptx", log, out) + angle[..., None] * panels.normals
    return velocity / (4 * math.pi), angle


class Flow:
    """The flow of unit speed along x around a body; with a ground, over the plane z = 0."""

    def __init__(self, points: Tensor, faces: Tensor, ground: bool = True) -> None:
        self.panels, self.ground = Panels.of(points, faces), ground
        self.wind = torch.tensor([1.0, 0.0, 0.0], dtype=D)
        n = self.panels.normals
        influence = self.influence(self.panels.centres)
        # no flow through any panel
        self.strength = torch.linalg.solve(
            torch.einsum("ptx,px->pt", influence, n), -(n @ self.wind)
        )
        self.on_surface = self.wind + torch.einsum("ptx,t->px", influence, self.strength)
        self.cp = 1 - self.on_surface.square().sum(1)

    def influence(self, at: Tensor) -> Tensor:
        """(P, T, 3): of unit strengths, with those of the mirrored body."""
        found = induced(at, self.panels)[0]
        if self.ground:
            found = found + MIRROR * induced(at * MIRROR, self.panels)[0]
        return found

    def velocity(self, at: Tensor, piece: int = 512) -> Tensor:
        """At points (P, 3) outside of the body."""
        parts = [
            torch.einsum("ptx,t->px", self.influence(p), self.strength) for p in at.split(piece)
        ]
        return self.wind + torch.cat(parts)

    def inside(self, at: Tensor, piece: int = 512) -> Tensor:
        """Whether points (P, 3) are inside of the body: it fills all of their view."""
        parts = [induced(p, self.panels)[1].sum(1) for p in at.split(piece)]
        return torch.cat(parts).abs() > 2 * math.pi


def around(flow: Flow, points: int, seed: int) -> Tensor:
    """Random points outside of the body, in a box of about twice its size."""
    g = torch.Generator().manual_seed(seed)
    low, high = flow.panels.corners.view(-1, 3).aminmax(dim=0)
    middle, half = (low + high) / 2, (high - low) * torch.tensor([0.8, 1.0, 1.0], dtype=D)
    at = middle + half * (2 * torch.rand(4 * points, 3, generator=g, dtype=D) - 1)
    at = at[at[:, 2] > 0.02]
    return at[~flow.inside(at)][:points]


def write(
    flow: Flow, faces: Tensor, points: Tensor, folder: Path, number: int, volume: int
) -> None:
    """One case in DrivAerML's layout. Volume points are small tetrahedra, fields on their cells."""
    import numpy as np
    import pyvista as pv

    case = folder / f"run_{number}"
    case.mkdir(parents=True, exist_ok=True)
    counted = np.concatenate([np.full((len(faces), 1), 3), faces.numpy()], 1)
    surface = pv.PolyData(points.numpy(), counted.ravel())
    surface.save(case / f"drivaer_{number}.stl")
    surface.cell_data["CpMeanTrim"] = flow.cp.numpy().astype("float32")
    surface.cell_data["pMeanTrim"] = (0.5 * flow.cp).numpy().astype("float32")
    surface.save(case / f"boundary_{number}.vtp")
    at = around(flow, volume, number)
    corner = 0.01 * torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=D)
    cells = np.concatenate([np.full((len(at), 1), 4), np.arange(4 * len(at)).reshape(-1, 4)], 1)
    grid = pv.UnstructuredGrid(
        cells.ravel(),
        np.full(len(at), pv.CellType.TETRA),
        (at[:, None] + corner).view(-1, 3).numpy(),
    )
    grid.cell_data["UMeanTrim"] = flow.velocity(at).numpy().astype("float32")
    grid.save(case / f"volume_{number}.vtu")


def generate(folder: Path, bodies: int, level: int, volume: int) -> None:
    """Random bodies; those that are there are kept."""
    for i in range(1, bodies + 1):
        if not (folder / f"run_{i}" / f"volume_{i}.vtu").exists():
            points, faces = Body.random(i).surface(level)
            write(Flow(points, faces), faces, points, folder, i, volume)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bodies", type=int, default=16)
    parser.add_argument("--level", type=int, default=3, help="20 * 4^level triangles")
    parser.add_argument("--volume", type=int, default=1000, help="points around each body")
    options = parser.parse_args()
    generate(options.folder, options.bodies, options.level, options.volume)
