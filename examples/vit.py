"""A vision transformer for fields in two or three dims: it knows nothing of sharding.

Shapes: B batch, C channels, X... spatial dims, N tokens, D width.
"""

from math import prod

import torch
from models import Layer
from torch import Tensor, nn


class ViT(nn.Module):
    """(B, c_in, X...) to (B, c_out, X...) (Dosovitskiy et al. 2021), X multiples of patch.

    Each patch is a token; `depth` pre-norm layers of full attention; patches from tokens.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        patch: int = 8,
        c_in: int = 1,
        c_out: int = 1,
        width: int = 96,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        to_tokens, to_field = {
            2: (nn.Conv2d, nn.ConvTranspose2d),
            3: (nn.Conv3d, nn.ConvTranspose3d),
        }[len(shape)]
        self.grid = tuple(n // patch for n in shape)
        self.embed = to_tokens(c_in, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, prod(self.grid), width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = to_field(width, c_out, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2) + self.position  # (B, N, D)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).transpose(1, 2).unflatten(2, self.grid))
