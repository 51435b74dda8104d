"""The cases of ideal.py on PhysicsNeMo's ShardTensor, beside ours and the ideal.

    pip install nvidia-physicsnemo
    OMP_NUM_THREADS=1 python benchmarks/peer.py [--ranks 2] [--repeats 9]

The three alternate, each run ends with the last rank; printed are the medians of the ratios to the
ideal, forward and with backward, the first line of an error where one raises, and "wrong" where the
forward differs from one device's by more than 1e-4 of its largest value. PhysicsNeMo's manager
needs an accelerator and its rules are registered only where there is one: on CPUs this script does
both, and gives the shard sizes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ideal import CASES, ideal_attention
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import shardtensor as st
from shardtensor.ranks.workers import Pool


def declare() -> None:
    """Let torchvision import beside a torch build that its wheel does not match."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


def theirs(local: Tensor, dim: int) -> Tensor:
    """PhysicsNeMo's global view of every rank's shard, all of one size."""
    declare()
    from physicsnemo.distributed import DistributedManager
    from physicsnemo.domain_parallel import ShardTensor, register_custom_ops

    register_custom_ops()
    n, rank = dist.get_world_size(), dist.get_rank()
    state = dict(_rank=rank, _world_size=n, _local_rank=rank, _distributed=True)
    state |= dict(_device=torch.device("cpu"), _is_initialized=True)
    DistributedManager._shared_state.update(state)
    mesh = init_device_mesh("cpu", (n,), mesh_dim_names=("domain",))
    whole = torch.Size([v * n if i == dim else v for i, v in enumerate(local.shape)])
    return ShardTensor.from_local(
        local, mesh, [Shard(dim)], sharding_shapes="chunk", global_shape=whole
    )


def run(name: str, repeats: int) -> dict[tuple[str, str], Any]:
    """(who, kind) -> seconds of every repeat on this rank, or the error."""
    build, shape, dim = CASES[name]
    n = dist.get_world_size()
    torch.manual_seed(0)
    part = [v // n if i == dim else v for i, v in enumerate(shape)]
    local = torch.randn(part)
    mesh = init_device_mesh("cpu", (n,))
    ours = st.ShardTensor.from_local(local, mesh, [Shard(dim)], sizes={dim: [part[dim]] * n})
    runs: dict[str, tuple[nn.Module, Tensor, Callable[..., Tensor]]] = {
        "ideal": (build(), local.clone(), ideal_attention(n)),
        "ours": (build(), ours.detach(), F.scaled_dot_product_attention),
        "theirs": (build(), theirs(local, dim).detach(), F.scaled_dot_product_attention),
    }
    found: dict[tuple[str, str], Any] = {}
    shards = [torch.empty_like(local) for _ in range(n)]
    dist.all_gather(shards, local)
    for who in ("ours", "theirs"):
        found[who, "wrong"] = differs(runs[who][0], runs[who][1], torch.cat(shards, dim))
    for _, x, _ in runs.values():
        x.requires_grad_()
    st.parallelize(runs["ours"][0], mesh)
    for kind in ("forward", "step"):
        for repeat in range(repeats + 2):
            for who, (model, x, attention) in runs.items():
                if isinstance(found.get((who, kind)), str):
                    continue
                F.scaled_dot_product_attention, stock = attention, F.scaled_dot_product_attention
                dist.barrier()
                begin = time.perf_counter()
                try:
                    with torch.set_grad_enabled(kind == "step"):
                        y = model(x)
                        if kind == "step":
                            y.sum().backward()
                    took = time.perf_counter() - begin
                    if repeat >= 2:
                        found.setdefault((who, kind), []).append(took)
                except Exception as error:
                    found[who, kind] = f"{type(error).__name__}: {error}".splitlines()[0]
                F.scaled_dot_product_attention = stock
    return found


def differs(model: nn.Module, x: Tensor, whole: Tensor) -> bool:
    """Whether the model's result on shards is not this rank's part of that on one device."""
    try:
        with torch.no_grad():
            got = model(x).to_local()
            want = model(whole)
    except Exception:
        return False  # told by the run
    dim = next((d for d in range(want.ndim) if want.shape[d] != got.shape[d]), 0)
    want = want.narrow(dim, dist.get_rank() * got.shape[dim], got.shape[dim])
    return bool((got - want).abs().max() > 1e-4 * want.abs().max())


def ratio(ranks: list[dict[tuple[str, str], Any]], who: str, kind: str) -> str:
    rows = [r[who, kind] for r in ranks]
    error = next((row for row in rows if isinstance(row, str)), None)
    if error:
        return error[:60]
    ended = [max(times) for times in zip(*rows, strict=True)]
    ideal = [max(times) for times in zip(*(r["ideal", kind] for r in ranks), strict=True)]
    wrong = " wrong" if any(r[who, "wrong"] for r in ranks) else ""
    return f"{statistics.median(a / b for a, b in zip(ended, ideal, strict=True)):.2f}{wrong}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    print(f"{'over the ideal':34} {'':8} {'ours':>6}  PhysicsNeMo")
    for name in CASES:
        pool = Pool(options.ranks)
        try:
            ranks = pool.run(run, name, options.repeats, timeout=120)
        except RuntimeError as error:
            print(f"{name:34} {str(error).splitlines()[-1][:60]}", flush=True)
            continue
        finally:
            pool.close()
        for kind in ("forward", "step"):
            row = [ratio(ranks, who, kind) for who in ("ours", "theirs")]
            print(f"{name:34} {kind:8} {row[0]:>6}  {row[1]}", flush=True)


if __name__ == "__main__":
    main()
