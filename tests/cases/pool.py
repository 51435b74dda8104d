"""Pooling, adaptive or not, and padding in front of it."""

import itertools

import torch.nn.functional as F
from torch import nn

from .table import D, case, cases, integers, normal

PADS = {
    "constant": lambda a: F.pad(a, (1, 2, 3, 1)),
    "value": lambda a: F.pad(a, (0, 0, 2, 0, 1, 1), value=2.5),
    "crop": lambda a: F.pad(a, (-1, 2, -2, -3)),
    "crop and pad": lambda a: F.pad(a, (0, 0, -6, 4)),
    "circular": lambda a: F.pad(a, (2, 1, 4, 9), mode="circular"),
    "reflect": lambda a: F.pad(a, (2, 1, 5, 8), mode="reflect"),
    "replicate": lambda a: F.pad(a, (0, 3, 4, 2), mode="replicate"),
    "one dim": lambda a: F.pad(a[0], (1, 1), mode="reflect"),
}
POOLS = {
    "max": nn.MaxPool2d(2), "max 3": nn.MaxPool2d(3, 2, 1), "max indices": nn.MaxPool2d(
        3, 2, 1, return_indices=True),
    "max ceil": nn.MaxPool2d((2, 3), (2, 2), (1, 0), ceil_mode=True, return_indices=True),
    "max dilated": nn.MaxPool2d(2, 1, 1, dilation=3, return_indices=True),
    "avg": nn.AvgPool2d(2), "avg pad": nn.AvgPool2d(3, 2, 1),
    "avg inside": nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "avg ceil": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "avg ceil inside": nn.AvgPool2d((3, 2), 2, 1, ceil_mode=True, count_include_pad=False),
    "avg divisor": nn.AvgPool2d(2, divisor_override=3), "lp": nn.LPPool2d(2, 2),
    "mean": nn.AdaptiveAvgPool2d(1), "thirds": nn.AdaptiveAvgPool2d((3, 4)),
    "odd": nn.AdaptiveAvgPool2d((5, None)), "most": nn.AdaptiveMaxPool2d(1, return_indices=True),
    "max thirds": nn.AdaptiveMaxPool2d((3, 2), return_indices=True),
    "max odd": nn.AdaptiveMaxPool2d((4, 5), return_indices=True),
    "more": nn.AdaptiveAvgPool2d((13, 11)), "one": nn.AdaptiveAvgPool2d((1, 3)),
    "max more": nn.AdaptiveMaxPool2d((13, 11), return_indices=True),
    "max row": nn.AdaptiveMaxPool2d((1, None), return_indices=True),
}  # fmt: skip

LINES = {
    f"{k} by {s}": [
        make
        for p, ceil in itertools.product((0, 1), (False, True))
        for make in (nn.MaxPool1d(k, s, p, ceil_mode=ceil), nn.AvgPool1d(k, s, p, ceil, False), nn.AvgPool1d(k, s, p, ceil))
    ]
    for k in (2, 3, 5) for s in (1, 2, 3)
} | {
    f"{m} bins": [nn.AdaptiveAvgPool1d(m), nn.AdaptiveMaxPool1d(m)] for m in (1, 2, 5, 11, 14)
}  # fmt: skip
VOLUMES = {
    "max": nn.MaxPool3d(2), "avg": nn.AvgPool3d(3, 2, 1), "adaptive": nn.AdaptiveAvgPool3d((2, 1, 2)),
    "mean": nn.AdaptiveAvgPool3d(1), "replicated": nn.ReplicationPad3d(1),
}  # fmt: skip
BINS = [(3, 4), (2, 2), (7, 1), (1, 7), (10, 3), (12, 9), (5, None)]


def all_of(modules):
    return lambda x: [m(x) for m in modules]


images = normal(2, 3, 9, 8)
cases("pad images", PADS, images, dims=[(2, 3, 0, 1)])
cases("pool", POOLS, images, dims=[(2, 3, 0, 1)])
cases("pool lines", {k: all_of(m) for k, m in LINES.items()}, normal(2, 3, 11), dims=[2])
cases("pool volumes", VOLUMES, normal(1, 2, 6, 5, 4), dims=[(2, 3, 4)])

ties = integers(0, 3, 2, 4, 10, 7).to(D)


@case("adaptive_avg_pool2d", ties, dims=[(2, 3, 1)])
def bins(x):
    return [F.adaptive_avg_pool2d(x, m) for m in BINS]


@case("adaptive_max_pool2d", ties, dims=[(2, 3, 1)], name="bins")
def most(x):
    return [F.adaptive_max_pool2d(x, m, True) for m in BINS]


@case("adaptive_max_pool2d", ties[0], dims=[(0, 1, 2)])
def without_a_batch(x):
    return [F.adaptive_max_pool2d(x, m, True) for m in BINS]
