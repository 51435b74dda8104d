"""Transolver, and a variant that asks the geometry: plain PyTorch, for clouds of points.

Shapes: B batch, N points, M points of the geometry, D width, H heads, S slices, d = D / H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PhysicsAttention(nn.Module):
    """Attention among S slices of the points (Wu et al. 2024, equations 2 to 4)."""

    def __init__(self, width: int, heads: int, slices: int) -> None:
        super().__init__()
        d, self.heads = width // heads, heads
        self.weigh, self.lift, self.out = (nn.Linear(width, width) for _ in range(3))
        self.slice = nn.Linear(d, slices)
        self.temperature = nn.Parameter(torch.full((1, heads, 1, 1), 0.5))
        self.q, self.k, self.v = (nn.Linear(d, d, bias=False) for _ in range(3))

    def sliced(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Each point's share of each slice (B, H, N, S), and the slices' tokens (B, H, S, d)."""
        a, b = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.weigh, self.lift)
        )
        share = (self.slice(a) / self.temperature.clamp(0.1, 5)).softmax(-1)
        tokens = torch.einsum("bhnd,bhns->bhsd", b, share)
        return share, tokens / (share.sum(2)[..., None] + 1e-5)

    def attended(self, tokens: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(tokens), self.k(tokens), self.v(tokens))

    def spread(self, tokens: Tensor, share: Tensor) -> Tensor:
        """Back to the points."""
        return self.out(torch.einsum("bhsd,bhns->bhnd", tokens, share).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, geometry: Tensor | None = None) -> Tensor:
        share, tokens = self.sliced(x)
        return self.spread(self.attended(tokens), share)


class GeometryAttention(PhysicsAttention):
    """Slices also ask slices of the geometry, mixed by a learned gate (as GeoTransolver does)."""

    def __init__(self, width: int, heads: int, slices: int) -> None:
        super().__init__(width, heads, slices)
        d = width // heads
        self.context = PhysicsAttention(width, heads, slices)
        self.ask, self.key, self.value = (nn.Linear(d, d, bias=False) for _ in range(3))
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, geometry: Tensor | None = None) -> Tensor:
        share, tokens = self.sliced(x)
        _, context = self.context.sliced(geometry)
        asked = F.scaled_dot_product_attention(
            self.ask(tokens), self.key(context), self.value(context)
        )
        gate = self.gate.sigmoid()
        return self.spread(gate * self.attended(tokens) + (1 - gate) * asked, share)


class Block(nn.Module):
    def __init__(
        self, attention: type[PhysicsAttention], width: int, heads: int, slices: int
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = attention(width, heads, slices)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, geometry: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm1(x), geometry)
        return x + self.mlp(self.norm2(x))


class Transolver(nn.Module):
    """Features of points (B, N, c_in) to fields (B, N, c_out).

    c_geometry: features of the geometry's points (B, M, c_geometry), which the variant asks.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        c_geometry: int = 0,
        width: int = 32,
        depth: int = 3,
        heads: int = 4,
        slices: int = 16,
    ) -> None:
        super().__init__()
        attention = GeometryAttention if c_geometry else PhysicsAttention
        self.embed = nn.Sequential(nn.Linear(c_in, width), nn.GELU(), nn.Linear(width, width))
        self.geometry = nn.Linear(c_geometry, width) if c_geometry else None
        self.blocks = nn.ModuleList(Block(attention, width, heads, slices) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, c_out)

    def forward(self, x: Tensor, geometry: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        context = None if self.geometry is None else self.geometry(geometry)
        for block in self.blocks:
            x = block(x, context)
        return self.head(self.norm(x))
