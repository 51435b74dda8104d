"""Reductions, extrema and order statistics."""

import torch

from .table import case, cases, integers, normal

INF = float("inf")


def over(f, **kwargs):
    return lambda a: [f(a), *(f(a, dim=d, **kwargs) for d in (0, 1, -1, (1, 2), (0, 1)))]


SMOOTH = {
    "sum": over(torch.sum), "mean": over(torch.mean, keepdim=True),
    "var": over(torch.var), "std": over(torch.std, correction=0),
    "var_mean": lambda a: (*torch.var_mean(a, 1), *torch.std_mean(a, (0, 1), keepdim=True)),
    "unbiased": lambda a: (a.var(False), a.std(1, False, True), a.var(unbiased=True)),
    "logsumexp": lambda a: [a.logsumexp(d) for d in (0, 1, (1, 2))],
    "complex": lambda a: [abs(f(torch.complex(a, a * a), d)) for d in (1, (0, 1))
                          for f in (torch.var, torch.std, torch.logsumexp, torch.sum)],
    "dist": lambda a: (torch.dist(a, a.flip(1)), torch.dist(a, a * 2, 3), torch.cov(a[0])),
}  # fmt: skip
ROUGH = {
    "prod": lambda a: (a.prod(), a.prod(1), a.prod(0, keepdim=True)),
    "norms": lambda a: [torch.linalg.vector_norm(a, p, d) for p in (1, 2, 3.5, 0, INF, -INF)
                        for d in (None, 1, (0, 1))] + [torch.linalg.vector_norm(a, -1.5, 1)],
    "linalg norm": lambda a: (torch.linalg.norm(a), torch.linalg.norm(a, 1, (1, 2)),
                              torch.linalg.matrix_norm(a, -INF, (0, 1))),
    "norm": lambda a: (a.norm(), a.norm(dim=1), torch.norm(a, 1, 1), a.norm(INF)),
    "nansum": lambda a: torch.nansum(torch.where(a > 1, float("nan"), a), 1),
    "nanmean": lambda a: torch.nanmean(torch.where(a > 1, float("nan"), a), 1),
    "amax": lambda a: (a.amax(1), a.amin((0, 1)), a.amax(), a.max(), a.min(), *a.aminmax(dim=1)),
    "max": lambda a: (*a.max(1), *a.min(1, keepdim=True), *a.max(0), *torch.max(a, dim=2)),
    "order": lambda a: (*a.median(1), *a.nanmedian(0), *a.kthvalue(2, 1, True)),
    "quantile": lambda a: (a.quantile(0.3, 1), a.nanquantile(torch.tensor([0.2, 1.0]).to(a), 1, True)),
    "maximum": lambda a: (torch.max(a, a.roll(1, 1)), torch.minimum(a, a * 2)),
}  # fmt: skip
COUNTS = {
    "logical": lambda a: ((a > 0).all(1), (a > 2).any(1), (a > 9).any(), (a < 9).all(), (a > 0).any(
        (0, 1)), (a > 0).all(dim=()), a.bool().to(torch.uint8).all(1), torch.allclose(a, a + 1e-9)),
    "of distributions": lambda a: (torch._is_all_true(a < 9), torch._is_any_true(a > 2)),
    "count": lambda a: (a.count_nonzero(), a.count_nonzero(1), (a > 0).sum(1)),
    "arg": lambda a: (a.argmax(), a.argmin(), a.argmax(1), a.argmin(1, keepdim=True), a.argmax(0)),
    "ints": lambda a: ((a * 9).long().sum(1), (a * 9).long().amax(1), *(a * 9).long().min(1),
                       (a * 9).int().prod(1), (a > 0).prod(1, dtype=torch.uint8)),
    "mode": lambda a: (*a.round().mode(1), *torch.mode(a.round(), 2)),
}  # fmt: skip

x = normal(3, 7, 4)
GIVEN = {"": x, " of ties": integers(-1, 2, 3, 7, 4).to(x), " with zeros": x * (x.abs() > 0.5)}
cases("reduce", SMOOTH, x)
for which, given in GIVEN.items():
    cases(f"reduce{which}", ROUGH, given)
    cases(f"reduce{which}", COUNTS, given, grad=False)

# an empty shard adds nothing to the variance, though the square of its distance is no number
case("reduce", 1.6e154 * (1 + 0.03 * x), name="var of huge numbers", dims=[(1, 0)])(
    lambda a: (*torch.var_mean(a, 1), a.std((0, 1)))
)


@case("reduce", x.float())
def in_fp32(a):
    return a.std(1), a.prod(1), a.logsumexp(1), torch.amax(a)
