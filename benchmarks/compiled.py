"""A training step of the local program: eager, and compiled by Inductor.

    OMP_NUM_THREADS=1 python benchmarks/compiled.py [--only NAME ...] [--zoo] [--ranks N]

N gloo processes; eager and compiled steps in turns, and the least time of each on the slowest rank.
error: the largest difference of a gradient from the eager one's, over the largest gradient. --zoo:
five third-party models, too (extra `zoo`), in eval mode. The last two rows are the first step of a
ViT of one block and of sixteen, compiled by blocks: CPU seconds of compiling, with empty caches.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from bench_models import MODELS, ViT
from tables import extend
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.distributed.tensor import Shard
from zoo_models import MODELS as ZOO

import shardtensor as st
from shardtensor.ranks.testing import make_mesh
from shardtensor.ranks.workers import Pool

THIRD = (
    "tv.resnet18.features", "tv.squeezenet1_1", "tv.mobilenet_v3_small",
    "timm.vit_tiny_patch16_224", "timm.mixer_s32_224",
)  # fmt: skip
REPEATS, ROWS = 9, 128


def made(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name in MODELS:
        build, shape = MODELS[name]
        return build(ROWS), torch.randn(shape(ROWS))
    build, shape, _ = ZOO[name]
    return build().eval(), torch.randn(shape)


def run(name: str) -> tuple[float, float, float, float]:
    """(eager seconds, compiled seconds, seconds of the first compiled step, error)."""
    warnings.simplefilter("ignore")
    model, whole = made(name)
    mesh = make_mesh((dist.get_world_size(),))
    x = st.distribute_tensor(whole, mesh, [Shard(2)])
    compiled = st.compile(model)

    def step(call: object) -> float:
        model.zero_grad(set_to_none=True)
        dist.barrier()
        begin = time.perf_counter()
        call(x).square().mean().backward()
        dist.barrier()
        return time.perf_counter() - begin

    def gradients() -> list[Tensor]:
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    step(model)
    want = gradients()
    first = step(compiled)
    largest = max(float(g.abs().max()) for g in want) or 1.0
    error = max(float((a - b).abs().max()) for a, b in zip(gradients(), want, strict=True))
    times: list[list[float]] = [[], []]
    for _ in range(REPEATS):
        for i, call in enumerate((model, compiled)):
            times[i].append(step(call))
    return *(min(t) for t in times), first, error / largest


def first_step(depth: int) -> float:
    """CPU seconds of the first step of a ViT whose blocks are compiled, with empty caches."""
    warnings.simplefilter("ignore")
    # compilers are children of this process, whose time counts
    torch._inductor.config.compile_threads = 1
    torch._dynamo.reset()
    torch.manual_seed(0)
    mesh = make_mesh((dist.get_world_size(),))
    x = st.distribute_tensor(torch.randn(2, 4, ROWS, 256), mesh, [Shard(2)])
    with fresh_cache():
        model = st.compile(ViT((ROWS, 256), 8, 4, 4, depth=depth), blocks=())
        begin = sum(os.times()[:4])
        model(x).square().mean().backward()
        return sum(os.times()[:4]) - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[*MODELS])
    parser.add_argument("--zoo", action="store_true")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    pool = Pool(options.ranks)
    print(f"{'':26} {'eager ms':>9} {'compiled':>9} {'ratio':>6} {'first s':>8} {'error':>8}")
    rows = []
    for name in (*options.only, *(THIRD if options.zoo else ())):
        found = pool.run(run, name, timeout=1200)
        eager, compiled, first, error = (max(f[i] for f in found) for i in range(4))
        print(
            f"{name:26} {1e3 * eager:9.1f} {1e3 * compiled:9.1f} {compiled / eager:6.2f} "
            f"{first:8.1f} {error:8.1e}",
            flush=True,
        )
        rows.append([name, options.ranks, eager, compiled, first, error])
    # the first in a process also loads the compiler
    _, one, sixteen = (max(pool.run(first_step, depth, timeout=1200)) for depth in (1, 1, 16))
    print(f"{'ViT, 1 block':26} {one:35.1f}")
    print(f"{'ViT, 16 blocks':26} {sixteen:35.1f}  {sixteen / one:.2f} x that of one")
    pool.close()
    extend(options.csv, rows)


if __name__ == "__main__":
    main()
