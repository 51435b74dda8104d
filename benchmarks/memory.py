"""Peak memory of a training step on each rank, over its share of the peak on one device.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--ranks 2 4] [--csv FILE]

Of the activations and gradients that forward and backward hold at once, parameters not counted.
1.00 is a perfect split. Kept: what the forward keeps for the backward, likewise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from bench_models import MODELS, step
from tables import extend
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.measure import peak_bytes, saved_bytes
from shardtensor.ranks.testing import make_mesh
from shardtensor.ranks.workers import Pool

ROWS = 256


def run(name: str) -> list[float]:
    """(peak, kept) in bytes of this rank; of one device in a world of one."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    n = dist.get_world_size()
    model, x = build(ROWS), torch.randn(shape(ROWS))
    if n > 1:
        mesh = make_mesh((n,))
        st.parallelize(model, mesh)
        x = st.distribute_tensor(x, mesh, [Shard(2)])
    step(model, x)
    return [peak_bytes(lambda: step(model, x)), saved_bytes(lambda: model(x))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    pool = Pool(1)
    alone = {name: pool.run(run, name)[0] for name in MODELS}
    pool.close()
    columns = {"ranks": 5, "peak MiB": 10, "of share": 9, "kept MiB": 10, " of share": 9}
    print(f"{'model':8}", *(f"{name:>{width}}" for name, width in columns.items()))
    for n in options.ranks:
        pool = Pool(n)
        for name in MODELS:
            most = [max(r[i] for r in pool.run(run, name)) for i in range(2)]
            ratios = [m * n / a for m, a in zip(most, alone[name], strict=True)]
            print(
                f"{name:8} {n:5} {most[0] / 2**20:10.1f} {ratios[0]:9.2f} "
                f"{most[1] / 2**20:10.1f} {ratios[1]:9.2f}"
            )
            extend(options.csv, [[name, n, *most, *(f"{r:.3f}" for r in ratios)]])
        pool.close()


if __name__ == "__main__":
    main()
