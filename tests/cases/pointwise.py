"""Elementwise ops, casts, writes in place."""

import torch
import torch.nn.functional as F
from layouts import plain

from .table import D, case, cases, normal


def in_place(a, b):
    c = a * 1.0
    c += b
    c.mul_(2).sub_(b, alpha=3)
    c[..., 1:3] *= 2
    c.clamp_(-3, 3)
    v = c.transpose(1, 2)
    v += 1
    c.masked_fill_(c > 2, 0.5)
    return F.relu(c, inplace=True)


def filled(a, v):
    c, d = a * 1.0, a * 1.0
    c[0].fill_(v.sum())
    c[..., 1].fill_(value=v[0])
    return c, d.fill_(v.sum())


PLAIN = {
    f.__name__: f
    for f in (
        F.gelu, F.silu, F.elu, F.softplus, F.hardswish, F.mish, F.leaky_relu, F.relu6, F.logsigmoid,
        F.tanhshrink, torch.sin, torch.sigmoid, torch.tanh, F.selu, F.softsign, torch.round, torch.isnan,
        torch.nan_to_num, torch.neg, F.hardtanh,
    )
} | {
    "clamp": lambda a: (a.clamp(-1, 1), a.clamp(min=0)), "sqrt": lambda a: a.abs().sqrt(),
    "lerp": lambda a: torch.lerp(a, a * 2, 0.3), "logical": lambda a: (a > 0) & (a < 1),
    "threshold": lambda a: F.threshold(a, 0.1, 20), "masked_fill": lambda a: a.masked_fill(a > 0, -1.0),
    "remainder": lambda a: (a % 2, a.detach() // 2), "glu": lambda a: F.glu(a[..., :4]),
    "prelu": lambda a: F.prelu(a, torch.ones(7, dtype=D)),
    "numbers": lambda a: 2 - a + (1 / (a + 9)) + 2**a,
}  # fmt: skip
PAIRS = {
    "arithmetic": lambda a, b: a * b + 2 - a / 3,
    "times": lambda a, b: a * b,
    "sub": lambda a, b: torch.sub(a, b, alpha=2),
    "atan2": torch.atan2,
    "where": lambda a, b: torch.where(a > 0, b, 0.5),
}

x, y = normal(2, 7, 5), normal(2, 7, 5)
cases("pointwise", PLAIN, x, share=3)
cases("pointwise of two", PAIRS, x, y, share=2)
for shape, own in (((7, 1), (0,)), ((1, 1, 5), (2,)), ((7, 5), (0, 1)), ((5,), (0,)), ((), ())):
    case("broadcast", x, normal(*shape), dims=[None, own], name=str(shape))(
        lambda a, b: a * b.exp()
    )
case("broadcast", normal(7, 1, 5), normal(6, 5), name="outer")(lambda a, b: a * b)
case("addcmul", x, y[:, :1], y[0], name="of three shapes")(torch.addcmul)
case("in place", x, y, name="chain", skip=plain(0))(in_place)
case("in place", x, normal(3), skip=plain(0))(filled)
