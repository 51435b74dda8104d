"""Convolutions: kernels, strides, dilations, groups and padding modes, transposed or not."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from .table import D, case, cases, normal

# kernel, stride, padding, dilation
WAYS = [
    (k, s, p, d)
    for k, s, p, d in itertools.product((1, 2, 3, 5), (1, 2, 3), (0, 1, 2), (1, 2))
    if 9 + 2 * p >= d * (k - 1) + 1
]
# a kernel between which rows of the result lie
APART = [(1, 3, 1, 0), (1, 4, 2, 3), (2, 4, 1, 2), (2, 5, 3, 0)]


class Each(nn.Module):
    """All of some modules, on one input."""

    def __init__(self, *made):
        super().__init__()
        self.made = nn.ModuleList(made).to(D)

    def forward(self, x):
        return [m(x) for m in self.made]


def lines(kernel, stride):
    ways = [(i, p, d) for i, (k, s, p, d) in enumerate(WAYS) if (k, s) == (kernel, stride)]
    return Each(*(
        nn.Conv1d(4, 2, kernel, stride, p, d, groups=1 + (i % 3 == 0), bias=i % 2 == 0) for i, p, d in ways
    ))  # fmt: skip


def turned(kernel, stride):
    made = []
    for i, (k, s, p, d) in enumerate(WAYS):
        extra = i % max(s, d)
        there = p <= d * (k - 1) and 6 * s - 2 * p + d * (k - 1) + 1 + extra > 0
        if (k, s) == (kernel, stride) and there:
            made.append(
                nn.ConvTranspose1d(
                    4, 2, k, s, p, extra, groups=1 + (i % 3 == 0), bias=i % 2 == 0, dilation=d
                )
            )
    return Each(*made)


PAIRS = list(itertools.product((1, 2, 3, 5), (1, 2, 3)))
IMAGES = {
    "same": nn.Conv2d(4, 6, 3, padding=1), "strided": nn.Conv2d(4, 6, (3, 2), (2, 2), (1, 0)),
    "auto": nn.Conv2d(4, 2, (4, 3), padding="same", dilation=(1, 2), groups=2),
    "patches": nn.Conv2d(4, 6, 2, 2), "pointwise": nn.Conv2d(4, 6, 1),
    "transposed": nn.ConvTranspose2d(4, 6, 2, 2),
    "transposed far": nn.ConvTranspose2d(4, 6, (4, 5), 2, 1, (1, 0)),
    "depthwise": nn.Conv2d(4, 4, 5, padding=2, groups=4, bias=False),
}  # fmt: skip
VOLUMES = {
    "same": nn.Conv3d(2, 3, 3, padding=1), "valid": nn.Conv3d(2, 3, 3),
    "transposed": nn.ConvTranspose3d(2, 3, 2, 2),
}  # fmt: skip
MODES = {
    m: nn.Conv2d(4, 4, (3, 5), padding=(1, 2), padding_mode=m)
    for m in ("circular", "reflect", "replicate")
}

for k, s in PAIRS:
    case("conv1d", normal(2, 4, 9), dims=[2], name=f"{k} by {s}")(lines(k, s))
    case("conv_transpose1d", normal(2, 4, 7), dims=[2], name=f"{k} by {s}")(turned(k, s))
case("conv_transpose1d", normal(2, 4, 7), dims=[2], name="rows between kernels")(
    Each(*(nn.ConvTranspose1d(4, 2, *way) for way in APART))
)
image = normal(2, 4, 9, 8)
cases("conv2d", {k: m.to(D) for k, m in IMAGES.items()}, image, dims=[(2, 3, 0, 1)])
cases("conv2d", {k: m.to(D) for k, m in MODES.items()}, image, dims=[(2, 3)], stays=True)
cases("conv3d", {k: m.to(D) for k, m in VOLUMES.items()}, normal(1, 2, 5, 6, 4), dims=[(3, 2, 4)])
for groups in (1, 2, 4, 8):
    both = Each(
        nn.Conv2d(8, 16, 3, padding=1, groups=groups),
        nn.ConvTranspose2d(8, 16, 3, 2, 1, groups=groups),
    )
    case("conv2d", normal(2, 8, 5, 4), dims=[(1, 2)], name=f"channels of {groups} groups")(both)

LINE, WEIGHT = normal(4, 9), normal(2, 4, 3)
case("conv1d", LINE, WEIGHT, dims=[1, 0], name="no batch")(F.conv1d)
case("conv2d", image, normal(4, 4, 3, 3), normal(4), dims=[(2, 3), (0, 1), ()], name="function")(
    lambda x, w, b: (
        F.conv2d(x, w, b),
        torch.convolution(x, w, b, [2, 1], [1, 1], [1, 1], False, [0, 0], 1),
    )
)
case(
    "conv_transpose2d",
    image,
    normal(4, 4, 3, 3),
    normal(4),
    dims=[(2, 3), (0, 1), ()],
    name="function",
)(lambda x, w, b: torch.convolution(x, w, b, [2, 1], [1, 1], [1, 1], True, [0, 0], 1))


@case("conv1d", normal(2, 3, 9), normal(2, 3, 3), dims=[2, ()])
def penalty(x, w):
    """The gradient of a gradient penalty."""
    y = F.conv1d(x, w, padding=1).tanh()
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return (g * g).sum()
