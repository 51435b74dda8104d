"""`st.tiled` on a GPU beside the plain model: difference, time, memory and waits.

    python benchmarks/gpu_tiled.py [--size 1024] [--json FILE]

A training step in float64 (so that plain and tiled differ by rounding alone) of a U-Net, whose
convolutions and norms meet at halos and statistics, and of a ViT; parts' memory goes to pinned
memory, or on to a folder. On a pretended GPU (benchmarks/pretended) counts alone mean something.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import shardtensor as st

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from launches import PRETENDED, as_pretended, counted
from models import UNet, ViT


def cases(size: int) -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    return {
        "U-Net": (lambda: UNet(2, 1, width=8), (1, 2, size, size)),
        "ViT": (lambda: ViT((size // 4,) * 2, 4, 2, 1, width=32), (1, 2, size // 4, size // 4)),
    }


def step(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output and gradients."""
    for p in model.parameters():
        p.grad = None
    y = call(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """(ms of the second of two runs, its peak of MiB beyond what was there)."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), (torch.cuda.max_memory_allocated() - before) / 2**20


def row(name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], spill: str) -> Any:
    """One case beside the plain model."""
    torch.manual_seed(0)
    plain = make().double().cuda()
    model = copy.deepcopy(plain)
    x = torch.randn(shape, dtype=torch.float64, device="cuda")
    budget = 64 * x.numel() * x.element_size() // 8
    run = st.tiled(model, 8, 2, memory=budget, spill=spill)
    pairs = list(zip(step(model, run, x), step(plain, plain, x), strict=True))
    error = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)
    del pairs
    ms, mib = timed(lambda: step(model, run, x))
    plain_ms, plain_mib = timed(lambda: step(plain, plain, x))
    found = counted(lambda: step(model, run, x))
    return {
        "model": f"{name} {shape[2]}^2", "spill": "cpu" if spill == "cpu" else "folder",
        "differs by": error, "ms": ms, "plain ms": plain_ms, "MiB": mib, "plain MiB": plain_mib,
        "budget MiB": budget / 2**20, "spilled MiB": run.paging.spilled / 2**20,
        "kernels": found.kernels, "copies": found.copies, "host waits": found.synchronisations,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128 if PRETENDED else 1024)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if PRETENDED:
        as_pretended()
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for spill in ("cpu", folder):
            for name, (make, shape) in cases(options.size).items():
                rows.append(row(name, make, shape, spill))
                print(json.dumps(rows[-1]), flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows))
    if not PRETENDED and max(r["differs by"] for r in rows) > 1e-9:
        sys.exit("tiled differs from the plain model")


if __name__ == "__main__":
    main()
