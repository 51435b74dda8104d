"""How a ViT scales with ranks and resolution: latency, training memory, ring attention.

    python examples/vit_scaling.py                       # 1, 2, 4 processes; 2 to 64 rehearsed
    torchrun --nproc-per-node 8 examples/vit_scaling.py  # measures these ranks only, on their GPUs
    python examples/vit_scaling.py --paper               # the paper's model, planned: no device

Measured: the slowest of as many processes (more than cores, marked *, share them). Rehearsed: one
rank of many alone, its messages on the links of an assumed network (shardtensor.rehearse). Writes
out/vit_scaling.csv, to which runs under torchrun add their rows, and out/vit_scaling.png.

The setting is that of Figs. 2 to 4 of arXiv 2605.11111.
"""

import argparse
import csv
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard
from vit import ViT

import shardtensor as st
from shardtensor.ranks.measure import peak_bytes
from shardtensor.ranks.rehearse import DGX_H100
from shardtensor.ranks.workers import Pool
from shardtensor.train.launch import place

CORES = len(os.sched_getaffinity(0))
NETWORK = "an assumed NVLink and InfiniBand network (shardtensor.rehearse.DGX_H100)"


@dataclass(frozen=True)
class Row:
    """One point. size: edge of the field, or tokens of a rank's share times ranks. ms; MiB; MB."""

    what: str
    mode: str
    size: int
    ranks: int
    how: str
    ms: float
    peak: float
    sent: float


@dataclass(frozen=True)
class Job:
    """What to run: a ViT on a field of `dims` dims, or attention over `size` tokens (dims 0)."""

    dims: int
    size: int
    train: bool
    width: int = 96
    depth: int = 4

    @property
    def what(self) -> str:
        return f"ViT {self.dims}-D" if self.dims else "ring attention"

    def step(self, mesh: DeviceMesh | None, device: torch.device) -> Callable[[], object]:
        """One forward pass, or one training step. mesh: along which the first dim is sharded."""
        torch.manual_seed(0)
        if not self.dims:
            q = part((1, 4, self.size, 32), 2, mesh, device)
            return lambda: attend(q, self.train)
        shape = (self.size,) * self.dims
        model = ViT(shape, width=self.width, depth=self.depth).to(device)
        if mesh is not None:
            st.parallelize(model, mesh)
        x = part((1, 1, *shape), 2, mesh, device)
        if not self.train:
            return torch.no_grad()(lambda: model(x))

        def step() -> None:
            model(x).square().mean().backward()
            model.zero_grad(set_to_none=True)

        return step


def part(shape: tuple[int, ...], dim: int, mesh: DeviceMesh | None, device: torch.device) -> Tensor:
    """Random numbers: all of them, or this rank's shard of a tensor that is nowhere whole."""
    if mesh is None:
        return torch.randn(shape, device=device)
    like = torch.zeros(1, device=device).expand(shape)
    return torch.randn_like(st.distribute_tensor(like, mesh, [Shard(dim)], src_data_rank=None))


def attend(q: Tensor, train: bool) -> None:
    """Attention of a tensor with itself by the ring; forward, or forward and backward."""
    q = q.detach().requires_grad_(train)
    with st.attention.strategy("ring"):
        out = F.scaled_dot_product_attention(q, q, q)
        if train:
            out.sum().backward()


def measure(job: Job, repeats: int = 3) -> tuple[float, int, int]:
    """(seconds, peak bytes, bytes sent) of this rank."""
    n, cuda = dist.get_world_size(), torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    mesh = init_device_mesh(device.type, (n,)) if n > 1 else None
    step = job.step(mesh, device)
    step()
    with st.trace() as t:
        step()
    times = []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return median(times), peak_bytes(step, device), t.bytes


def measured(job: Job, found: list[tuple[float, int, int]]) -> Row:
    """Of all ranks the slowest and the largest."""
    seconds, peak, sent = (max(of) for of in zip(*found, strict=True))
    n = len(found)
    how = "measured*" if n > CORES and not torch.cuda.is_available() else "measured"
    mode = "training" if job.train else "inference"
    return Row(job.what, mode, job.size, n, how, 1e3 * seconds, peak / 2**20, sent / 1e6)


def rehearsed(job: Job, n: int) -> Row:
    """One rank in the middle; time with no communication hidden."""

    def prepare() -> Callable[[], object]:
        return job.step(init_device_mesh("cpu", (n,)), torch.device("cpu"))

    one = st.rehearse(prepare, n, n // 2, repeats=3)
    seconds, sent = one.projected(DGX_H100)[1], sum(s.bytes for s in one.sent)
    mode = "training" if job.train else "inference"
    return Row(
        job.what, mode, job.size, n, "rehearsed", 1e3 * seconds, one.peak / 2**20, sent / 1e6
    )


def jobs(scale: float) -> dict[str, list[Job]]:
    """Of each panel. scale: of the edges; 1 is for two CPU cores."""
    edge = lambda n: max(16, int(n * scale) // 16 * 16)  # noqa: E731
    return {
        "latency": [Job(d, edge(n), t) for d, n in ((2, 320), (3, 80)) for t in (False, True)],
        "memory": [Job(2, edge(n), True) for n in (128, 192, 256, 384)],
        "ring": [Job(0, 16 * edge(n), t) for n in (64, 128, 256) for t in (False, True)],
    }


def run(scale: float, ranks: list[int], more: list[int]) -> list[Row]:
    """All rows: measured on these numbers of processes, rehearsed for more."""
    every = list(dict.fromkeys(j for of in jobs(scale).values() for j in of))
    rows = []
    for n in ranks:
        pool = Pool(n)
        for job in every:
            rows.append(told(measured(job, pool.run(measure, job))))
        pool.close()
    for n in more:
        rows += [told(rehearsed(j, n)) for j in every if rows_of(j) >= n]
    return rows


def rows_of(job: Job) -> int:
    """Into how many shards the job can be cut."""
    return job.size // 8 if job.dims else job.size


def told(row: Row) -> Row:
    print(f"{row.what:15} {row.mode:9} {row.size:6} {row.ranks:3} ranks {row.how:10} "
          f"{row.ms:9.1f} ms {row.peak:8.1f} MiB {row.sent:8.2f} MB sent", flush=True)  # fmt: skip
    return row


def write(rows: list[Row], path: Path, mode: str) -> None:
    with path.open(mode, newline="") as f:
        w = csv.DictWriter(f, [x.name for x in fields(Row)])
        if mode == "w":
            w.writeheader()
        w.writerows(map(asdict, rows))


def draw(rows: list[Row], scale: float, path: Path) -> None:
    """Latency against ranks, training memory against resolution, ring attention."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (latency, memory, ring) = plt.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
    panels = jobs(scale)

    def lines(ax, chosen, x, y, label, of):
        """Two lines for each value of `of`: measured, with filled marks, and rehearsed."""
        for i, key in enumerate(sorted({of(r) for r in chosen})):
            name = label(key)
            for how, style in (
                ("measured", dict(ls="-")),
                ("rehearsed", dict(ls="--", mfc="white")),
            ):
                mine = sorted(
                    (x(r), y(r)) for r in chosen if of(r) == key and r.how.startswith(how)
                )
                if mine:
                    ax.plot(*zip(*mine, strict=True), marker="o", ms=4.5, lw=1, color=f"C{i}",
                            label=name, **style)  # fmt: skip
                    name = None
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7)

    keys = {(j.what, "training" if j.train else "inference", j.size) for j in panels["latency"]}
    chosen = [r for r in rows if (r.what, r.mode, r.size) in keys]
    lines(latency, chosen, lambda r: r.ranks, lambda r: r.ms, lambda k: f"{k[0]} {k[1]}",
          lambda r: (r.what, r.mode))  # fmt: skip
    latency.set(title="Strong scaling", xlabel=f"ranks (measured over {CORES} share {CORES} cores)",
                ylabel="ms a step")  # fmt: skip
    sizes = {j.size for j in panels["memory"]}
    chosen = [r for r in rows if r.what == "ViT 2-D" and r.mode == "training" and r.size in sizes
              and (r.how != "rehearsed" or r.ranks > 4)]  # fmt: skip
    lines(memory, chosen, lambda r: r.size, lambda r: r.peak, lambda k: f"{k} ranks",
          lambda r: r.ranks)  # fmt: skip
    memory.set(
        title="Training memory", xlabel="edge of the field (points)", ylabel="peak of a rank (MiB)"
    )
    chosen = [r for r in rows if r.what == "ring attention" and r.mode == "training"]
    lines(ring, chosen, lambda r: r.size, lambda r: r.ms, lambda k: f"{k} ranks", lambda r: r.ranks)
    ring.set(title="Ring attention, both ways", xlabel="tokens", ylabel="ms")
    fig.suptitle(
        "filled marks: measured; open marks: rehearsed, one rank alone with a core of its own",
        fontsize=9,
    )
    fig.savefig(path, dpi=110)
    plt.close(fig)


def paper() -> None:
    """Memory of the paper's ViT (patch 8, width 768, depth 16) by planning, beside what it says."""
    from shardtensor.plan.estimate import H200, Layout, Task, estimate
    from shardtensor.train.options import Options

    published = {(2048, 1): 51.4, (2048, 8): 7.6}
    print("edge  ranks dtype  inference GB  training GB  published GB")
    for edge in (1024, 2048, 4096):
        make = partial(ViT, (edge, edge), 8, 3, 3, 768, 16, 12)
        for n in (1, 2, 4, 8, 16, 64):
            for precision in (None, "bf16"):
                layout = Layout(1, (2,), (n,), Options(precision=precision))
                peaks = [
                    estimate(
                        Task(make, [(1, 3, edge, edge)], dims=(2,), train=t), layout, H200
                    ).peak
                    for t in (False, True)
                ]
                said = published.get((edge, n), "") if precision is None else ""
                print(f"{edge:5} {n:5} {precision or 'fp32':5} {peaks[0] / 1e9:13.2f} "
                      f"{peaks[1] / 1e9:12.2f} {said}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--scale", type=float, default=1.0, help="of all edges")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rehearse", type=int, nargs="*", default=[2, 4, 8, 16, 64])
    parser.add_argument("--paper", action="store_true", help="memory of the paper's model, planned")
    options = parser.parse_args()
    if options.paper:
        return paper()
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / "vit_scaling.csv"
    if place().ranks > 1:
        st.init()
        rows = []
        for job in dict.fromkeys(j for of in jobs(options.scale).values() for j in of):
            found: list = [None] * dist.get_world_size()
            dist.all_gather_object(found, measure(job))
            rows.append(measured(job, found))
        if dist.get_rank() == 0:
            write(list(map(told, rows)), table, "a" if table.exists() else "w")
        return None
    print(f"{CORES} cores, torch {torch.__version__}; rehearsed ranks on {NETWORK}")
    rows = run(options.scale, options.ranks, options.rehearse)
    write(rows, table, "w")
    draw(rows, options.scale, options.out / "vit_scaling.png")
    print(f"wrote {table} and {options.out / 'vit_scaling.png'}")
    return None


if __name__ == "__main__":
    main()
