"""Norms over cut dims by CUDA's kernels; on CPUs by stand-ins that do what their source says."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard

from shardtensor import testing as T
from shardtensor.rules.norm import cuda_norm

D = torch.float64


def along(values, x):
    return values.view(1, -1, *[1] * (x.ndim - 2))


def others(x):
    return (0, *range(2, x.ndim))


def batch_norm_stats(x, eps):
    var, mean = torch.var_mean(x, others(x), correction=0)
    return mean, (var + eps).rsqrt()


def batch_norm_gather_stats_with_counts(x, means, slopes, mean, var, momentum, eps, counts):
    assert means.dtype == slopes.dtype == x.dtype and (counts > 0).all()
    assert mean is None or mean.dtype == counts.dtype
    n = counts.sum()
    share = (counts / n)[:, None]
    whole = (means * share).sum(0)
    m2 = ((slopes**-2 - eps + (means - whole) ** 2) * share).sum(0)
    if mean is not None:
        mean.lerp_(whole, momentum)
        var.lerp_(m2 * n / (n - 1), momentum)
    return whole, (m2 + eps).rsqrt()


def batch_norm_elemt(x, weight, bias, mean, slope, eps):
    y = (x - along(mean, x)) * along(slope, x)
    y = y if weight is None else y * along(weight, x)
    return y if bias is None else y + along(bias, x)


def batch_norm_backward_reduce(g, x, mean, slope, weight, input_g, weight_g, bias_g):
    assert (input_g, weight_g, bias_g) == (True, False, False)
    centred = x - along(mean, x)
    return g.sum(others(x)), (g * centred).sum(others(x)), None, None


def batch_norm_backward_elemt(g, x, mean, slope, weight, total, by, counts):
    assert counts.dtype == torch.int32
    n = counts.sum()
    centred = x - along(mean, x)
    g = g - along(total, x) / n - centred * along(slope**2 * by, x) / n
    g = g * along(slope, x)
    return g if weight is None else g * along(weight, x)


KERNELS = (
    batch_norm_stats,
    batch_norm_gather_stats_with_counts,
    batch_norm_elemt,
    batch_norm_backward_reduce,
    batch_norm_backward_elemt,
)


@pytest.fixture(autouse=True)
def called(monkeypatch):
    """The kernels that were called."""
    found = set()

    def noting(kernel):
        def run(*args):
            found.add(kernel.__name__)
            return kernel(*args)

        return run

    for kernel in KERNELS:
        monkeypatch.setattr(torch, kernel.__name__, noting(kernel))
    monkeypatch.setattr(cuda_norm, "_has_kernels", lambda x: True)
    yield found
    known = {k.__name__ for k in KERNELS}
    assert found in (known, known - STATISTICS)


# what those without a mean need not
STATISTICS = {"batch_norm_stats", "batch_norm_gather_stats_with_counts"}


NORMS = {
    "batch": (nn.BatchNorm2d(6), 2),
    "batch, no weights": (nn.BatchNorm2d(6, affine=False), 2),
    "batch, not tracked": (nn.BatchNorm2d(6, track_running_stats=False), 2),
    "group": (nn.GroupNorm(2, 6), 2),
    "group, no weights": (nn.GroupNorm(3, 6, affine=False), 2),
    "instance": (nn.InstanceNorm2d(6, affine=True), 2),
    "instance, tracked": (nn.InstanceNorm2d(6, track_running_stats=True), 2),
    "layer": (nn.LayerNorm((7, 3)), 2),
    "layer, no bias": (nn.LayerNorm((7, 3), bias=False), 2),
    "layer, no weights": (nn.LayerNorm((7, 3), elementwise_affine=False), 2),
    "of few dims": (nn.BatchNorm1d(6), 0),
    "rms": (nn.RMSNorm((7, 3)), 2),
    "rms, no weights": (nn.RMSNorm((7, 3), elementwise_affine=False), 2),
    "rms, eps": (nn.RMSNorm((6, 7, 3), eps=0.1), 2),
}


@pytest.mark.parametrize("cut", [(4, 3), (7, 0), (3, 0, 4), (2, 2, 2, 1)], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_as_on_one_device(name, cut, called):
    torch.manual_seed(0)
    norm, dim = NORMS[name]
    norm = norm.double()
    for p in norm.parameters():
        nn.init.normal_(p)
    shape = (7, 6) if name == "of few dims" else (2, 6, 7, 3)
    x = torch.randn(shape, dtype=D) + 3
    T.hold(norm, [x], [T.shard(dim, cut)], (len(cut),))
    assert bool(called & STATISTICS) != name.startswith("rms")


def test_on_two_axes():
    torch.manual_seed(0)
    x = torch.randn(2, 6, 7, 5, dtype=D)
    T.hold(nn.BatchNorm2d(6).double(), [x], [T.On([Shard(2), Shard(3)])], (2, 2))
    T.hold(nn.GroupNorm(3, 6).double(), [x], [T.On([Shard(1), Shard(3)])], (3, 2))


def test_more_ranks_than_gather(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(cuda_norm, "GATHERED", 1)
    x = torch.randn(2, 6, 7, 3, dtype=D)
    for norm in (nn.BatchNorm2d(6), nn.GroupNorm(2, 6)):
        T.hold(norm.double(), [x], [T.shard(2, (4, 0, 3))], (3,))
    torch.batch_norm_stats(x, 0.0)
    torch.batch_norm_gather_stats_with_counts(
        x, x[0, :, 0], x[0, :, 1], None, None, 0.0, 0.0, torch.ones(6, dtype=D)
    )
