"""A diffusion transformer of fields, its loss and its sampler: plain PyTorch without any sharding.

Shapes: B batch, C channels, H x W points, h x w tokens, D width.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from natten import functional as natten
except ImportError:
    natten = None


def na2d(query: Tensor, key: Tensor, value: Tensor, kernel_size: int) -> Tensor:
    """Neighbourhood attention (Hassani et al. 2023) of (B, h, w, heads, D / heads).

    A query attends to the kernel_size x kernel_size tokens nearest to it; at a border the window is
    shifted inward. NATTEN computes on GPUs where it is installed. Else each row of queries attends
    to the rows of its windows with a mask of columns: memory is kernel_size times that of the keys.
    """
    if natten is not None and query.is_cuda:
        return natten.na2d(query, key, value, kernel_size)
    _, h, w, _, _ = query.shape
    rows, columns = (window(n, kernel_size, query.device) for n in (h, w))
    q = query.transpose(2, 3)  # (B, h, heads, w, D / heads)
    k, v = (
        x[:, rows].permute(0, 1, 4, 2, 3, 5).flatten(3, 4)  # (B, h, heads, kernel_size * w, ...)
        for x in (key, value)
    )
    seen = (columns[..., None] == torch.arange(w, device=query.device)).any(1)  # (w, w)
    return F.scaled_dot_product_attention(q, k, v, seen.repeat(1, kernel_size)).transpose(2, 3)


def window(n: int, kernel_size: int, device: torch.device) -> Tensor:
    """The indices (n, kernel_size) of what each of n tokens in a line sees."""
    start = torch.arange(n, device=device) - kernel_size // 2
    return start.clamp(0, n - kernel_size)[:, None] + torch.arange(kernel_size, device=device)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.heads, self.kernel = heads, kernel
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return self.out(na2d(q, k, v, self.kernel).flatten(-2))


class Block(nn.Module):
    """A transformer layer whose norms are shifted, scaled, gated by the condition (adaLN-Zero)."""

    def __init__(self, width: int, heads: int, kernel: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, heads, kernel)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.modulate = modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(condition)[
            :, None, None
        ].chunk(6, -1)  # each (B, 1, 1, D)
        x = x + gate1 * self.attention(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


def modulation(width: int, parts: int) -> nn.Module:
    """Zero at first, so that every block begins as the identity."""
    linear = nn.Linear(width, parts * width)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


class DiT(nn.Module):
    """Diffusion transformer (Peebles and Xie 2023).

    (B, c_in, H, W) and the noise's level (B,) to (B, c_out, H, W). shape: (H, W), multiples of
    patch. kernel: tokens that a token sees along each dim.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        c_in: int,
        c_out: int,
        *,
        patch: int = 4,
        width: int = 96,
        depth: int = 4,
        heads: int = 4,
        kernel: int = 7,
    ) -> None:
        super().__init__()
        self.patch = patch
        grid = shape[0] // patch, shape[1] // patch
        self.embed = nn.Conv2d(c_in, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, *grid, width))
        self.register_buffer("frequencies", torch.randn(width // 2))
        self.noise = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads, kernel) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = modulation(width, 2)
        self.head = nn.Linear(width, patch * patch * c_out)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        phase = 2 * math.pi * noise[:, None] * self.frequencies
        condition = self.noise(torch.cat([phase.cos(), phase.sin()], -1))  # (B, D)
        x = self.embed(x).permute(0, 2, 3, 1) + self.position  # (B, h, w, D)
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulate(condition)[:, None, None].chunk(2, -1)
        x = self.head(self.norm(x) * (1 + scale) + shift)
        return F.pixel_shuffle(x.permute(0, 3, 1, 2), self.patch)


class Denoiser(nn.Module):
    """D(x; sigma) of EDM (Karras et al. 2022, Table 1) around a DiT, for data of unit variance.

    x (B, c_out, H, W) is the noisy target, `given` (B, c_given, H, W) what it is conditioned on.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        c_given: int,
        c_out: int,
        sigma_data: float = 1.0,
        **options: int,
    ) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        self.network = DiT(shape, c_given + c_out, c_out, **options)

    def forward(self, x: Tensor, sigma: Tensor, given: Tensor) -> Tensor:
        s = sigma[:, None, None, None]
        total = s**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = s * self.sigma_data / total.sqrt()
        found = self.network(torch.cat([x / total.sqrt(), given], 1), sigma.log() / 4)
        return c_skip * x + c_out * found


# Karras et al. 2022, Table 1, for data of deviation 1 instead of 0.5; Table 5 for fresh noise
P_MEAN, P_STD = -1.2 + math.log(2), 1.2
SIGMA_MIN, SIGMA_MAX, RHO = 0.004, 160.0, 7
S_MIN, S_MAX, S_NOISE = 0.1, 100.0, 1.003


def edm_loss(model: nn.Module, y: Tensor, given: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """The weighted mean square error of y (B, C, H, W), denoised from the levels sigma (B,)."""
    s = sigma[:, None, None, None]
    return ((s**2 + 1) / s**2 * (model(y + s * noise, sigma, given) - y) ** 2).mean()


def levels(steps: int) -> list[float]:
    """The sampler's noise levels, from the highest to 0 (Eq. 5)."""
    a, b = SIGMA_MAX ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return [(a + i / (steps - 1) * (b - a)) ** RHO for i in range(steps)] + [0.0]


@torch.no_grad()
def heun(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    given: Tensor,
    noise: Callable[[int], Tensor],
    steps: int = 18,
    churn: float = 0.0,
) -> Tensor:
    """Samples by Heun's method (Algorithm 2) from noise(0), normal numbers of the samples' shape.

    churn: S_churn; above 0, noise(i) is added anew at step i = 1, 2, ... of the middle levels.
    """

    def slope(x: Tensor, t: float) -> Tensor:
        return (x - model(x, torch.full(x.shape[:1], t, device=x.device, dtype=x.dtype), given)) / t

    times = levels(steps)
    x = times[0] * noise(0)
    for i, (t, following) in enumerate(pairwise(times), 1):
        gamma = min(churn / steps, math.sqrt(2) - 1) if S_MIN <= t <= S_MAX else 0.0
        high = t * (1 + gamma)
        if gamma:
            x = x + math.sqrt(high**2 - t**2) * S_NOISE * noise(i)
        d = slope(x, high)
        ahead = x + (following - high) * d
        x = x + (following - high) / 2 * (d + slope(ahead, following)) if following else ahead
    return x
