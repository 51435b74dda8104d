"""Peak memory of single ops on each rank, over its share of the peak on one device.

    OMP_NUM_THREADS=1 python benchmarks/op_memory.py [NAME ...] [--ranks 4] [--mib 8]
        [--docs docs/memory.md]

Real processes, as some ops move what values decide. What forward holds at most beside its operands,
and then what forward and backward do, of the rank that holds most, each over the same on one device
divided by the ranks: 1.00 is a perfect split. --mib: of a shard. --docs: write the table there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.attention.neighborhood import neighborhood_attention
from shardtensor.ranks.measure import peak_bytes
from shardtensor.ranks.testing import make_mesh
from shardtensor.ranks.workers import Pool

Op = Callable[[Tensor], Any]
# the shape of x by its elements, the dim that is cut, and an op for x on a mesh
Case = tuple[Callable[[int], tuple[int, ...]], int, Callable[[Tensor, DeviceMesh | None], Op]]
HEADING = "## Single ops"
REPEATS = 3


class Place(nn.Module):
    """A position is added to every sample."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.place


def _position(x: Tensor, mesh: DeviceMesh | None) -> Op:
    model = Place(x.shape[1:])
    return model if mesh is None else st.parallelize(model, mesh)


def _any_order(n: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def _again(x: Tensor, _: DeviceMesh | None) -> Op:
    at = _any_order(len(x))
    return lambda x: x[at]


def _anew(x: Tensor, _: DeviceMesh | None) -> Op:
    # each a permutation, in one memory
    n, times = len(x), 2 * REPEATS + 2
    at = torch.cat([_any_order(n), _any_order(n)[:times]])
    every = [at[i : i + n] for i in range(times)]
    return lambda x: x[every.pop()]


def _op(op: Op) -> Callable[[Tensor, DeviceMesh | None], Op]:
    return lambda x, mesh: op


def _image(n: int) -> tuple[int, ...]:
    return 1, 16, n // 4096, 256


CASES: dict[str, Case] = {
    "x[index], rows of 256 numbers, eight times as large": (lambda n: (n // 32, 256), 0, _again),
    "the same by an index that is new": (lambda n: (n // 32, 256), 0, _anew),
    "x[index], numbers, eight times as large": (lambda n: (8 * n,), 0, _again),
    "numbers by an index that is new": (lambda n: (n,), 0, _anew),
    "sort": (lambda n: (n,), 0, _op(lambda x: x.sort())),
    "argsort": (lambda n: (n,), 0, _op(lambda x: x.argsort())),
    "sort along one of two dims": (lambda n: (4, n // 4), 1, _op(lambda x: x.sort())),
    "neighbourhood attention": (
        lambda n: (1, n // 4096, 64, 4, 16), 1, _op(lambda x: neighborhood_attention(x, x, x, 7)),
    ),
    "position parameter": (lambda n: (4, n // 256, 64), 1, _position),
    "max pool": (_image, 2, _op(lambda x: F.max_pool2d(x, 3, 1, 1))),
    "average pool": (_image, 2, _op(lambda x: F.avg_pool2d(x, 3, 1, 1))),
    "max pool with indices": (
        _image, 2, _op(lambda x: F.max_pool2d(x, 3, 1, 1, return_indices=True)),
    ),
    "max pool with indices along W": (
        lambda n: (1, 16, 256, n // 4096), 3,
        _op(lambda x: F.max_pool2d(x, 3, 1, 1, return_indices=True)),
    ),
}  # fmt: skip


def run(name: str, numel: int) -> list[int]:
    """Peaks of this rank, forward and both ways; of one device in a world of one."""
    shape, dim, make = CASES[name]
    torch.manual_seed(0)
    mesh = make_mesh((dist.get_world_size(),)) if dist.get_world_size() > 1 else None
    x = torch.randn(shape(numel))
    if mesh is not None:
        x = st.distribute_tensor(x, mesh, [Shard(dim)], src_data_rank=None)
    op = make(x, mesh)

    def forward() -> Any:
        with torch.no_grad():
            return op(x)

    def both() -> None:
        y = op(x.detach().requires_grad_())
        y = y[0] if isinstance(y, tuple) else y
        if y.requires_grad:
            y.backward(y.detach())

    found = []
    for step in (forward, both):
        step()
        # gloo's threads let go of what was sent when they come to it
        found.append(min(peak_bytes(step) for _ in range(REPEATS)))
    return found


def written(file: Path, rows: list[str], of: str) -> None:
    """The page with these rows as the table of its section."""
    before, heading, rest = file.read_text().partition(HEADING)
    said, mark, after = rest.partition("\n## ")
    kept = "\n".join(line for line in said.splitlines() if not line.startswith("|")).rstrip()
    table = [f"| op, {of} | forward | both ways |", "|---|---|---|", *rows]
    file.write_text(before + heading + "\n".join([kept, "", *table, "", ""]) + mark[1:] + after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--mib", type=int, default=8)
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()
    names = [c for c in CASES if not options.names or any(c.startswith(n) for n in options.names)]
    numel, rows = options.mib * 2**18 * options.ranks, []
    alone, ranks = Pool(1), Pool(options.ranks)
    for name in names:
        one, *every = (r for p in (alone, ranks) for r in p.run(run, name, numel, timeout=600.0))
        most = [
            options.ranks * max(of) / n for of, n in zip(zip(*every, strict=True), one, strict=True)
        ]
        rows.append(f"| {name} | {most[0]:.2f} | {most[1]:.2f} |")
        print(rows[-1], flush=True)
    alone.close()
    ranks.close()
    if options.docs:
        written(options.docs, rows, f"{options.ranks} ranks, shards of {options.mib} MiB")


if __name__ == "__main__":
    main()
