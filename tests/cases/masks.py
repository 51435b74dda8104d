"""Masks, nonzero, repeats: results sharded in sizes that depend on values."""

import torch
from layouts import plain

from .table import case, cases, normal

N = 8
x = normal(N, 5, 3)
whole = x > 0.3
rows = torch.tensor([1, 0, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
pairs = whole[..., 0]
columns = torch.tensor([0, 1, 1, 0, 1], dtype=torch.bool)
none = torch.zeros(N, dtype=torch.bool)
repeats = torch.tensor([2, 0, 1, 3, 0, 0, 1, 2])
v = normal(int(rows.sum()), 5, 3)
SELECT = {
    "masked_select": (lambda x, m: x.masked_select(m), whole),
    "masked_select broadcast": (lambda x, m: x.masked_select(m[:, None, None]), rows),
    "x[x > 0]": (lambda x, m: x[m] * x[x > 0][:1], whole),
    "x[rows]": (lambda x, m: (x[m], x[m] * 2), rows),
    "x[pairs]": (lambda x, m: x[m], pairs),
    "x[nothing]": (lambda x, m: x[m], none),
    "x[:, columns]": (lambda x, m: x[:, m[:5] | m[3:]], rows),
    "x[:, pairs]": (lambda x, m: x[:, m[0]], whole),
    "x[rows, i]": (lambda x, m: x[m, [0, 1, 2, 2, 4]], rows),
    "x[rows, :, i]": (lambda x, m: x[m, :, 1], rows),
    "repeats": (lambda x, m: (x.repeat_interleave(m, 0), torch.repeat_interleave(m)), repeats),
    "repeats of all": (lambda x, m: x[:, 0, 0].repeat_interleave(m, output_size=9), repeats),
    "repeats of one": (
        lambda x, m: (x.repeat_interleave(2), x.repeat_interleave(m[:1], 1)),
        repeats,
    ),
}
PUT = {
    "x[rows] = v": (rows, lambda x, m, v: write(x, m, v)),
    "x[rows] = one": (rows, lambda x, m, v: write(x, m, v[0])),
    "x[rows] = number": (rows, lambda x, m, v: write(x, m, 3.0)),
    "x[pairs] = one": (pairs, lambda x, m, v: write(x, m, v[0, :1])),
    "x[pairs] = v": (pairs, lambda x, m, v: write(x, m, x.detach().sin()[m] * v[:1, 0])),
    "x[all] = v": (whole, lambda x, m, v: write(x, m, x.detach().cos()[m])),
    "x[:, columns] = v": (rows, lambda x, m, v: write(x, (slice(None), m[:5]), v[:1, :3])),
    "x[:, columns] = all": (
        rows,
        lambda x, m, v: write(x, (slice(1, 6), m[:5]), v[:, :3] * v[0, 0, 0]),
    ),
    "masked_scatter": (whole, lambda x, m, v: x.masked_scatter(m, v)),
    "masked_scatter_": (whole, lambda x, m, v: (x * 1).masked_scatter_(m[:, :1], v)),
    "masked_fill_": (whole, lambda x, m, v: (x * 1).masked_fill_(m, v[0, 0, 0])),
}
PLACES = {
    "nonzero": lambda m: (m.nonzero(), torch.argwhere(m), m.nonzero(as_tuple=True)),
    "where": lambda m: torch.where(m),
    "static": lambda m: [torch.nonzero_static(m, size=n, fill_value=-7) for n in (0, 3, 200)],
    "count": lambda m: torch.count_nonzero(m),
    "one row": lambda m: m[:1].nonzero(),
    "column": lambda m: m.mT.nonzero(),
}


def write(x, index, value):
    y = x * 1
    y[index] = value
    return y


for name, (fn, mask) in SELECT.items():
    case("mask", x, mask, name=name)(fn)
for name, (mask, fn) in PUT.items():
    case("mask", x, mask, v, dims=[None, None, (0, 1)], name=name, skip=plain(0))(fn)
cases("nonzero", PLACES, whole)
