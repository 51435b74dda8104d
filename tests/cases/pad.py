"""Padding: every mode, growing and cropping."""

import torch
import torch.nn.functional as F

from .table import case, cases, integers, normal

MODES = ["constant", "reflect", "replicate", "circular"]
ENDS = [(1, 2), (0, 3), (6, 0), (2, -1), (-3, 2), (-2, -1), (-5, 0), (0, 0), (6, 6), (-1, -6)]
FRAMES = [(1, 2, 3, 0), (2, 2, 2, 2), (0, 0, 1, 1), (-1, 2, 3, -2)]


def padded(mode, pads):
    return lambda x: [F.pad(x, p, mode) for p in pads]


cases("pad", {m: padded(m, ENDS) for m in MODES}, normal(2, 3, 9), dims=[(2, 0, 1)])
cases("pad frames", {m: padded(m, FRAMES) for m in MODES}, normal(2, 3, 7, 6), dims=[(2, 3, 0, 1)])


@case("pad", normal(3, 7, 5))
def what_only_constant_can(x):
    return [F.pad(x, p, value=2.5) for p in [(), (1, 1, 0, 2, 3, -1), (0, 0, -4, 1), (-4, 1)]]


@case("pad", integers(0, 9, 7), grad=False, name="integers")
def whole_numbers(x):
    return F.pad(x, (1, 2)), torch.constant_pad_nd(x, (1, 2), 7)


@case("pad", normal(0, 7))
def no_elements(x):
    return F.pad(x, (1, 1))


@case("pad", normal(3, 4, 7))
def leaf_ops(x):
    return torch.ops.aten.reflection_pad1d(x, [2, 1]), torch.ops.aten.replication_pad2d(
        x, [2, 1, 0, 1]
    )
