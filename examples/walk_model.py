"""A weather model as one has it: one dict of fields in, one dict out, plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions around a skip, scaled by the hour of the day."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm = nn.GroupNorm(4, c_out)
        self.last = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1)
        self.hour = nn.Linear(2, 2 * c_out)

    def forward(self, x: Tensor, hour: Tensor) -> Tensor:
        scale, shift = self.hour(hour)[..., None, None].chunk(2, 1)
        y = self.norm(self.first(x)) * (1 + scale) + shift
        return self.skip(x) + self.last(F.silu(y))


class Weather(nn.Module):
    """surface (B, S, H, W), upper (B, U, levels, H, W), static (B, 2, H, W), hour (B,)."""

    def __init__(self, surface: int = 2, upper: int = 2, levels: int = 3, width: int = 16) -> None:
        super().__init__()
        fields = surface + upper * levels
        self.down = nn.ModuleList([Block(fields + 3, width), Block(width, 2 * width)])
        self.up = Block(3 * width, width)
        self.last = nn.Conv2d(width, fields, 1)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        surface, upper, static = batch["surface"], batch["upper"], batch["static"]
        n, s, h, w = surface.shape
        latitude = torch.linspace(1, -1, h, dtype=surface.dtype, device=surface.device)
        x = torch.cat(
            [surface, upper.flatten(1, 2), static, latitude.view(1, 1, h, 1).expand(n, 1, h, w)], 1
        )
        angle = 2 * torch.pi / 24 * batch["hour"]
        hour = torch.stack([angle.sin(), angle.cos()], -1)
        # longitudes wrap around
        fine = self.down[0](F.pad(x, (4, 4, 0, 0), mode="circular"), hour)
        coarse = self.down[1](F.avg_pool2d(fine, 2), hour)
        coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear")
        y = self.last(self.up(torch.cat([fine, coarse], 1), hour))[..., 4:-4]
        return {
            "surface": surface + y[:, :s],
            "upper": upper + y[:, s:].unflatten(1, upper.shape[1:3]),
        }
