"""x[...] and x[...] = v by slices, integers and tensors of indices; parts written back."""

import numpy as np
import torch
from layouts import plain

from .table import case, cases, normal

j = torch.tensor([[0, 2], [-3, 1]])
GET = {
    "one": lambda x, i: x[i],
    "list": lambda x, i: x[[0, -1], 1:],
    "range": lambda x, i: x[range(3)],
    "array": lambda x, i: x[i.new_tensor([1, 1]).numpy() if not hasattr(i, "spec") else [1, 1]],
    "two": lambda x, i: x[i, i % 5],
    "apart": lambda x, i: x[i, :, i % 3],
    "broadcast": lambda x, i: x[i[:, None], torch.arange(2), 1],
    "last": lambda x, i: x[..., i % 3],
    "middle": lambda x, i: x[2:, i % 5],
    "int first": lambda x, i: x[3, :, i % 3],
    "none": lambda x, i: x[None, i, None],
    "steps": lambda x, i: x[::2, i[:2] % 5, ::2],
    "2-d": lambda x, i: x[j],
    "2-d apart": lambda x, i: x[j, 1:3, j],
    "0-d": lambda x, i: x[i[0]],
    "mixed": lambda x, i: x[i[:2], torch.tensor([True, False, False, False, True])],
}
SET = {
    "rows": lambda y, i, v: put(y, i, v),
    "one": lambda y, i, v: put(y, i, v[0]),
    "number": lambda y, i, v: put(y, i, 2),
    "pairs": lambda y, i, v: put(y, (i, i % 5), v[:, 0]),
    "apart": lambda y, i, v: put(y, (i, slice(None), i % 3), v[:, :, 0]),
    "part": lambda y, i, v: put(y, (slice(1, None), i[:3] % 5), v[0, 0]),
    "int": lambda y, i, v: put(y, (3, i % 5), v[:, 0]),
    "leading ones": lambda y, i, v: put(y, i, v[None]),
    "column": lambda y, i, v: put(y, (slice(None), 2, i[3:] % 3), v[0, 0, :2]),
    "basic": lambda y, i, v: put(y, (slice(None), 2), v[0, 0]),
    "row": lambda y, i, v: put(y, (3, ..., 1), v[0, :, 0]),
    "2-d": lambda y, i, v: put(y, torch.tensor([[0, 7], [2, 4]]), v[:4].reshape(2, 2, 5, 3)),
}
PARTS = {
    "slice_scatter": lambda x, v: (x.slice_scatter(v[:3], 0, 2, 7, 2), x.slice_scatter(
        v[:, :1].repeat(2, 1, 1)[:8], 1, -1), x.slice_scatter(v[:0], 0, 4, 2)),
    "select_scatter": lambda x, v: (x.select_scatter(v[0], 0, -1), x.select_scatter(
        v[1:4, :, 0].mT.repeat(2, 1)[:8], 1, 2)),
    "diagonal_scatter": lambda x, v: (x.diagonal_scatter(v[:3, :, 1], 0, 0, 1),
        x[0].diagonal_scatter(v[0, 0, :2], 1), x.diagonal_scatter(v[:, :2, 0].float(), -1, 2, 0)),
    "unsafe": lambda x, v: (*torch.unsafe_split(x, 3), *torch.unsafe_chunk(x, 3, 1),
        *torch.split_with_sizes_copy(x, [1, 7])),
}  # fmt: skip


def put(x, index, value):
    y = x * 1
    y[index] = value
    return y


x, i, v = normal(8, 5, 3), torch.tensor([6, -1, 0, 2, 3]), normal(5, 5, 3)
cases("x[...]", GET, x, i)
cases("x[...] = v", SET, x, i, v, dims=[(0, 1), (0,), (0, 1)], skip=plain(0))
cases("scatter of parts", PARTS, x, v)


@case("x[...]", x, dims=[(0, 1)])
def few_truth_values(x):
    return (x > 0)[torch.tensor([5]), :, 1]


@case("x[...]", x, i, dims=[(0, 1), (0,)])
def lists(x, i):
    """A list of more than numbers stands for a tuple."""
    return (
        x[[[0, 2], [1, 1]]],
        x[[i, slice(1, 3)]],
        x[[None, 3]],
        x[[torch.tensor(1), torch.tensor(2)]],
        x[[np.array([0, 2]), np.array([1, 1])]],
        x[[np.array([0, 2]), 1]],
    )


@case("x[...] = v", x, dims=[(0, 1)])
def masks_of_numbers(x):
    """What one mask shows is filled with one number of any dtype; leading dims of one are dropped."""
    y = x * 1
    y[x.detach()[:, 0, 0] > 0, :] = torch.tensor([[2]])
    y[[x.detach()[..., 0] > 1]] = x.detach().max().float()
    y[1:3] = x[4:5, None, :1]
    y[0] = x[None, None, 5:6, :1]
    return y


@case("parts written", x)
def parts_written(x):
    """Slices of torch.tensor_split and what unsafe_split gives are written to, unlike views of split."""
    y = x * 1
    y.tensor_split(3)[1].mul_(2)
    y.tensor_split((2, 4), 1)[0].sin_()
    y.hsplit([2])[1].neg_()
    return y, torch.unsafe_split(x * 1, 3)[1].mul_(2), torch.unsafe_chunk(x * 1, 2)[0].sin_()


@case("x[...] = v", x, v[0].clone(), skip=plain(0))
def rows_changed(x, w):
    """Rows of a sharded dim are copies, which in-place ops write back."""
    y = x * 1
    y[2] += w
    y[3].add_(w * 2)
    y[-1] *= 2.5
    y[1:, 1:3][2].mul_(3)
    t = y[1]
    t[0] = 5.0
    t.sub_(w)
    y[4] = t + y[1]
    y[0].detach().zero_()
    y.transpose(0, 1)[:, 5].sub_(w)
    z = x.mT * 1
    z[..., 6, 1:, 0] += w[1:3, 0]
    return y, t, z
