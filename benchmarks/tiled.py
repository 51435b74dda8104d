"""Memory and time of a model in parts on one device (`st.tiled`) beside the plain model.

    OMP_NUM_THREADS=1 python benchmarks/tiled.py [--folder out] [--only unet] [--large] > table.md
    python benchmarks/tiled.py --draw table.md tiled.png
    python benchmarks/tiled.py --only "unet 2048" --disk       what goes to files leaves the cache
    python benchmarks/tiled.py --read [MIB] [--folder out]    how fast files come back

Each case runs in a process of its own on a sample in a file, and the plain model beside it where
it fits into --most MiB. MiB: resident memory that the run needs beyond that of the program with
its model, at most. Inference writes to a file, training makes the gradients of the mean square of
the output. Difference: of outputs or gradients, over the largest; in float32, where plain torch
rounds as well: the last line tells both from gradients in float64.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.paged import files

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from bench_models import fno
from models import UNet, ViT


def block(c_in: int, c_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv3d(c_in, c_out, 3, padding=1), nn.GroupNorm(2, c_out), nn.SiLU())


class UNet3d(nn.Module):
    """Two levels of 3 x 3 x 3 convolutions with group norm, and a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.inner = block(1, width), block(2 * width, 2 * width)
        self.down = nn.Conv3d(width, 2 * width, 2, stride=2)
        self.up = nn.ConvTranspose3d(2 * width, width, 2, stride=2)
        self.last = nn.Sequential(block(2 * width, width), nn.Conv3d(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.cat([x, self.up(self.inner(self.down(x)))], 1))


# calls of the model, of whole inputs and outputs; in a step a part reads and writes its own rows
CALL, LEARN = "call", "learn"
# model: (how it is made for an edge, dims beside batch and channel)
MODELS = {
    "unet": (lambda size: UNet(1, 1, width=4), 2),
    # trained by the statistics that batch norm has kept, which need no other part
    "frozen": (lambda size: UNet(1, 1, width=4), 2),
    "unet3d": (lambda size: UNet3d(2), 3),
    "vit": (lambda size: ViT((size, size), 16, 1, 1, width=64), 2),
    "fno": (lambda size: fno(), 2),
}
# model, edge, what (False: inference in a step; True: training in one), parts (0: plain), MiB
CASES = [
    ("unet", 2048, False, 0, 0), ("unet", 2048, False, 16, 64), ("unet", 2048, CALL, 16, 64),
    ("unet", 2048, True, 0, 0), ("unet", 2048, True, 16, 128),
    ("vit", 1024, True, 0, 0), ("vit", 1024, True, 4, 64),
    ("fno", 1024, True, 0, 0), ("fno", 1024, True, 8, 64),
    ("unet3d", 128, True, 0, 0), ("unet3d", 128, True, 16, 64),
    ("frozen", 2048, True, 0, 0), ("frozen", 2048, True, 16, 192), ("frozen", 2048, LEARN, 16, 192),
]  # fmt: skip
LARGE = [
    ("unet", 8192, False, 0, 0), ("unet", 8192, False, 32, 256), ("unet", 8192, CALL, 32, 256),
    ("unet", 16384, False, 0, 0), ("unet", 16384, False, 64, 512), ("unet", 16384, CALL, 64, 512),
    ("unet", 4096, True, 0, 0), ("unet", 4096, True, 32, 256),
    ("unet3d", 256, True, 0, 0), ("unet3d", 256, True, 32, 512),
    ("unet3d", 512, False, 0, 0), ("unet3d", 512, False, 128, 256),
    ("vit", 2048, True, 0, 0), ("vit", 2048, True, 8, 64),
    ("fno", 2048, True, 0, 0), ("fno", 2048, True, 16, 128),
    ("frozen", 4096, True, 0, 0), ("frozen", 4096, True, 16, 640), ("frozen", 4096, LEARN, 16, 640),
]  # fmt: skip


def one(
    model: str, edge: int, what: bool | str, parts: int, mib: int, folder: Path
) -> dict[str, Any]:
    """Run one case in this process."""
    train = what in (True, LEARN)
    make, ndim = MODELS[model]
    torch.manual_seed(0)
    net = make(edge).train(train and model != "frozen")
    channels = 4 if model == "fno" else 1
    shape = (1, channels, *[edge] * ndim)
    source, target = folder / f"{model}_{edge}.raw", folder / f"{model}_{edge}_{parts}.raw"
    _made(source, shape)
    target.write_bytes(b"")
    os.truncate(target, 4 * edge**ndim)
    _warm(make(128), channels, ndim)
    Path("/proc/self/clear_refs").write_text("5")
    before, begin, cpu = _status("VmRSS"), time.perf_counter(), time.process_time()
    if what == LEARN:
        # as if no file could stay in the system's cache, where parts would meet
        files._free = lambda: 0
    run = st.tiled(net, parts, dim=2, memory=mib * 2**20, spill=folder) if parts else None
    if run is None or what in (CALL, LEARN):
        with torch.set_grad_enabled(train):
            y = net(_rows(source, shape, 0, edge)) if run is None else run(_mapped(source, shape))
        if train:
            y.square().mean().backward()
        else:
            _write(y, target, 0)
    else:
        with torch.set_grad_enabled(train):
            run.run(lambda net, mesh: _step(net, mesh, source, shape, target, train))
    found = dict(
        MiB=_status("VmHWM") - before,
        seconds=time.perf_counter() - begin,
        cpu=time.process_time() - cpu,
    )
    if train:
        grads = [p.grad for p in net.parameters()]
        torch.save(grads, folder / f"{model}_{edge}_{parts}.pt")
    if run:
        found |= dict(spilled=run.paging.spilled / 2**20, most=run.paging.most / 2**20)
    return found


def read(mib: int, folder: Path) -> None:
    """Seconds in which memory in a file comes back: page by page, asked for ahead, and what is hot.

    From the disk (pages that were written are dropped from the system's cache first) and from the
    cache; the least and the most of five.
    """
    n = mib * 2**20
    print("| MiB | from | page by page, s | asked for ahead, s |")
    print("|---|---|---|---|")
    with tempfile.NamedTemporaryFile(dir=folder) as f:
        x = torch.UntypedStorage.from_file(f.name, True, n)
        torch.ByteTensor(x).random_(0, 256)
        os.fsync(f.fileno())

        def once(disk: bool, ahead: bool) -> float:
            files.let_go(x)
            if disk:
                os.posix_fadvise(f.fileno(), 0, n, os.POSIX_FADV_DONTNEED)
            begin = time.perf_counter()
            if ahead:
                files.ask_for(x)
            torch.ByteTensor(x).view(torch.int64).sum()
            return time.perf_counter() - begin

        for disk in (True, False):
            found = [sorted(once(disk, ahead) for _ in range(5)) for ahead in (False, True)]
            cells = " | ".join(f"{t[0]:.3f} to {t[-1]:.3f}" for t in found)
            print(f"| {mib} | {'the disk' if disk else 'the cache'} | {cells} |", flush=True)
        torch.ByteTensor(x).view(torch.int64).sum()
        begin = time.perf_counter()
        torch.ByteTensor(x).view(torch.int64).sum()
        print(f"\nIn memory: {time.perf_counter() - begin:.3f} s.")


def _to_disk() -> None:
    """Let what goes to a file be written to the disk, and leave the system's cache."""
    libc, let_go = files._libc(), files.let_go
    libc.msync.argtypes = libc.madvise.argtypes

    def written(storage: torch.UntypedStorage) -> None:
        libc.msync(storage.data_ptr(), storage.nbytes(), 4)  # MS_SYNC
        libc.madvise(storage.data_ptr(), storage.nbytes(), 21)  # MADV_PAGEOUT
        let_go(storage)

    files.let_go = written


def _warm(net: nn.Module, channels: int, ndim: int) -> None:
    """What any program with the model has in memory."""
    x = torch.randn(1, channels, *[32 if ndim == 3 else 128] * ndim)
    net(x).square().mean().backward()
    st.simulate(2, lambda: None)


def _step(
    net: nn.Module,
    mesh: DeviceMesh,
    source: Path,
    shape: tuple[int, ...],
    target: Path,
    train: bool,
) -> None:
    """On a rank: its rows of the source through the model, to gradients or rows of the target."""
    spec = st.Spec.of(mesh, [Shard(2)], shape)
    local = _rows(source, shape, *spec.spans[2])
    x = st.ShardTensor.from_local(local, mesh, [Shard(2)], sizes={2: spec.dims[2].sizes})
    del local
    y = net(x)
    del x
    if train:
        loss = y.square().mean()
        del y
        loss.backward()
    else:
        _write(y.to_local(), target, y._spec.spans[2][0])


def _made(path: Path, shape: tuple[int, ...]) -> None:
    """Random numbers in a file, made slab by slab."""
    if path.exists():
        return
    random = np.random.default_rng(1)
    with path.open("wb") as f:
        for _ in range(shape[1] * shape[2]):
            random.standard_normal(shape[3:], np.float32).tofile(f)


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A sample in a file, of which memory has what is read."""
    return torch.from_file(str(path), True, math.prod(shape)).view(shape)


def _rows(path: Path, shape: tuple[int, ...], a: int, b: int) -> Tensor:
    """Rows a to b of a sample in a file; a mapped file would count as this process's memory."""
    row = math.prod(shape[3:])
    made = torch.empty(1, shape[1], b - a, *shape[3:])
    for c in range(shape[1]):
        at = 4 * (c * shape[2] + a) * row
        made[0, c] = torch.from_numpy(
            np.fromfile(path, np.float32, (b - a) * row, offset=at).reshape(made[0, c].shape)
        )
    return made


def _write(y: Tensor, path: Path, row: int) -> None:
    """Write rows of an output of one channel, from the given one on."""
    with path.open("r+b") as f:
        f.seek(4 * row * math.prod(y.shape[3:]))
        y.numpy().tofile(f)


def _status(what: str) -> float:
    """MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(what)).split()[1]) / 1024


def _difference(model: str, edge: int, train: bool, parts: int, folder: Path) -> float:
    """Of a case from the plain one, over the largest value."""
    if train:
        pairs = zip(
            *(torch.load(folder / f"{model}_{edge}_{n}.pt") for n in (0, parts)), strict=True
        )
        known = [(float((a - b).abs().max()), float(a.abs().max())) for a, b in pairs]
        # that of a bias in front of a norm is nothing but rounding
        return max(gap for gap, _ in known) / max(most for _, most in known)
    a, b = (np.memmap(folder / f"{model}_{edge}_{n}.raw", np.float32, "r") for n in (0, parts))
    slabs = [slice(i, i + 2**22) for i in range(0, len(a), 2**22)]
    most = max(float(np.abs(a[s]).max()) for s in slabs)
    return max(float(np.abs(a[s] - b[s]).max()) for s in slabs) / most


def exactness(folder: Path, edge: int = 1024) -> str:
    """How far gradients of a U-Net in float32 are from those in float64, plain and in parts."""
    torch.manual_seed(0)
    net, x = UNet(1, 1, width=4), torch.randn(1, 1, edge, edge)
    exact = copy.deepcopy(net).double()
    exact(x.double()).square().mean().backward()
    want = [p.grad for p in exact.parameters()]
    most = max(float(w.abs().max()) for w in want)
    found = []
    for call in (net, st.tiled(net, 8, dim=2, memory=2**26, spill=folder)):
        net.zero_grad()
        call(x).square().mean().backward()
        gaps = (
            float((p.grad - w).abs().max()) for p, w in zip(net.parameters(), want, strict=True)
        )
        found.append(max(gaps) / most)
    return (
        f"Gradients of unet {edge}^2 against float64: plain {found[0]:.0e}, 8 parts {found[1]:.0e}."
    )


def draw(table: Path, picture: Path) -> None:
    """Memory of the cases of a printed table, plain and in parts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [[c.strip() for c in r.strip("| ").split("|")] for r in table.read_text().splitlines()]
    pairs: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if len(row) > 4 and row[0].split()[0] in MODELS:
            pairs.setdefault(f"{row[0]}\n{row[1]}", {})[
                "plain" if row[2] == "plain" else "parts"
            ] = row
    figure, axes = plt.subplots(figsize=(7.5, 0.7 * len(pairs) + 1))
    for i, both in enumerate(pairs.values()):
        for shift, kind, color in ((-0.2, "plain", "#b9c4d0"), (0.2, "parts", "#3b6ea8")):
            row = both.get(kind)
            if row is None:
                continue
            known = row[4].replace(".", "").isdigit()
            mib = float(row[4]) if known else 0.0
            axes.barh(i + shift, mib, 0.38, color=color)
            text = f" {mib:,.0f} MiB, {row[6]} CPU s" if known else f" {row[4]}"
            text += f", {row[2]} parts" if kind == "parts" else ""
            axes.text(mib, i + shift, text, va="center", fontsize=8)
    axes.set_yticks(range(len(pairs)), pairs, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.45 * axes.get_xlim()[1])
    axes.set_xlabel("memory of the run, MiB: plain (grey), in parts on one device (blue)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("out/tiled"))
    parser.add_argument("--only", default="", help="unet3d, or unet3d 512")
    parser.add_argument("--large", action="store_true", help="sizes that take minutes")
    parser.add_argument("--disk", action="store_true", help="no cache of the system for files")
    parser.add_argument("--most", type=int, default=12000, help="MiB that the plain model may take")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--read", nargs="?", type=int, const=256, metavar="MIB")
    parser.add_argument("--draw", nargs=2, type=Path, metavar=("TABLE", "PICTURE"))
    options = parser.parse_args()
    if options.draw:
        draw(*options.draw)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.read:
        read(options.read, options.folder)
        return
    if options.one:
        if options.disk:
            _to_disk()
        print(json.dumps(one(*json.loads(options.one), options.folder)))
        return
    print("| model | | parts | budget MiB | MiB | s | CPU s | spilled MiB | difference |")
    print("|---|---|---|---|---|---|---|---|---|")
    plain: set[tuple[Any, ...]] = set()
    for case in LARGE if options.large else CASES:
        model, edge, what, parts, mib = case
        train = what in (True, LEARN)
        if not f"{model} {edge}".startswith(options.only):
            continue
        found = _alone(case, options)
        kind = ("training" if train else "inference") + " in a call" * (what in (CALL, LEARN))
        name = f"| {model} {edge}^{MODELS[model][1]} | {kind} | {parts or 'plain'} | {mib or ''} |"
        if isinstance(found, str):
            print(f"{name} {found} | | | | |", flush=True)
            continue
        if parts == 0:
            plain.add((model, edge, train))
        known = parts and (model, edge, train) in plain
        gap = f"{_difference(model, edge, train, parts, options.folder):.0e}" if known else ""
        print(
            f"{name} {found['MiB']:.0f} | {found['seconds']:.1f} | {found['cpu']:.1f} | "
            f"{found['spilled']:.0f} |" if parts else
            f"{name} {found['MiB']:.0f} | {found['seconds']:.1f} | {found['cpu']:.1f} | |",
            f"{gap} |", flush=True,
        )  # fmt: skip
    print(f"\n{exactness(options.folder)}")


def _alone(case: tuple[Any, ...], options: argparse.Namespace) -> dict[str, Any] | str:
    """A case in a process of its own; or what ended it."""
    limit = options.most * 2**20

    def limited() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    command = [sys.executable, "-W", "ignore", __file__, "--folder", str(options.folder)]
    command += ["--disk"] * options.disk
    done = subprocess.run(
        [*command, "--one", json.dumps(case)], capture_output=True, text=True,
        preexec_fn=limited, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"signal {-done.returncode}"])[-1]
        return "out of memory" if "memory" in last else last
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
