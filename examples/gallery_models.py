"""Small models of many families, as one writes them for one device: plain PyTorch.

Shapes: B batch, C channels, X... spatial dims, N points or nodes, E edges, D width.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with GELU between."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class UNet3d(nn.Module):
    """A denoiser of volumes (B, 1, X, Y, Z) at noise level sigma (B,), preconditioned as in EDM
    (Karras et al. 2022, table 1; data of deviation 1): one level down and up, noise as a channel.
    """

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Conv3d(2, width, 3, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.down = nn.Conv3d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Conv3d(2 * width, 2 * width, 3, padding=1)
        self.middle_norm = nn.GroupNorm(2, 2 * width)
        self.up = nn.Conv3d(2 * width, width, 3, padding=1)
        self.last = nn.Conv3d(2 * width, 1, 3, padding=1)

    def forward(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        s = sigma.view(-1, 1, 1, 1, 1)
        x = noisy / (s**2 + 1).sqrt()
        x = torch.cat([x, (s.log() / 4).expand_as(x)], 1)
        skip = F.silu(self.norm(self.first(x)))
        x = F.silu(self.middle_norm(self.middle(F.silu(self.down(skip)))))
        x = F.interpolate(x, scale_factor=2, mode="trilinear")
        x = self.last(torch.cat([F.silu(self.up(x)), skip], 1))
        return noisy / (s**2 + 1) + x * s / (s**2 + 1).sqrt()


class SpectralConv(nn.Module):
    """Products with weights of the lowest modes (Li et al. 2021), any number of dims."""

    def __init__(self, width: int, modes: Sequence[int]) -> None:
        super().__init__()
        self.modes = tuple(modes)
        # of a real field half of the last dim's modes are kept; of others both ends
        shape = *(2 * m for m in self.modes[:-1]), self.modes[-1]
        self.weight = nn.Parameter(torch.randn(width, width, *shape, 2) / width)

    def forward(self, x: Tensor) -> Tensor:
        dims = tuple(range(2, x.ndim))
        spectrum = torch.fft.rfftn(x, dim=dims, norm="forward")
        kept = spectrum[..., : self.modes[-1]]
        for d, m in zip(dims, self.modes[:-1], strict=False):
            kept = torch.cat([kept.narrow(d, 0, m), kept.narrow(d, kept.shape[d] - m, m)], d)
        kept = torch.einsum("bi...,io...->bo...", kept, torch.view_as_complex(self.weight))
        for d, m in zip(dims, self.modes[:-1], strict=False):
            gap = list(kept.shape)
            gap[d] = x.shape[d] - 2 * m
            kept = torch.cat([kept.narrow(d, 0, m), kept.new_zeros(gap), kept.narrow(d, m, m)], d)
        return torch.fft.irfftn(kept, s=x.shape[2:], dim=dims, norm="forward")


class FNO(nn.Module):
    """A Fourier neural operator (B, 1, X...) to the same."""

    def __init__(self, modes: Sequence[int], width: int = 8, depth: int = 2) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[len(modes)]
        self.lift, self.project = conv(1, width, 1), conv(width, 1, 1)
        self.spectral = nn.ModuleList(SpectralConv(width, modes) for _ in range(depth))
        self.local = nn.ModuleList(conv(width, width, 1) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x)
        for spectral, local in zip(self.spectral, self.local, strict=True):
            h = F.gelu(spectral(h) + local(h))
        return x + self.project(h)


class SphericalFNO(nn.Module):
    """(B, 1, latitude, longitude) to the same: products with weights of each degree (Bonev et al.
    2023), by torch-harmonics' transforms.
    """

    def __init__(self, shape: tuple[int, int], width: int = 8, depth: int = 2) -> None:
        super().__init__()
        from torch_harmonics import InverseRealSHT, RealSHT

        self.there, self.back = RealSHT(*shape), InverseRealSHT(*shape)
        self.lift, self.project = nn.Conv2d(1, width, 1), nn.Conv2d(width, 1, 1)
        weights = (nn.Parameter(torch.randn(width, width, shape[0]) / width) for _ in range(depth))
        self.weights = nn.ParameterList(weights)
        self.local = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x)
        for weight, local in zip(self.weights, self.local, strict=True):
            spectrum = self.there(h)
            spectrum = torch.einsum("bilm,iol->bolm", spectrum, weight.to(spectrum.dtype))
            h = F.gelu(self.back(spectrum) + local(h))
        return x + self.project(h)


class MeshGraphNet(nn.Module):
    """Encoder, message passing with residuals, decoder (Pfaff et al. 2021): nodes (N, 1) with edges
    (2, E) and their features (E, 3), to the change of the nodes.
    """

    def __init__(self, width: int = 16, depth: int = 2) -> None:
        super().__init__()
        self.nodes, self.edges = mlp(1, width, width), mlp(3, width, width)
        self.messages = nn.ModuleList(mlp(3 * width, width, width) for _ in range(depth))
        self.updates = nn.ModuleList(mlp(2 * width, width, width) for _ in range(depth))
        self.decode = mlp(width, width, 1)

    def forward(self, u: Tensor, edge_index: Tensor, edge_features: Tensor) -> Tensor:
        source, target = edge_index
        x, e = self.nodes(u), self.edges(edge_features)
        for message, update in zip(self.messages, self.updates, strict=True):
            e = e + message(torch.cat([x[source], x[target], e], 1))
            x = x + update(torch.cat([x, torch.zeros_like(x).index_add(0, target, e)], 1))
        return u + self.decode(x)


class PointModel(nn.Module):
    """A field at query points (M, 3) around a surface of points (N, 3), as DoMINO does it (Ranade
    et al. 2025): the surface on a grid of G^3, convolved and read at the queries; and the nearest
    surface points of each query.
    """

    def __init__(self, grid: int = 12, width: int = 8, neighbours: int = 4) -> None:
        super().__init__()
        self.grid, self.neighbours = grid, neighbours
        self.surface = mlp(3, width, width)
        self.convs = nn.Sequential(
            nn.Conv3d(width, width, 3, padding=1), nn.GELU(), nn.Conv3d(width, width, 3, padding=1)
        )
        self.near = mlp(4, width, width)
        self.decode = mlp(2 * width + 3, 2 * width, 1)

    def forward(self, queries: Tensor, surface: Tensor) -> Tensor:
        n = self.grid
        cells = ((surface + 1) * (n / 2)).long().clamp(0, n - 1)
        flat = (cells[:, 0] * n + cells[:, 1]) * n + cells[:, 2]
        features = self.surface(surface)
        grid = features.new_zeros(n**3, features.shape[1]).index_add(0, flat, features)
        grid = self.convs(grid.T.reshape(1, -1, n, n, n))
        # grid_sample counts x first
        at = queries.flip(-1).view(1, -1, 1, 1, 3)
        wide = F.grid_sample(grid, at, align_corners=False).flatten(2)[0].T  # (M, D)
        distance, nearest = torch.cdist(queries, surface).topk(self.neighbours, largest=False)
        gap = surface[nearest] - queries[:, None]
        near = self.near(torch.cat([gap, distance[..., None]], -1)).mean(1)
        return self.decode(torch.cat([wide, near, queries], 1))


def submanifold_conv(features: Tensor, coords: Tensor, weight: Tensor) -> Tensor:
    """A 3^3 convolution at active sites of a grid (Graham et al. 2018): (N, C_in) to (N, C_out).

    coords: (N, 3), less than 1000; weight: (27, C_in, C_out). Every pair of sites is looked up.
    """
    base = torch.tensor([1_000_000, 1000, 1])
    key, order = (coords @ base).sort()
    shifts = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3)
    out = torch.zeros(len(coords), weight.shape[2], dtype=features.dtype)
    for w, shift in zip(weight, shifts, strict=True):
        wanted = (coords + shift) @ base
        at = torch.searchsorted(key, wanted).clamp(max=len(key) - 1)
        (found,) = (key[at] == wanted).nonzero(as_tuple=True)
        out = out.index_add(0, found, features[order[at[found]]] @ w)
    return out


class SparseNet(nn.Module):
    """Features of active sites (N, 1) to (N, 3), by submanifold convolutions."""

    def __init__(self, width: int = 8, depth: int = 2) -> None:
        super().__init__()
        widths = [1, *[width] * depth]
        pairs = itertools.pairwise(widths)
        self.weights = nn.ParameterList(
            nn.Parameter(torch.randn(27, a, b) / (9 * a) ** 0.5) for a, b in pairs
        )
        self.head = nn.Linear(width, 3)

    def forward(self, features: Tensor, coords: Tensor) -> Tensor:
        for weight in self.weights:
            features = F.gelu(submanifold_conv(features, coords, weight))
        return self.head(features)
