"""Grid sampling: images and places, in every mode; affine grids."""

import itertools

import torch
import torch.nn.functional as F

from .table import case, normal

MODES = list(
    itertools.product(
        ["bilinear", "nearest", "bicubic"], ["zeros", "border", "reflection"], [True, False]
    )
)


def places(*shape, reach=1.6):
    """Places in the image and around it."""
    return (
        torch.rand(
            shape, generator=torch.Generator(torch.get_default_device()).manual_seed(5)
        ).double()
        * 2
        - 1
    ) * reach


def _takes_cubic_volumes():
    try:
        F.grid_sample(
            torch.zeros(1, 1, 1, 1, 1), torch.zeros(1, 1, 1, 1, 3), "bicubic", align_corners=True
        )
    except RuntimeError:
        return False
    return True


# since torch 2.15
CUBIC_VOLUMES = _takes_cubic_volumes()


def sampled(mode, padding, align):
    return lambda x, g: F.grid_sample(x, g, mode, padding, align)


image, volume = normal(2, 2, 7, 5), normal(2, 2, 5, 4, 6)
for i, how in enumerate(MODES):
    name, turn = " ".join(map(str, how)), (i % 2, 2)
    at = places(2, 5, 4, 2)
    case("grid_sample", image, at, dims=[None, (1, 2, 0, 3)], name=name, turn=turn)(sampled(*how))
    if how[0] != "bicubic" or CUBIC_VOLUMES:
        at = places(2, 3, 4, 3, 3)
        case("grid_sample volumes", volume, at, dims=[(2, 3, 4), 1], name=name, turn=turn)(
            sampled(*how)
        )
for size in ((3, 1, 4, 5), (3, 2, 2, 3, 4)):
    n = len(size) - 2
    case("affine_grid", normal(3, n, n + 1), name=str(size))(
        lambda t, size=size: [F.affine_grid(t, size, align) for align in (True, False)]
    )
