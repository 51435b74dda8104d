"""Products: linear, matmul and its kin, einsum; rows of tables."""

import torch
import torch.nn.functional as F

from .table import case, cases, integers, normal

EQUATIONS = [
    ("bnc,oc->bno", (2, 7, 6), (5, 6)),
    ("bnc,bmc->bnm", (2, 7, 6), (2, 5, 6)),
    ("bnc,bng->bgc", (2, 7, 6), (2, 7, 3)),
    ("...nc,c->...n", (2, 7, 6), (6,)),
    ("bnc,bnc->", (2, 7, 6), (2, 7, 6)),
    ("bnc,bnc", (2, 7, 6), (2, 7, 6)),
    ("bnc,d->dn", (2, 7, 6), (3,)),
]

SHAPES = [((6,), (6,)), ((7, 6), (6,)), ((6,), (6, 7)), ((3, 1, 7, 6), (2, 6, 4)), ((1, 7, 6), (5, 6, 4)), ((2, 7, 6), (2, 6, 7))]  # fmt: skip

x, w, b = normal(2, 7, 6), normal(5, 6), normal(5)
case("linear", x, w, b, name="with a bias")(F.linear)
case("linear", x, w, name="without")(F.linear)
case("linear", x.float(), w.float(), b.float(), dims=[(1, 2, 0), (), ()], name="in fp32")(F.linear)
for p, q in SHAPES:
    case("matmul", normal(*p), normal(*q), name=f"{p} {q}")(torch.matmul)
case("matmul", x, name="with itself")(lambda a: a @ a.mT)
KIN = {
    "tensordot": (lambda a, c: torch.tensordot(a, c, 1), x, w.T), "inner": (torch.inner, x, w),
    "outer": (torch.outer, normal(7), normal(7)), "mv": (torch.mv, x[0], x[1, 0]),
    "addmm": (torch.addmm, normal(7, 5), x[0], w.T), "bmm": (torch.bmm, x, x.mT.contiguous()),
    "addmm scaled": (lambda i, p, q: torch.addmm(i, p, q, beta=0.5, alpha=2), normal(7, 5), x[0], w.T),
    "bilinear": (lambda a, c, e: F.bilinear(a, c, e), x, x.flip(1), normal(3, 6, 6)),
}  # fmt: skip
# what is written to was made by an op, as no leaf may be
IN_PLACE = {
    "addmm_": (lambda i, p, q: (i * 2).addmm_(p, q), normal(7, 5), x[0], w.T),
    "addmm_ scaled": (lambda i, p, q: i.mul(2).addmm_(p, q, beta=0.5, alpha=2), normal(7, 5), x[0], w.T),
    "addmv_": (lambda i, p, q: (i * 2).addmv_(p, q, alpha=3), normal(7), x[0], x[1, 0]),
    "baddbmm_": (lambda i, p: (i * 2).baddbmm_(p, p.mT), normal(2, 7, 7), x), "addbmm_": (lambda i, p: (i * 2).addbmm_(p, p.mT), normal(7, 7), x),
    "addr_": (lambda i, p, q: (i * 2).addr_(p, q, beta=3), normal(7, 6), normal(7), normal(6)),
    "addr_ of a view": (lambda i, p, q: [y := i * 2, y[1:].addr_(p, q)][0], normal(7, 6), normal(6), normal(6)),
}  # fmt: skip
for name, (fn, *operands) in (KIN | IN_PLACE).items():
    case("product", *operands, name=name)(fn)


def einsum(equation):
    return lambda *operands: torch.einsum(equation, *operands)


for equation, *shapes in EQUATIONS:
    case("einsum", *(normal(*s) for s in shapes), name=equation)(einsum(equation))
case("einsum", x, name="bnc->cb")(einsum("bnc->cb"))
case("einsum", x, w, normal(7, 3), name="three")(einsum("bnc,oc,ng->bgo"))
for p, q in (((5, 1), (6, 4)), ((5, 6), (1, 4)), ((1, 6), (6, 4))):
    equations = {
        f"{e} {p} {q}": einsum(e) for e in ("ik,kj->ij", "ik,kj->kij", "...k,kj->...j", "ik,kj->")
    }
    cases("einsum", equations, normal(*p), normal(*q), share=2)

places = integers(0, 9, 2, 7)
case("embedding", places, normal(9, 9), dims=[(1, 0), (0, 1)], name="cut")(
    lambda i, table: F.embedding(i, table, 4)
)
case("embedding", places, normal(9, 9), dims=[(1, 0), (0, 1)], name="by frequency")(
    lambda i, table: F.embedding(i, table, 4, scale_grad_by_freq=True)
)
case("embedding", places % 5, name="module")(torch.nn.Embedding(5, 4, padding_idx=2, dtype=x.dtype))
