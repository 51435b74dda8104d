"""Scores of weather forecasts, plain PyTorch: they take whole fields and sharded ones alike.

Shapes: B samples, M members of an ensemble, C channels, latitude x longitude; `area` is the weight
of each latitude, of mean 1. Definitions: Rasp et al. 2024 (WeatherBench 2, arXiv 2308.15560).
"""

import torch
from torch import Tensor


def mean_over_globe(x: Tensor, area: Tensor) -> Tensor:
    """The mean over latitude and longitude, the last two dims, weighted by area."""
    return (x * area[:, None]).mean((-2, -1))


def rmse(forecast: Tensor, truth: Tensor, area: Tensor) -> Tensor:
    """(C): the root of the mean squared error of (B, C, latitude, longitude)."""
    return mean_over_globe((forecast - truth).square(), area).mean(0).sqrt()


def acc(forecast: Tensor, truth: Tensor, climate: Tensor, area: Tensor) -> Tensor:
    """(C): the correlation of anomalies, of what differs from the climate (C, ...)."""
    a, b = forecast - climate, truth - climate
    both = mean_over_globe(a * b, area)
    each = mean_over_globe(a.square(), area) * mean_over_globe(b.square(), area)
    return (both / each.sqrt()).mean(0)


def spectrum(x: Tensor, area: Tensor) -> Tensor:
    """(C, longitude // 2 + 1): power by zonal wavenumber, of (B, C, latitude, longitude)."""
    n = x.shape[-1]
    power = torch.fft.rfft(x, dim=-1, norm="forward").abs().square()
    # negative wavenumbers have as much as positive ones
    twice = torch.full((n // 2 + 1,), 2.0, dtype=power.dtype, device=area.device)
    twice[0] = 1
    if n % 2 == 0:
        twice[-1] = 1
    return (power * twice * area[:, None]).mean((0, -2))


def crps(members: Tensor, truth: Tensor, area: Tensor) -> Tensor:
    """(C): the fair continuous ranked probability score of (M, C, latitude, longitude).

    mean |x_i - y| - sum_ij |x_i - x_j| / (2 M (M - 1)); the sum over pairs by sorted members.
    """
    m = members.shape[0]
    skill = (members - truth).abs().mean(0)
    rank = torch.arange(1 - m, m, 2, dtype=members.dtype, device=area.device)
    spread = (members.sort(0).values * rank.view(m, 1, 1, 1)).sum(0) / (m * (m - 1))
    return mean_over_globe(skill - spread, area)
