"""gather, scatter, index_*: input, index and source each plain or sharded in any dim."""

import torch

from .table import case, normal

N, E, C = 7, 9, 4
x = normal(N, C, 3)
rows = torch.tensor([5, 0, 6, 5, 2, 2, 0, 5, 6])  # 1, 3, 4 untouched
values = normal(E, C, 3)
element = torch.stack([torch.randperm(N)[:5] for _ in range(6)]).t()[:, :, None]
element = element.reshape(5, 3, 2)  # smaller than x in the other dims, no duplicates in a column
many = torch.randint(N, (E, 3, 2))
source = normal(E, 3, 2)
ties = source.round()
larger = normal(E + 1, C, 2)  # no gradients in torch
distinct = torch.randperm(N)[:4]
READS = {
    "index_select": (lambda x, i: x.index_select(0, i), rows),
    "x[i]": (lambda x, i: x[i], rows - 3),
    "x[i, :, i]": (lambda x, i: x[i, :, i % 3], rows),
    "x[:, i]": (lambda x, i: x.mT.transpose(0, 2)[1:3, :, i], rows),
    "x[i of 2 dims]": (lambda x, i: x[i], many[:, :, 0]),
    "x[few]": (lambda x, i: x[i], rows[:1]),
    "x[none]": (lambda x, i: x[i], rows[:0]),
    "gather": (lambda x, i: x.gather(0, i), many),
    "gather last": (lambda x, i: x.transpose(0, 2).gather(2, i.transpose(0, 2)), many),
    "gather rows": (lambda x, i: [x.gather(0, e) for e in (
        i[:, None, None].expand(-1, C, 3), i[:, None, None].expand(-1, 2, 3))], rows),
    "take": (lambda x, i: x.take(i * 11 - 5), many),
    "take_along_dim": (lambda x, i: x.take_along_dim(i[:, :1, :1], 0), many),
}  # fmt: skip
WRITES = {
    "index_add": (lambda x, i, v: x.index_add(0, i, v, alpha=2), rows, values),
    "index_copy": (lambda x, i, v: x.index_copy(0, i, v[:4]), distinct, values),
    "index_fill": (lambda x, i, v: (x.index_fill(0, i, 3.0), x.index_fill(0, i, v[0, 0, 0])),
        rows, values),
    "index_reduce": (lambda x, i, v: [x.index_reduce(0, i, v, r, include_self=s) for r, s in (
        ("prod", True), ("mean", False), ("amax", True), ("amin", False))], rows, values),
    "x[i] = v": (lambda x, i, v: x.index_put((i - 3,), v[:4]), distinct, values),
    "accumulate": (lambda x, i, v: x.index_put((i - 3,), v, accumulate=True), rows, values),
    "accumulate 2": (lambda x, i, v: x.index_put((i, i % C), v[:, 0], accumulate=True), rows,
        values),
    "put": (lambda x, i, v: [x.put(i * 5 - 9, v[:4, 0, 0]), x.put(i, v[:4, 1, 0], accumulate=True)],
        distinct, values),
    "scatter": (lambda x, i, v: [x.scatter(0, i, v[:5]), x.scatter(0, i, 1.5)], element, source),
    "scatter reduce": (lambda x, i, v: [x.scatter(0, i, v, reduce="add"),
        x.scatter(0, i, 2.0, reduce="multiply")], many, source),
    "scatter_add": (lambda x, i, v: x.scatter_add(0, i, v), many, source),
    "scatter rows": (lambda x, i, v: [x.scatter_reduce(0, i[:, None, None].expand_as(v), v, r)
        for r in ("sum", "amax")] + [x.scatter(0, i[:4, None, None].expand(-1, 2, 3), v[:4, :2])],
        torch.cat([distinct, distinct, distinct[:1]]), values),
    "scatter_reduce": (lambda x, i, v: [x.scatter_reduce(0, i, v, r, include_self=s) for r in (
        "sum", "prod", "mean", "amax", "amin") for s in (True, False)], many, ties),
    "scatter last": (lambda x, i, v: x.transpose(0, 2).scatter_reduce(
        2, i.transpose(0, 2), v.transpose(0, 2), "amax"), many, ties),
}  # fmt: skip
NO_GRAD = {"scatter reduce"}

for name, (fn, index) in READS.items():
    case("gather", x, index, name=name)(fn)
for name, (fn, index, v) in WRITES.items():
    # ten reductions in one
    turn = (0, 2) if name == "scatter_reduce" else (0, 1)
    case("scatter", x, index, v, name=name, grad=name not in NO_GRAD, turn=turn)(fn)
