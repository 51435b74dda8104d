"""What a warm step on CUDA launches, copies, waits for and sends: one rank of n beside plain.

    python benchmarks/launches.py [--models ViT U-Net ...] [--ranks 8] [--large] [--json FILE]
    FOLDER/run python benchmarks/launches.py ...    (pretended GPU: benchmarks/pretended/README.md)

One rank of a silent world (`shardtensor.rehearse`'s), whose collectives move nothing. On a real GPU
the profiler counts; the pretended one counts the calls of the CUDA runtime itself, and its values
are garbage. Columns: kernels (those of cuBLAS and cuFFT and fills are among them), copies between
host and device, host synchronisations, collectives and bytes sent. --large: the ViT of 127 million
parameters of the paper (arXiv 2605.11111) at 1024^2 and 2048^2.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_models import DiT, fno
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard
from torch.profiler import ProfilerActivity, profile

import shardtensor as st
from shardtensor import cache
from shardtensor._torch.world import silent_world
from shardtensor.attention.strategy import strategy
from shardtensor.comm import groups, transport
from shardtensor.comm.define import Looking

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from models import UNet, ViT
from test_shifted_windows import Swin

PRETENDED = os.environ.get("FAKECUDA")
Step = Callable[[], Any]


@dataclass
class Counts:
    """Of one step. bytes: sent by this rank to others."""

    kernels: int
    copies: int
    synchronisations: int
    collectives: int = 0
    bytes: int = 0


def pretended() -> Counts:
    """What the pretended device has counted since the process began."""
    library = ctypes.CDLL(str(PRETENDED))
    kinds = "launches", "h2d", "d2h", "syncs"
    launches, h2d, d2h, syncs = (ctypes.c_long.in_dll(library, f"fake_{k}").value for k in kinds)
    return Counts(launches, h2d + d2h, syncs)


def profiled(run: Step) -> Counts:
    """The same of one call on a real GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        run()
        torch.cuda.synchronize()
    names = [e.name for e in prof.events()]
    # the last one is ours
    waits = sum(n.endswith("Synchronize") for n in names) - 1
    copies = sum("HtoD" in n or "DtoH" in n for n in names)
    launched = ("cudaLaunchKernel", "cuLaunchKernel", "cudaMemsetAsync", "cudaLaunchCooperative")
    return Counts(sum(n.startswith(launched) for n in names), copies, waits)


class ByOp(Looking):
    """Kernels of each op of torch below autograd, and where Python called those of forward."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def op(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = pretended().kernels
        out = func(*args, **kwargs)
        frames = traceback.extract_stack(limit=8)
        place = next((f for f in reversed(frames) if "/shardtensor/" in f.filename), None)
        line = f"{Path(place.filename).name}:{place.lineno}" if place else ""
        self.found[f"{func} {line}"] += pretended().kernels - before
        return out


def counted(run: Step, by_op: bool = False) -> Counts:
    """Of the third call: the first two make what is kept."""
    run()
    run()
    if by_op:
        with ByOp() as ops:
            run()
        for name, n in ops.found.most_common(40):
            print(f"{n:8} {name}")
    with st.trace() as sent:
        if PRETENDED:
            before = pretended()
            run()
            after = pretended()
            found = Counts(**{k: v - vars(before)[k] for k, v in vars(after).items()})
        else:
            found = profiled(run)
    found.collectives, found.bytes = len(sent.sent), sent.bytes
    return found


class Neighbours(nn.Module):
    """A layer of neighbourhood attention (Hassani et al. 2023), on a grid of 2 or 3 dims."""

    def __init__(self, dims: int, width: int = 32) -> None:
        super().__init__()
        self.qkv, self.dims = nn.Linear(width, 3 * width), dims

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).unbind(-3)
        return st.neighborhood_attention(q, k, v, 5)


class Tokens(nn.Module):
    """Attention of all tokens to all, by this way; biased: by a mask of numbers for each head."""

    def __init__(self, way: str, biased: int = 0, heads: int = 12) -> None:
        super().__init__()
        self.way, self.heads, self.qkv = way, heads, nn.Linear(64 * heads, 3 * 64 * heads)
        self.register_buffer("bias", torch.zeros(heads, biased, biased) if biased else None)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, 64)).permute(2, 0, 3, 1, 4).unbind()
        # one device has none but its own
        with strategy(self.way):
            return F.scaled_dot_product_attention(q, k, v, self.bias)


# name -> (model, shape of an input, dim that is cut, unit of uneven cuts)
STEPS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "U-Net": (lambda: UNet(4, 4, width=16), (2, 4, 256, 128), 2, 4),
    "ViT": (lambda: ViT((256, 128), 8, 4, 4), (2, 4, 256, 128), 2, 8),
    "DiT": (lambda: DiT(), (2, 4, 256, 128), 2, 4),
    "Swin": (lambda: Swin((128, 64), 8, 4), (1, 128, 64, 8), 1, 8),
    "FNO": (lambda: fno(), (2, 4, 256, 128), 2, 1),
    "neighbours 2-D": (lambda: Neighbours(2), (1, 64, 64, 32), 1, 1),
    "neighbours 3-D": (lambda: Neighbours(3), (1, 64, 16, 16, 32), 1, 1),
    "RMS norm": (lambda: nn.RMSNorm((64, 32)), (2, 64, 32), 1, 1),
    "few keys, ring": (lambda: Tokens("ring"), (1, 128, 768), 1, 1),
    "few keys, gather": (lambda: Tokens("gather"), (1, 128, 768), 1, 1),
    "biased heads": (lambda: Tokens("auto", 1024), (1, 1024, 768), 1, 1),
}


def cuts(rows: int, unit: int, ranks: int) -> list[int]:
    """Even cuts of so many rows, but for a unit more on the middle rank and less on the last."""
    sizes = [rows // ranks] * ranks
    sizes[ranks // 2] += unit
    sizes[-1] -= unit
    return sizes


def part(
    shape: tuple[int, ...], dim: int, mesh: DeviceMesh, sizes: list[int], dtype: torch.dtype
) -> Tensor:
    """This rank's shard of a tensor that is nowhere whole."""
    mine = (*shape[:dim], sizes[mesh.get_local_rank()], *shape[dim + 1 :])
    local = torch.zeros(mine, device="cuda", dtype=dtype)
    return st.ShardTensor.from_local(local, mesh, [Shard(dim)], {dim: sizes})


def trained(model: nn.Module, x: Tensor) -> Step:
    def run() -> None:
        model(x).square().mean().backward()
        model.zero_grad(set_to_none=True)

    return run


def inferred(model: nn.Module, x: Tensor) -> Step:
    return torch.no_grad()(lambda: model(x))


@contextmanager
def rank_of(ranks: int) -> Iterator[DeviceMesh]:
    cache.clear()
    with silent_world(ranks // 2, ranks):
        try:
            yield init_device_mesh("cuda", (ranks,))
        finally:
            cache.clear()
            groups.forget()


def small(name: str, ranks: int, uneven: bool, by_op: bool = False) -> tuple[Counts, Counts]:
    """(plain, one of so many ranks) of a training step."""
    build, shape, dim, unit = STEPS[name]
    plain = counted(trained(build().cuda(), torch.zeros(shape, device="cuda")))
    with rank_of(ranks) as mesh:
        even = [shape[dim] // ranks] * ranks
        x = part(shape, dim, mesh, cuts(shape[dim], unit, ranks) if uneven else even, torch.float32)
        return plain, counted(trained(st.parallelize(build().cuda(), mesh), x), by_op)


def vit127(side: int, dtype: torch.dtype) -> nn.Module:
    """The paper's ViT of 127 million parameters."""
    return ViT((side, side), 8, 3, 3, width=768, depth=16, heads=16).cuda().to(dtype)


def as_pretended() -> None:
    """The pretended GPU has no cuDNN; what silent collectives write is no kernel of a step."""
    transport.nothing_arrives = lambda received: []
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)


def large(side: int, train: bool, dtype: torch.dtype, ranks: int) -> dict[str, Counts]:
    """The paper's ViT by each way of attention, and plain."""
    make = trained if train else inferred
    whole = torch.zeros(1, 3, side, side, device="cuda", dtype=dtype)
    found = {"plain": counted(make(vit127(side, dtype), whole))}
    for way in ("all_to_all", "ring"):
        with rank_of(ranks) as mesh, strategy(way):
            x = part((1, 3, side, side), 2, mesh, [side // ranks] * ranks, dtype)
            found[way] = counted(make(st.parallelize(vit127(side, dtype), mesh), x))
    return found


def shown(what: str, found: Counts) -> dict[str, Any]:
    print(f"{what:44}" + "".join(f"{v:12}" for v in vars(found).values()), flush=True)
    return {"what": what, **asdict(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(STEPS))
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--by-op", action="store_true", help="each op's kernels (pretended GPU)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if PRETENDED:
        as_pretended()
    card = torch.cuda.get_device_name()
    print(f"torch {torch.__version__} on {card}; one of {options.ranks} ranks")
    print(
        f"{'':44}"
        + "".join(f"{k:>12}" for k in ("kernels", "copies", "syncs", "collectives", "bytes"))
    )
    rows = []
    for name in options.models:
        for uneven in (False, True):
            plain, sharded = small(name, options.ranks, uneven, options.by_op and not uneven)
            if not uneven:
                rows.append(shown(f"{name}, plain", plain))
            rows.append(shown(f"{name}, {'uneven' if uneven else 'even'}", sharded))
    for side, train, dtype in ((1024, False, torch.bfloat16), (2048, True, torch.bfloat16)):
        if options.large:
            for way, found in large(side, train, dtype, options.ranks).items():
                job = "training" if train else "inference"
                rows.append(shown(f"ViT 127 M {side}^2 {job}, {way}", found))
    if options.json:
        options.json.write_text(
            json.dumps({"torch": torch.__version__, "card": card, "rows": rows})
        )


if __name__ == "__main__":
    main()
