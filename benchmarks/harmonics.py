"""Layers and models of torch-harmonics 0.9, unmodified, on 4 ranks beside one device.

    pip install --no-deps torch-harmonics  # 0.9; its wheels ask for a torch of their own
    OMP_NUM_THREADS=1 python benchmarks/harmonics.py [NAME ...]

Rows: the largest difference of the value, and of all gradients (that of keys' bias is 0 but for
rounding), over the largest number of one device's, latitudes cut
evenly, unevenly (one rank without any), and both axes on 2 x 2; what a rank sends in a step, and
what gathering the field once would send. Nothing is gathered behind the scenes. Layers in float64
where their kernels have it, models in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any

import torch
import torch_harmonics as th
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch_harmonics.examples import models

import shardtensor as st
from shardtensor.ranks.testing import make_mesh

GRID, COARSE = (64, 128), (32, 64)
ON = {"grid_in": "equiangular", "grid_out": "equiangular"}
DISCO = {"kernel_shape": (3, 3), **ON}
NET = {"img_size": GRID, "in_chans": 3, "out_chans": 2}
SMALL = {"embed_dim": 16, "num_layers": 2, "scale_factor": 2, **NET}
DEEP = {"embed_dims": [8, 16], "depths": [1, 1], "scale_factor": 2, **NET}
# name -> (builder, channels, whether in float64)
CASES: dict[str, tuple[Callable[[], nn.Module], int, bool]] = {
    "DISCO convolution": (lambda: th.DiscreteContinuousConvS2(8, 8, GRID, GRID, **DISCO), 8, True),
    "to half the grid": (lambda: th.DiscreteContinuousConvS2(8, 8, GRID, COARSE, **DISCO), 8, True),
    "fused": (lambda: th.DiscreteContinuousConvS2(8, 8, GRID, GRID, fused=True, **DISCO), 8, True),
    "few out of many": (lambda: th.DiscreteContinuousConvS2(8, 2, GRID, GRID, **DISCO), 8, True),
    "transpose": (lambda: th.DiscreteContinuousConvTransposeS2(8, 8, GRID, GRID, **DISCO), 8, True),
    "resampling": (lambda: th.ResampleS2(*GRID, *COARSE, **ON), 8, True),
    "neighbourhood attention": (
        lambda: th.NeighborhoodAttentionS2(8, GRID, GRID, num_heads=2, **ON), 8, False),
    "attention": (lambda: th.AttentionS2(8, 2, COARSE, COARSE, **ON), 8, False),
    "SFNO": (lambda: models.SphericalFourierNeuralOperator(**SMALL), 3, False),
    "LSNO": (lambda: models.LocalSphericalNeuralOperator(**SMALL), 3, False),
    "transformer": (lambda: models.SphericalTransformer(
        num_heads=2, attention_mode="neighborhood", **SMALL), 3, False),
    "U-Net": (lambda: models.SphericalUNet(**DEEP), 3, False),
    "Segformer": (lambda: models.SphericalSegformer(heads=[2, 2], **DEEP), 3, False),
}  # fmt: skip
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[int], Any] | None]] = {
    "even": ((4,), (2,), None),
    "uneven": ((4,), (2,), lambda n: (n - 20, 0, 17, 3)),
    "2 x 2": ((2, 2), (2, 3), None),
}
_building = Lock()


def built(name: str) -> tuple[nn.Module, Tensor]:
    make, channels, wide = CASES[name]
    with _building:
        torch.manual_seed(0)
        model, grid = make().eval(), COARSE if name == "attention" else GRID
        x = torch.randn(1, channels, *grid)
    return (model.double(), x.double()) if wide else (model, x)


def step(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and all gradients of a sum that weighs every number by another one."""
    y = model(x)
    whole = y.full_tensor() if isinstance(y, st.ShardTensor) else y
    (
        whole * torch.linspace(0.5, 1.5, whole.numel(), dtype=whole.dtype).view(whole.shape)
    ).sum().backward()
    grad = x.grad.full_tensor() if isinstance(x.grad, st.ShardTensor) else x.grad
    return [whole.detach(), grad, *[p.grad for p in model.parameters() if p.grad is not None]]


def on_rank(name: str, layout: str) -> tuple[list[Tensor], int]:
    shape, dims, sizes = LAYOUTS[layout]
    model, x = built(name)
    at = None if sizes is None else {2: sizes(x.shape[2])}
    cut = [Shard(d) for d in dims]
    own = st.distribute_tensor(x, make_mesh(shape), cut, sizes=at, src_data_rank=None)
    with st.fallback("error"), st.trace() as record:
        y = model(own)
        sent = sum(e.bytes for e in record.sent)
    del y
    with st.fallback("error"):
        return step(model, own.requires_grad_()), sent


def off(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    apart = max(float((g - w).abs().max()) for g, w in zip(got, want, strict=True))
    return apart / max(float(w.abs().max()) for w in want)


def main() -> None:
    print(
        "| | "
        + " | ".join(f"{k}: value, gradients" for k in LAYOUTS)
        + " | KB sent forward | gathered once |"
    )
    print("|---|" + "---|" * len(LAYOUTS) + "---:|---:|")
    for name in sys.argv[1:] or CASES:
        model, x = built(name)
        want = step(model, x.requires_grad_())
        cells, sent = [], 0
        for layout in LAYOUTS:
            found = st.simulate(4, on_rank, name, layout)
            value = max(off(got[:1], want[:1]) for got, _ in found)
            grads = max(off(got[1:], want[1:]) for got, _ in found)
            cells.append(f"{value:.0e}, {grads:.0e}")
            sent = sent or max(n for _, n in found)
        whole = x.numel() * x.element_size() * 3 // 4
        print(
            f"| {name} | " + " | ".join(cells) + f" | {sent / 1e3:.0f} | {whole / 1e3:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
