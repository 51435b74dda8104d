"""Two plain PyTorch models of fields: they know nothing of sharding.

Shapes: B batch, C channels, H x W points, N tokens, D width.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions with batch norm, which makes their biases void."""

    def __init__(self, c_in: int, c_out: int, mode: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, padding_mode=mode, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, padding_mode=mode, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(self.conv1(x)))
        return F.gelu(self.norm2(self.conv2(x)))


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015): (B, c_in, H, W) to (B, c_out, H, W).

    Strided convolutions down, transposed convolutions up, skip connections by concatenation. H and
    W are multiples of 2^depth.
    """

    def __init__(
        self, c_in: int, c_out: int, width: int = 16, depth: int = 2, periodic: bool = False
    ) -> None:
        super().__init__()
        mode = "circular" if periodic else "zeros"
        widths = [width * 2**i for i in range(depth + 1)]
        self.first = Block(c_in, width, mode)
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1, padding_mode=mode, bias=False) for a, b in pairs
        )
        self.encode = nn.ModuleList(Block(b, b, mode) for _, b in pairs)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(b, a, 2, stride=2, bias=False) for a, b in reversed(pairs)
        )
        self.decode = nn.ModuleList(Block(2 * a, a, mode) for a, _ in reversed(pairs))
        self.last = nn.Conv2d(width, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skips = []
        for down, encode in zip(self.down, self.encode, strict=True):
            skips.append(x)
            x = encode(down(x))
        for up, decode in zip(self.up, self.decode, strict=True):
            x = decode(torch.cat([up(x), skips.pop()], dim=1))
        return self.last(x)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])  # (B, heads, N, D / heads)
        return self.out(x.transpose(1, 2).reshape(b, n, d))


class Layer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) with a class token, from field to field.

    shape: (H, W), multiples of patch.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        patch: int,
        c_in: int,
        c_out: int,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.patch, self.c_out = patch, c_out
        self.grid = shape[0] // patch, shape[1] // patch
        tokens = self.grid[0] * self.grid[1] + 1
        self.embed = nn.Conv2d(c_in, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, patch * patch * c_out)

    def forward(self, x: Tensor) -> Tensor:
        b, p, (h, w) = x.shape[0], self.patch, self.grid
        x = self.embed(x).flatten(2).transpose(1, 2)  # (B, N, D)
        x = torch.cat([self.class_token.expand(b, -1, -1), x], dim=1) + self.position
        for layer in self.layers:
            x = layer(x)
        x = self.head(self.norm(x)[:, 1:])  # (B, N, p p C)
        x = x.reshape(b, h, w, self.c_out, p, p).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(b, self.c_out, h * p, w * p)
