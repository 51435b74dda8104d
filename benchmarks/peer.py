"""The cases of ideal.py on what else there is, beside ours and the ideal, in one run.

    pip install nvidia-physicsnemo
    OMP_NUM_THREADS=1 python benchmarks/peer.py [--ranks 2] [--repeats 9] [--only "conv 3x3"]

All alternate, each run ends with the last rank; printed are the medians of the ratios to the ideal,
forward and with backward, the first line of an error where one raises, and "wrong" where the
forward differs from one device's by more than 1e-4 of its largest value.

- PhysicsNeMo's ShardTensor. Its manager needs an accelerator and its rules are registered only
  where there is one: on CPUs this script does both, and gives the shard sizes.
- torch's DTensor: images are cut along their width, as its convolution asks for.
- torch's context parallel, of attention alone.
- FSDP2, which doesn't cut samples: every rank has a whole one; time for one of them, on all ranks.
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
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_module
from torch.distributed.tensor.experimental import context_parallel

import shardtensor as st
from shardtensor.ranks.workers import Pool

# what a run is of: a model, its input, and the input as one device would have it
Run = tuple[Callable[[Tensor], Tensor], Tensor, Tensor]


def declare() -> None:
    """Let torchvision import beside a torch build that its wheel does not match."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{name}", schema)


def physicsnemo(model: nn.Module, whole: Tensor, dim: int, mesh: DeviceMesh) -> Run:
    declare()
    from physicsnemo.distributed import DistributedManager
    from physicsnemo.domain_parallel import ShardTensor, register_custom_ops

    register_custom_ops()
    n, rank = dist.get_world_size(), dist.get_rank()
    state = dict(_rank=rank, _world_size=n, _local_rank=rank, _distributed=True)
    state |= dict(_device=torch.device("cpu"), _is_initialized=True)
    DistributedManager._shared_state.update(state)
    x = ShardTensor.from_local(
        shard(whole, dim), mesh, [Shard(dim)], sharding_shapes="chunk", global_shape=whole.shape
    )
    return model, x.detach(), whole


def ideal(model: nn.Module, whole: Tensor, dim: int, mesh: DeviceMesh) -> Run:
    attend, local = ideal_attention(mesh.size()), shard(whole, dim)

    def run(x: Tensor) -> Tensor:
        F.scaled_dot_product_attention, stock = attend, F.scaled_dot_product_attention
        try:
            return model(x)  # type: ignore[no-any-return]
        finally:
            F.scaled_dot_product_attention = stock

    return run, local, local


def ours(model: nn.Module, whole: Tensor, dim: int, mesh: DeviceMesh) -> Run:
    x = st.distribute_tensor(whole, mesh, [Shard(dim)], src_data_rank=None)
    return st.parallelize(model, mesh), x.detach(), whole


def dtensor(model: nn.Module, whole: Tensor, dim: int, mesh: DeviceMesh) -> Run:
    if whole.ndim == 4:
        whole, dim = whole.transpose(2, 3).contiguous(), 3
    x = DTensor.from_local(shard(whole, dim), mesh, [Shard(dim)])
    return distribute_module(model, mesh), x.detach(), whole


def context(model: nn.Module, whole: Tensor, dim: int, mesh: DeviceMesh) -> Run:
    if whole.ndim != 3:
        raise ValueError("of attention alone")
    local = whole.clone()
    cut = context_parallel(mesh, buffers=[local], buffer_seq_dims=[dim])
    cut.__enter__()  # as long as the process lives
    return model, local, whole


def fsdp(model: nn.Module, whole: Tensor, dim: int, mesh: DeviceMesh) -> Run:
    return fully_shard(model, mesh=mesh), whole.clone(), whole


WHO = {
    "ideal": ideal, "ours": ours, "PhysicsNeMo": physicsnemo, "DTensor": dtensor, "FSDP2": fsdp,
    "context parallel": context,
}  # fmt: skip


def shard(whole: Tensor, dim: int) -> Tensor:
    """This rank's part, all of one size."""
    return whole.chunk(dist.get_world_size(), dim)[dist.get_rank()].clone()


def first(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def run(name: str, repeats: int) -> dict[tuple[str, str], Any]:
    """(who, kind) -> seconds of every repeat on this rank, or the error."""
    build, shape, dim = CASES[name]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    whole, plain = torch.randn(shape), build()
    found: dict[tuple[str, str], Any] = {}
    runs: dict[str, Run] = {}
    for who, make in WHO.items():
        model = build()
        model.load_state_dict(plain.state_dict())
        try:
            runs[who] = make(model, whole, dim, mesh)
            found[who, "wrong"] = who != "ideal" and differs(plain, *runs[who])
            runs[who][1].requires_grad_()
        except Exception as error:
            found.update(dict.fromkeys([(who, "forward"), (who, "step")], first(error)))
            found[who, "wrong"] = False
    for kind in ("forward", "step"):
        for repeat in range(repeats + 2):
            for who, (model, x, _) in runs.items():
                if isinstance(found.get((who, kind)), str):
                    continue
                dist.barrier()
                begin = time.perf_counter()
                try:
                    with torch.set_grad_enabled(kind == "step"):
                        y = model(x)
                        if kind == "step":
                            y.sum().backward()
                except Exception as error:
                    found[who, kind] = first(error)
                    continue
                took = time.perf_counter() - begin
                if repeat >= 2:
                    per = mesh.size() if who == "FSDP2" else 1
                    found.setdefault((who, kind), []).append(took / per)
    return found


def differs(plain: nn.Module, model: Any, x: Tensor, whole: Tensor) -> bool:
    """Whether the model's result, or this rank's part of it, is not that on one device."""
    with torch.no_grad():
        got, want = model(x), plain(whole)
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
    dim = next((d for d in range(want.ndim) if want.shape[d] != got.shape[d]), 0)
    if got.shape[dim] != want.shape[dim]:
        want = want.chunk(dist.get_world_size(), dim)[dist.get_rank()]
    return got.shape != want.shape or bool((got - want).abs().max() > 1e-4 * want.abs().max())


def ratio(ranks: list[dict[tuple[str, str], Any]], who: str, kind: str) -> str:
    rows = [r[who, kind] for r in ranks]
    error = next((row for row in rows if isinstance(row, str)), None)
    if error:
        return error[:90]
    ended = [max(times) for times in zip(*rows, strict=True)]
    ideal = [max(times) for times in zip(*(r["ideal", kind] for r in ranks), strict=True)]
    wrong = " wrong" if any(r[who, "wrong"] for r in ranks) else ""
    return f"{statistics.median(a / b for a, b in zip(ended, ideal, strict=True)):.2f}{wrong}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    for name in CASES:
        if not name.startswith(options.only):
            continue
        pool = Pool(options.ranks)
        try:
            ranks = pool.run(run, name, options.repeats, timeout=300)
        except RuntimeError as error:
            print(f"{name}: {str(error).splitlines()[-1][:90]}", flush=True)
            continue
        finally:
            pool.close()
        print(f"{name}, forward and step over the ideal")
        for who in list(WHO)[1:]:
            both = [ratio(ranks, who, kind) for kind in ("forward", "step")]
            said = both if both[0][0].isdigit() else dict.fromkeys(both)
            print(f"    {who:18} {'  '.join(f'{b:>8}' for b in said)}", flush=True)


if __name__ == "__main__":
    main()
