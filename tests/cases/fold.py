"""Sliding blocks, rotations and max-unpooling."""

from functools import partial

import torch
import torch.nn.functional as F

from .table import case, cases, normal

BLOCKS = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 1)},
    {"kernel_size": 3, "stride": 3, "padding": 2, "dilation": (2, 1)},
    {"kernel_size": (1, 2), "stride": (4, 2)},
    {"kernel_size": (5, 1), "padding": (4, 0), "stride": 2},
]


def unpooled(x, kernel=2, stride=None, **more):
    fn, back = {
        3: (F.max_pool1d, F.max_unpool1d),
        4: (F.max_pool2d, F.max_unpool2d),
        5: (F.max_pool3d, F.max_unpool3d),
    }[x.ndim]
    y, index = fn(x, kernel, stride, return_indices=True)
    return back(y, index, kernel, stride, **more)


def blocks(how):
    return " ".join(f"{k}={v}" for k, v in how.items())


UNFOLD = {blocks(h): partial(F.unfold, **h) for h in BLOCKS}
cases("unfold rows", UNFOLD, normal(2, 3, 9, 6), dims=[(2, 3, 0, 1)])
cases("unfold columns", UNFOLD, normal(2, 3, 6, 9), dims=[(3, 2)])
case("unfold", normal(2, 7, 5), name="no batch")(partial(F.unfold, kernel_size=3, padding=1))
for how in BLOCKS:
    columns = F.unfold(normal(2, 3, 9, 6), **how)
    case("fold", columns, dims=[(2, 1, 0)], name=blocks(how))(
        partial(F.fold, output_size=(9, 6), **how)
    )
case("unfold", normal(2, 1, 5), name="one row")(partial(F.unfold, kernel_size=3, padding=1))


@case("unfold", normal(2, 8, 3))
def method(x):
    ways = [(1, 1), (3, 1), (2, 2), (4, 3), (2, 5), (8, 1)]
    return [*(x.unfold(1, size, step) for size, step in ways), x.unfold(-1, 2, 1)]


@case("as_strided", normal(2, 8, 3))
def windows(x):
    turned = x.mT.contiguous().mT
    return [
        x.as_strided((2, 3, 4, 3), (24, 6, 3, 1)), x.as_strided((6, 3, 2), (3, 3, 24)),
        x.as_strided((4, 1, 3, 2), (6, 5, 0, 24), 4), turned.as_strided((2, 3, 4, 3), (24, 2, 1, 8)),
        x.view(2, 2, 4, 3).as_strided((2, 3, 4, 3), (24, 6, 3, 1)), torch.as_strided(x, (), (), 30),
    ]  # fmt: skip


@case("rot90", normal(3, 5, 4))
def rot90(x):
    return [torch.rot90(x, k, d) for k in (-1, 0, 1, 2, 3) for d in ((0, 1), (1, 2))]


for shape in ((2, 3, 8), (2, 8, 6), (2, 3, 8, 6), (2, 2, 4, 8, 6)):
    case("max_unpool", normal(*shape), name=str(shape))(unpooled)
    case("max_unpool", normal(*shape), name=f"{shape} overlapping")(
        partial(unpooled, kernel=3, stride=1)
    )
case("max_unpool", normal(2, 3, 10, 8), name="larger")(partial(unpooled, output_size=(11, 9)))
case(
    "max_unpool",
    normal(1, 1, 8, 5),
    torch.randperm(40).view(1, 1, 8, 5),
    dims=[(2, 3), ()],
    name="places of its own",
)(lambda x, i: F.max_unpool2d(x, i, 2, output_size=(16, 10)))
