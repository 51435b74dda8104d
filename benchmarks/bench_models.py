"""The models that the benchmarks measure: name -> (build(rows), shape of an input with rows)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from models import UNet, ViT


class DiTBlock(nn.Module):
    """Attention and MLP, shifted and scaled by a condition (Peebles, Xie 2023, section 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.condition = nn.Linear(width, 6 * width)
        self.heads = heads

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        a, b, g, d, e, h = self.condition(c).chunk(6, -1)
        y = self.norms[0](x) * (1 + a) + b
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + g * self.out(y)
        return x + h * self.mlp(self.norms[1](x) * (1 + d) + e)


class DiT(nn.Module):
    def __init__(self, width: int = 96, depth: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(4, width, 4, 4)
        self.blocks = nn.ModuleList(DiTBlock(width, 4) for _ in range(depth))
        self.condition = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, self.condition)
        return x


class Spectral(nn.Module):
    """A layer of a Fourier neural operator (Li et al. 2021) as it is usually written."""

    def __init__(self, width: int, modes: int) -> None:
        super().__init__()
        shape = width, width, modes, modes
        self.weights = nn.ParameterList(
            torch.randn(shape, dtype=torch.cfloat) / width**2 for _ in "+-"
        )
        self.skip = nn.Conv2d(width, width, 1)
        self.modes = modes

    def forward(self, x: Tensor) -> Tensor:
        m = self.modes
        y = torch.fft.rfft2(x)
        out = torch.zeros_like(y)
        for rows, w in zip((slice(0, m), slice(-m, None)), self.weights, strict=True):
            out[:, :, rows, :m] = torch.einsum("bixy,ioxy->boxy", y[:, :, rows, :m], w)
        return F.gelu(torch.fft.irfft2(out, s=x.shape[-2:]) + self.skip(x))


def fno(width: int = 16, modes: int = 12, depth: int = 4) -> nn.Module:
    layers = (Spectral(width, modes) for _ in range(depth))
    return nn.Sequential(nn.Conv2d(4, width, 1), *layers, nn.Conv2d(width, 4, 1))


MODELS = {
    "U-Net": (lambda rows: UNet(4, 4, width=16), lambda rows: (2, 4, rows, 256)),
    "ViT": (lambda rows: ViT((rows, 256), 8, 4, 4), lambda rows: (2, 4, rows, 256)),
    "DiT": (lambda rows: DiT(), lambda rows: (2, 4, rows, 192)),
    "FNO": (lambda rows: fno(), lambda rows: (2, 4, rows, 256)),
}


def step(model: nn.Module, x: Tensor) -> None:
    """Forward and backward."""
    model(x).square().mean().backward()
    model.zero_grad(set_to_none=True)
