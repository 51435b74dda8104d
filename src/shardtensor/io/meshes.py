"""Meshes and point clouds of simulations: VTK, STL and the like, and published layouts of them.

A VTK file cannot be read in part. `convert` reads one once and stores its points along a
space-filling curve as plain arrays, of which each rank then reads only its rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh

from ..later import dt
from ..ops.points import hilbert_order
from ..shares import balanced
from ..spec import Spec
from ..tensor import ShardTensor
from .block import placed
from .foreign import named, plain_name, whole_ply
from .where import several

Fields = dict[str, np.ndarray]


@dataclass(frozen=True)
class Mesh:
    """A surface or volume mesh, arrays of NumPy.

    points (N, 3). centres (M, 3) of cells; sizes (M,): areas of a surface's cells, volumes of a
    volume's. Only for a surface: normals (M, 3), unit vectors of its cells; triangles (T, 3),
    numbers of points, its polygons cut into triangles.
    point_fields, cell_fields: (N, ...) and (M, ...) by name.
    """

    points: np.ndarray
    centres: np.ndarray
    sizes: np.ndarray
    normals: np.ndarray | None
    triangles: np.ndarray | None
    point_fields: Fields
    cell_fields: Fields


def read_mesh(path: str | os.PathLike[str]) -> Mesh:
    """A .vtp, .vtu, .vtk, .stl, .ply or .obj file, whole, by pyvista (extra `mesh`).

    A .vtk file of surface cells only is a surface, whatever kind of grid it was written as. Raises
    FileNotFoundError, and ValueError that names the file for one without cells, one that is cut or
    damaged, and other kinds of files, some of which lead to further ones; ImportError without the
    extra.
    """
    try:
        import pyvista
    except ImportError as e:
        raise ImportError('meshes need pyvista: pip install "shardtensor[mesh]"') from e
    if not Path(path).exists():
        raise FileNotFoundError(path)
    if Path(path).suffix.lower() not in KINDS:
        raise ValueError(f"{path}: not one of {', '.join(KINDS)}")
    if Path(path).suffix.lower() == ".ply":
        whole_ply(Path(path))
    with named(path), pyvista.VtkErrorCatcher(send_to_logging=False) as seen:
        grid = pyvista.read(str(path))
    # VTK gives what it has: for a file that ends too early, whatever was in memory
    said = [*seen.events, *getattr(seen, "warning_events", [])]
    wrong = [" ".join(str(e).split()) for e in said if "rror" in str(e)]
    if wrong:
        raise ValueError(f"{path} cannot be read: {wrong[0][:300]}")
    _check(grid, path)
    if not isinstance(grid, pyvista.PolyData):
        grid = grid.cast_to_unstructured_grid()
        dims = {2 if t in _FLAT else 3 for t in grid.celltypes.tolist()}
        if dims == {2}:
            fields = _arrays(grid.point_data), _arrays(grid.cell_data)
            faces = [np.asarray(c.point_ids) for c in grid.cell]
            counted = np.concatenate([np.r_[len(f), f] for f in faces])
            return _surface(pyvista.PolyData(np.asarray(grid.points), counted), *fields)
    flat = isinstance(grid, pyvista.PolyData)
    if not (len(grid.faces) if flat else grid.n_cells):
        raise ValueError(f"{path}: a mesh without cells")
    fields = _arrays(grid.point_data), _arrays(grid.cell_data)
    if flat:
        return _surface(grid, *fields)
    sized = grid.compute_cell_sizes(length=False, area=False)
    return Mesh(
        np.asarray(grid.points), np.asarray(grid.cell_centers().points),
        np.asarray(sized["Volume"]), None, None, *fields,
    )  # fmt: skip


KINDS = (".vtp", ".vtu", ".vtk", ".stl", ".ply", ".obj")


def _check(grid: Any, path: Any) -> None:
    """Raises ValueError for what VTK would read beyond its memory for, or compute NaN from."""
    import pyvista

    if not isinstance(grid, pyvista.DataSet):
        raise ValueError(f"{path}: a {type(grid).__name__} is no mesh")
    if not np.isfinite(grid.points).all():
        raise ValueError(f"{path}: points that are not finite")
    if isinstance(grid, pyvista.PolyData):
        faces = [grid.GetPolys(), grid.GetStrips()]
        cells = [(grid.GetVerts(), 1), (grid.GetLines(), 1), *((f, 3) for f in faces)]
    else:
        known = isinstance(grid, pyvista.UnstructuredGrid)
        cells = [(grid.GetCells(), 1)] if known else []
    for each, least in cells:
        ids = np.asarray(pyvista.convert_array(each.GetConnectivityArray()))
        ends = np.asarray(pyvista.convert_array(each.GetOffsetsArray()))
        if ids.size and not 0 <= ids.min() <= ids.max() < grid.n_points:
            raise ValueError(f"{path}: cells of points that are not there (of {grid.n_points})")
        if ends.size and (ends[0] != 0 or ends[-1] != ids.size or (np.diff(ends) < least).any()):
            raise ValueError(f"{path}: cells without points")
    for data, n in ((grid.point_data, grid.n_points), (grid.cell_data, grid.n_cells)):
        for name, values in _arrays(data).items():
            if len(values) != n:
                raise ValueError(f"{path}: {name} has {len(values)} values for {n}")


# VTK's numbers of the cell types triangle, strip, polygon, pixel, quad
_FLAT = {5, 6, 7, 8, 9}


def _surface(grid: Any, point_fields: Fields, cell_fields: Fields) -> Mesh:
    sized = grid.compute_cell_sizes(length=False, volume=False)
    triangles = grid.triangulate().regular_faces
    normals = grid.compute_normals(
        point_normals=False, consistent_normals=False, auto_orient_normals=False
    ).cell_data["Normals"]
    return Mesh(
        np.asarray(grid.points), np.asarray(grid.cell_centers().points), np.asarray(sized["Area"]),
        np.asarray(normals), np.asarray(triangles), point_fields, cell_fields,
    )  # fmt: skip


def _arrays(data: Any) -> Fields:
    return {name: np.asarray(data[name]) for name in data.keys()}  # noqa: SIM118


# published layouts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Where a dataset keeps its cases. surface, volume: glob patterns under its root folder."""

    surface: str
    volume: str


# DrivAerML (Ashton et al. 2024, arXiv 2408.11969): boundary_i.vtp has CpMeanTrim, pMeanTrim and
# wallShearStressMeanTrim, volume_i.vtu UMeanTrim, pMeanTrim and more, on cells.
# AirfRANS (Bonnet et al. 2022, arXiv 2212.07564): U, p, nut, implicit_distance on points.
# ShapeNet-Car (Umetani, Bickel 2018): pressure on points of quads, velocity on points of hexes.
LAYOUTS = {
    "drivaerml": Layout("run_*/boundary_*.vtp", "run_*/volume_*.vtu"),
    "airfrans": Layout("*/*_aerofoil.vtp", "*/*_internal.vtu"),
    "shapenet-car": Layout("param*/*/quadpress_smpl.vtk", "param*/*/hexvelo_smpl.vtk"),
}


def cases(root: str | os.PathLike[str], layout: str | Layout) -> list[dict[str, Path]]:
    """{"folder", "surface", "volume"} of every case under root, in order of their names.

    Nothing is sent. A file that is missing is missing from its case. Raises ValueError for an
    unknown layout and for a folder without cases.
    """
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise ValueError(f"layout {layout!r}; there are {', '.join(LAYOUTS)}")
        layout = LAYOUTS[layout]
    found: dict[Path, dict[str, Path]] = {}
    for kind in ("surface", "volume"):
        for path in Path(root).glob(getattr(layout, kind)):
            found.setdefault(path.parent, {"folder": path.parent})[kind] = path
    if not found:
        raise ValueError(f"{root}: no {layout.surface} and no {layout.volume}")
    return [found[folder] for folder in sorted(found, key=_by_number)]


def _by_number(folder: Path) -> tuple[Any, ...]:
    """run_2 before run_10."""
    head = folder.name.rstrip("0123456789")
    tail = folder.name[len(head) :]
    return str(folder.parent), head, int(tail or -1), folder.name


# points -------------------------------------------------------------------------------------------


def convert(
    mesh: Mesh | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    on: str = "cells",
    fields: Sequence[str] | None = None,
    rename: Mapping[str, str] | None = None,
) -> Path:
    """Store a mesh's cells or points as arrays that can be read in part; returns the folder.

    on: "cells" (their centres, sizes, normals and fields) or "points". fields: default all. rename:
    fields to the names of arrays. Rows are ordered along Hilbert's curve, so that neighbours in
    space lie on the same rank. Each array is a .npy file, float32; integers that float32 does not
    hold stay integers. One rank calls this. The folder appears when it is complete; one that is
    there is kept. Raises ValueError for numbers that are too large, text, and names that are no
    names of files, ImportError that names the extra where `read_mesh` does.
    """

    folder = Path(folder)
    if (folder / "info.json").exists():
        return folder
    if not isinstance(mesh, Mesh):
        mesh = read_mesh(mesh)
    if on not in ("cells", "points"):
        raise ValueError(f"on is {on!r}; expected 'cells' or 'points'")
    stored = mesh.cell_fields if on == "cells" else mesh.point_fields
    missing = sorted(set(several(fields or (), "fields")) - set(stored))
    if missing:
        raise ValueError(f"no fields {missing} on {on}; there are {sorted(stored)}")
    arrays: Fields = {"coordinates": mesh.centres if on == "cells" else mesh.points}
    if on == "cells":
        arrays["sizes"] = mesh.sizes
        if mesh.normals is not None:
            arrays["normals"] = mesh.normals
    for field in stored if fields is None else fields:
        name = (rename or {}).get(field, field)
        if not plain_name(name) or name in arrays or stored[field].dtype.kind not in "biuf":
            raise ValueError(
                f"field {field!r} of {stored[field].dtype} cannot be stored as {name!r}: give "
                f"numbers and names of files (rename={{{field!r}: ...}}), none of them twice or "
                f"{', '.join(arrays)}; or choose others (fields=...)"
            )
        arrays[name] = stored[field]
    order = hilbert_order(torch.from_numpy(np.ascontiguousarray(arrays["coordinates"]))).numpy()
    part = folder.with_name(f"{folder.name}.part{os.getpid()}")
    part.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        np.save(part / f"{name}.npy", _stored(name, values[order]))
    info = {"on": on, "rows": len(order), "arrays": list(arrays)}
    (part / "info.json").write_text(json.dumps(info))
    try:
        part.rename(folder)
    except OSError:
        # another process was first
        if not (folder / "info.json").exists():
            raise
    return folder


def _stored(name: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind in "iu" and values.size and np.abs(values.astype(float)).max() > 2**24:
        return np.ascontiguousarray(values)
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(values, dtype=np.float32)
    if np.isinf(found).any() and not np.isinf(values).sum() == np.isinf(found).sum():
        raise ValueError(f"{name}: values to {np.abs(values).max():.3g}, more than float32 holds")
    return found


class Points:
    """Samples of folders that `convert` made: a dict of ShardTensors, rows sharded over the mesh.

    axes: the mesh axes that shard the rows, by name or number (default all). names: the arrays
    (default all of the first folder). most: at most so many rows, drawn by seed + the number of the
    sample, the same on all ranks; they keep their order. shares: of the rows for each rank, for
    instance its relative speed. Each rank reads its rows only; nothing is communicated. Raises
    ValueError for arrays that the first folder has not.
    """

    bytes_read: int
    folders: list[Path]
    mesh: DeviceMesh
    most: int | None
    names: list[str]
    placements: list[dt.Placement]
    seed: int
    shares: Sequence[float] | None

    def __init__(
        self,
        folders: Sequence[str | os.PathLike[str]],
        mesh: DeviceMesh,
        *,
        axes: Sequence[int | str] | None = None,
        names: Sequence[str] | None = None,
        most: int | None = None,
        seed: int = 0,
        shares: Sequence[float] | None = None,
    ) -> None:
        self.folders = [Path(f) for f in several(folders, "folders")]
        if not self.folders:
            raise ValueError("Points of no folders: give those that io.convert made")
        if most is not None and index(most) < 1:
            raise ValueError(f"most {most}: 1 row or more, or None for all")
        self.mesh, self.most, self.seed, self.shares = mesh, most, seed, shares
        known = mesh.mesh_dim_names or ()
        chosen = range(mesh.ndim) if axes is None else axes
        on = {known.index(a) if isinstance(a, str) else a for a in chosen}
        # the other axes repeat the points
        self.placements = [dt.Shard(0) if a in on else dt.Replicate() for a in range(mesh.ndim)]
        info = self._info(0)
        self.names = list(info["arrays"] if names is None else several(names, "names"))
        missing = sorted(set(map(str, self.names)) - set(info["arrays"]))
        if missing:
            raise ValueError(f"{self.folders[0]}: no arrays {missing}; it has {info['arrays']}")
        self.bytes_read = 0

    def _info(self, i: int) -> dict[str, Any]:
        path = self.folders[i] / "info.json"
        with named(path):
            found: dict[str, Any] = json.loads(path.read_text())
            rows, names = found["rows"], found["arrays"]
            if type(rows) is not int or rows < 0 or not all(plain_name(n) for n in names):
                raise ValueError(
                    f"{rows} rows of {names}, which are not numbers and names of files"
                )
        return found

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, i: int) -> dict[str, ShardTensor]:
        rows = int(self._info(i)["rows"])
        n = rows if self.most is None else min(rows, self.most)
        sizes = (
            None if self.shares is None else {0: balanced(n, len(self.shares), speeds=self.shares)}
        )
        spec = Spec.of(self.mesh, self.placements, (n,), sizes)
        a, b = spec.offset[0], spec.offset[0] + spec.local_shape[0]
        mine: Any = slice(a, b)
        if n < rows:
            draw = torch.Generator().manual_seed(self.seed + i)
            mine = torch.randperm(rows, generator=draw)[:n].sort().values[a:b].numpy()
        return {
            name: self._read(self.folders[i] / f"{name}.npy", rows, mine, spec)
            for name in self.names
        }

    def _read(self, path: Path, n: int, rows: Any, spec: Spec) -> ShardTensor:
        with named(path):
            stored = np.load(path, mmap_mode="r", allow_pickle=False)
            if stored.ndim < 1 or len(stored) != n or stored.dtype.kind not in "biuf":
                raise ValueError(f"it is {stored.dtype} of {stored.shape}, info.json has {n} rows")
            local = torch.from_numpy(np.array(stored[rows]))
        self.bytes_read += local.numel() * local.element_size()
        full = Spec.of(self.mesh, self.placements, (spec.shape[0], *local.shape[1:]), spec.sizes)
        return placed(local, full)
