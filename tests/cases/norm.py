"""Normalisation: modules in all their settings, operands that are sharded themselves."""

import torch
import torch.nn.functional as F
from torch import nn

from .table import D, case, cases, normal


def random(module):
    """The module in fp64 with weights and running statistics that are not its initial ones."""
    module = module.to(D)
    for v in (*module.parameters(), *module.buffers()):
        if v.is_floating_point():
            v.data.uniform_(0.5, 1.5)
    return module


CHANNELWISE = [
    nn.BatchNorm2d(6),
    nn.BatchNorm2d(6).eval(),
    nn.BatchNorm2d(6, momentum=None, affine=False),
    nn.BatchNorm2d(6, track_running_stats=False).eval(),
    nn.SyncBatchNorm(6).eval(),
    nn.InstanceNorm2d(6),
    nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    nn.InstanceNorm2d(6, affine=True, track_running_stats=True).eval(),
    nn.GroupNorm(3, 6),
    nn.GroupNorm(1, 6, affine=False),
    nn.GroupNorm(6, 6),
]
LAST = [
    nn.LayerNorm(5),
    nn.LayerNorm((7, 5)),
    nn.LayerNorm((6, 7, 5), bias=False),
    nn.LayerNorm((6, 7, 5), elementwise_affine=False),
    nn.RMSNorm(5, eps=1e-3),
    nn.RMSNorm((7, 5)),
    nn.RMSNorm((6, 7, 5), elementwise_affine=False),
]

POINTS = [nn.BatchNorm1d(6), nn.GroupNorm(2, 6)]
RESPONSE = [nn.LocalResponseNorm(size, alpha=0.5) for size in (2, 3, 5)]


def named(modules):
    """By what is written in its brackets, and whether it trains."""
    return {f"{m}{'' if m.training else ' eval'}": m for m in modules}


MODULES = named(random(m) for m in CHANNELWISE + LAST)
x = normal(2, 6, 7, 5) + 0.5
cases("norm", MODULES, x, dims=[(2, 1, 3, 0)], stays=True)
cases("norm of channels last", named(random(m) for m in (nn.BatchNorm2d(6), nn.InstanceNorm2d(6), nn.GroupNorm(3, 6))),
      x.contiguous(memory_format=torch.channels_last))  # fmt: skip
cases("norm of volumes", named(random(m) for m in (nn.BatchNorm3d(6), nn.InstanceNorm3d(6))),
      normal(2, 6, 7, 5, 1), dims=[(2, 3)])  # fmt: skip
for points in (x[..., 0, 0].clone(), x[..., 0].clone()):
    cases(f"norm of {points.ndim} dims", named(map(random, POINTS)), points)
cases("local response norm", named(RESPONSE), x)
case("local response norm", x[..., 0].clone(), name="of points")(RESPONSE[2])

# the square of their mean is too large for a number, that of their deviations is not
huge = 1.6e154 * (1 + 0.03 * normal(2, 6, 7, 3))
case("norm of huge numbers", huge, name="group", dims=[(2, 0)], grad=False)(
    random(nn.GroupNorm(3, 6))
)

case("group_norm", x, *normal(2, 6), name="sharded weights")(
    lambda v, p, q: F.group_norm(v, 2, p, q)
)
case("layer_norm", x, normal(5), name="sharded weights")(lambda v, p: F.layer_norm(v, (5,), p))
case("rms_norm", x, normal(5), name="sharded weights")(lambda v, p: F.rms_norm(v, (5,), p))
