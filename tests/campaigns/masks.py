"""Masks and sets without elements: attention, masked ops, rows of -inf and NaN, ignored targets."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from placing import MESHES, Placed, placed
from torch import Tensor, nn

from shardtensor.attention import strategy

D = torch.float64
LOW = (torch.finfo(D).min, -1e9, -math.inf, -1e4, -60.0)


def draw(rng: random.Random) -> Placed:
    kind = rng.random()
    if kind < 0.35:
        return _attention(rng)
    if kind < 0.5:
        return _masked(rng)
    if kind < 0.7:
        return _rows(rng)
    return _losses(rng) if kind < 0.85 else _empty(rng)


def _grads(rng: random.Random, *tensors: Tensor) -> list[Tensor]:
    return [x.requires_grad_(x.is_floating_point() and rng.random() < 0.7) for x in tensors]


# attention ----------------------------------------------------------------------------------------


def _mask(rng: random.Random, scores: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """None, a mask of bools or of numbers, that broadcasts; rows may be hidden from all keys."""
    kind = rng.choice(("none", "bool", "bool", "low", "low", "low", "random"))
    kind = "bool" if kind == "low" and dtype is torch.bfloat16 else kind
    if kind == "none":
        return None
    shape = [1 if rng.random() < 0.3 else n for n in scores[rng.randint(0, len(scores) - 2) :]]
    hidden = torch.rand(shape) < rng.choice((0.3, 0.6))
    hidden[..., rng.randrange(hidden.shape[-2]), :] = rng.random() < 0.7
    if kind == "bool":
        return ~hidden
    if kind == "random":
        return torch.randn(shape).to(dtype)
    low = max(rng.choice(LOW), torch.finfo(dtype).min) if rng.random() < 0.9 else -math.inf
    return torch.zeros(shape, dtype=dtype).masked_fill(hidden, low)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    with strategy(options.pop("kind")):
        return F.scaled_dot_product_attention(q, k, v, mask, **options)


def _attention(rng: random.Random) -> Placed:
    dtype = rng.choice((D, D, D, torch.float32, torch.bfloat16))
    lead = rng.choice(((2, 2), (2, 4), (1, 2), (3,), (), (2, 1, 2)))
    rows, keys = rng.randint(1, 9), rng.randint(1, 9)
    width, out = 4, rng.choice((4, 4, 4, 3))
    grouped = len(lead) > 1 and lead[-1] > 1 and rng.random() < 0.2
    causal = rng.random() < 0.3
    keys = rows if causal and rng.random() < 0.7 else keys
    shared = (*lead[:-1], lead[-1] // 2) if grouped else lead
    size = rng.choice((1, 1, 1, 40)) if dtype is D else 1
    q = torch.randn(*lead, rows, width).to(dtype) * size
    k, v = (torch.randn(*shared, keys, n).to(dtype) for n in (width, out))
    if rng.random() < 0.1 and dtype is D:
        k = torch.ones_like(k)
    tensors = [q, k, v] if dtype is torch.bfloat16 else _grads(rng, q, k, v)
    mask = _mask(rng, (*lead, rows, keys), dtype)
    if mask is not None:
        wanted = mask.is_floating_point() and dtype is D and rng.random() < 0.2
        tensors.append(mask.requires_grad_(wanted))
    options = {"is_causal": causal, "enable_gqa": grouped}
    options["kind"] = rng.choice(("auto", "auto", "ring", "zigzag", "all_to_all", "usp", "gather"))
    if rng.random() < 0.1:
        options["scale"] = 0.5
    case = placed(rng, "attention", _attend, tensors, **options)
    if size > 1 and dtype is D:
        case.rtol, case.atol = 1e-8, 1e-10
    if mask is not None and dtype is D and (mask == -1e9).any():
        # scores beside it have steps of 2^-23, and a row may have no others
        case.rtol, case.atol = 2.0**-21, 2.0**-21
    return case


# masked ops ---------------------------------------------------------------------------------------

MASKED: dict[str, Callable[..., Any]] = {
    "masked_fill": lambda x, m: x.masked_fill(m, -math.inf),
    "masked_fill_": lambda x, m: x.clone().masked_fill_(m, 0.3),
    "softmax": lambda x, m: x.masked_fill(m, -math.inf).softmax(-1),
    "log_softmax": lambda x, m: x.masked_fill(m, -1e9).log_softmax(0),
    "where": lambda x, m: torch.where(m, x, 0.1), "where_grad": lambda x, m: torch.where(m, x.log(), x),
    "masked_select": lambda x, m: x.masked_select(m), "index": lambda x, m: x[m],
    "sum_of": lambda x, m: x[m].sum(), "mean_of": lambda x, m: x[m].mean(), "max_of": lambda x, m: x[m].max(),
    "norm_of": lambda x, m: x[m].norm(), "std_of": lambda x, m: x[m].std(), "lse_of": lambda x, m: x[m].logsumexp(0),
    "median_of": lambda x, m: x[m].median(), "sort_of": lambda x, m: x[m].sort()[0],
    "softmax_of": lambda x, m: x[m].softmax(0), "mse_of": lambda x, m: F.mse_loss(x[m], x[m] * 2),
    "put": lambda x, m: _put(x, m, 0.1), "put_rows": lambda x, m: _put(x, m[:, 0], 0.1),
    "rows": lambda x, m: x[m[:, 0]], "rows_sum": lambda x, m: x[m[:, 0]].sum(0),
    "columns": lambda x, m: x[:, m[0]], "nonzero": lambda x, m: m.nonzero(),
    "masked_scatter": lambda x, m: x.masked_scatter(m, x.flatten() + 1),
    "cumsum": lambda x, m: m.long().cumsum(0), "argmax": lambda x, m: m.long().argmax(1),
    "weights": lambda x, m: (x * m).sum(1) / m.sum(1), "any": lambda x, m: m.any(1),
    "all": lambda x, m: m.all(0), "mul_inf": lambda x, m: (x / m).nan_to_num(0.1),
    "put_masked": lambda x, m: _put(x, m, (x * 2)[m]), "one_hot": lambda x, m: F.one_hot(m.long(), 2),
    "logical": lambda x, m: torch.logical_xor(m, x > 0), "count": lambda x, m: m.count_nonzero(1),
}  # fmt: skip


def _put(x: Tensor, m: Tensor, value: Any) -> Tensor:
    x = x.clone()
    x[m] = value
    return x


def _masked(rng: random.Random) -> Placed:
    shape = rng.choice(((5, 4), (7, 3), (2, 5), (3, 4, 2), (0, 4)))
    x = torch.rand(shape, dtype=D) + 0.1
    m = torch.rand(shape) < rng.choice((0.0, 0.3, 0.7, 1.0))
    name = rng.choice(list(MASKED))
    return placed(rng, name, MASKED[name], _grads(rng, x, m))


# rows of -inf, inf and NaN ------------------------------------------------------------------------

ROWS: dict[str, Callable[[Tensor, int], Any]] = {
    **{
        name: lambda x, d, name=name: getattr(torch, name)(x, d)
        for name in (
            "softmax", "log_softmax", "logsumexp", "logcumsumexp", "cumsum", "cumprod", "nansum",
            "nanmean", "mean", "sum", "prod", "var", "std", "amax", "amin", "argmax", "argmin",
            "median", "nanmedian", "max", "min", "sort", "argsort", "cummax", "cummin", "mode",
            "count_nonzero", "all", "any", "diff", "flip",
        )
    },
    "softmin": lambda x, d: F.softmin(x, d), "norm": lambda x, d: torch.linalg.vector_norm(x, 2, d),
    "norm1": lambda x, d: torch.linalg.vector_norm(x, 1, d), "norm3": lambda x, d: torch.linalg.vector_norm(x, 3, d),
    "norm_inf": lambda x, d: torch.linalg.vector_norm(x, math.inf, d), "norm_all": lambda x, d: x.norm(),
    "norm_low": lambda x, d: torch.linalg.vector_norm(x, -math.inf, d), "norm0": lambda x, d: torch.linalg.vector_norm(x, 0, d),
    "topk": lambda x, d: torch.topk(x, min(2, x.shape[d]), d)[0], "kthvalue": lambda x, d: torch.kthvalue(x, 1, d)[0],
    "nanquantile": lambda x, d: torch.nanquantile(x, 0.5, d), "quantile": lambda x, d: torch.quantile(x, 0.5, d),
    "normalize": lambda x, d: F.normalize(x, dim=d), "safe_softmax": lambda x, d: torch._safe_softmax(x, d),
    "lse_keep": lambda x, d: x.logsumexp(d, True), "lse_all": lambda x, d: x.logsumexp((0, 1)),
    "sum_all": lambda x, d: x.sum(), "max_all": lambda x, d: x.max(), "argmax_all": lambda x, d: x.argmax(),
    "aminmax": lambda x, d: torch.aminmax(x, dim=d), "nan_to_num": lambda x, d: x.nan_to_num(),
    "isclose": lambda x, d: x.isclose(x, equal_nan=True), "allclose": lambda x, d: torch.allclose(x, x, equal_nan=True),
    "unique": lambda x, d: torch.unique(x[x == x]), "isin": lambda x, d: torch.isin(x, torch.tensor([math.inf, math.nan], dtype=x.dtype)),
    "layer_norm": lambda x, d: F.layer_norm(x, x.shape[-1:]), "gumbel": lambda x, d: (x / 0.5).softmax(d),
    "clip_norm": lambda x, d: x / (x.norm() + 1e-6), "glu": lambda x, d: F.glu(torch.cat([x, x], d), d),
    "renorm": lambda x, d: torch.renorm(x, 2, d, 1.0), "var_mean": lambda x, d: torch.var_mean(x, d),
    "logaddexp": lambda x, d: torch.logaddexp(x, x.flip(d)), "xlogy": lambda x, d: torch.xlogy(x * 0, x),
    "trapezoid": lambda x, d: torch.trapezoid(x, dim=d), "cosine": lambda x, d: F.cosine_similarity(x, x + 1, d),
}  # fmt: skip


def _rows(rng: random.Random) -> Placed:
    x = torch.randn(rng.choice(((5, 4), (6, 3), (2, 7), (3, 4, 2))), dtype=D)
    d = rng.randrange(x.ndim)
    for _ in range(rng.randint(0, 3)):
        value = rng.choice((-math.inf, -math.inf, math.inf, math.nan, 0.0, 1e4, -1e4, 1e200))
        row = x.movedim(rng.randrange(x.ndim), 0)[rng.randrange(2)]
        row[..., : rng.randint(1, row.shape[-1])] = value
    name = rng.choice(list(ROWS))
    if name == "var_mean":
        # the mean that torch takes beside a variance depends on the order of its steps
        x = x.nan_to_num(0.0, 0.0, 0.0)
    if name == "layer_norm":
        # of larger values the squares overflow, or their rounding is the variance
        x = x.clamp(-1e4, 1e4)
    # slopes beside infinite elements are what a formula makes of infinity by infinity
    # and of logcumsumexp torch adds the logarithms of cotangents to scores, where large ones hide
    # them, as a score of logsumexp hides the logarithm of how many there are
    unsure = ("prod", "var", "logcumsum", "logsumexp", "lse")
    steep = any(n in name for n in unsure) and not (x.abs() < 1e100).all()
    given = [x] if steep else _grads(rng, x)
    return placed(rng, f"{name} over {d}", lambda x: ROWS[name](x, d), given, plain=0)


# losses -------------------------------------------------------------------------------------------

LOSSES: dict[str, Callable[..., Any]] = {
    "l1": lambda x, y, w, r: F.l1_loss(x, y, reduction=r), "mse": lambda x, y, w, r: F.mse_loss(x, y, reduction=r),
    "bce": lambda x, y, w, r: F.binary_cross_entropy(x.sigmoid(), y.sigmoid(), w[: x.shape[1]] if x.ndim == 2 else None, reduction=r),
    "bce_logits": lambda x, y, w, r: F.binary_cross_entropy_with_logits(x, y.sigmoid(), pos_weight=w if x.ndim == 2 else None, reduction=r),
    "kl": lambda x, y, w, r: F.kl_div(x.log_softmax(1), y.softmax(1), reduction=r),
    "kl_log": lambda x, y, w, r: F.kl_div(x.log_softmax(1), y.log_softmax(1), reduction=r, log_target=True),
    "huber": lambda x, y, w, r: F.huber_loss(x, y, reduction=r), "smooth": lambda x, y, w, r: F.smooth_l1_loss(x, y, reduction=r),
    "soft_margin": lambda x, y, w, r: F.soft_margin_loss(x, y.sign(), reduction=r),
    "poisson": lambda x, y, w, r: F.poisson_nll_loss(x, y.abs(), reduction=r),
    "gaussian": lambda x, y, w, r: F.gaussian_nll_loss(x, y, y.square() + 0.1, reduction=r),
    "hinge": lambda x, y, w, r: F.hinge_embedding_loss(x, y.sign(), reduction=r),
    "margin": lambda x, y, w, r: F.margin_ranking_loss(x, y, y.sign(), reduction=r),
    "cosine": lambda x, y, w, r: F.cosine_embedding_loss(x, y, torch.ones(len(x), dtype=D), reduction=r),
    "triplet": lambda x, y, w, r: F.triplet_margin_loss(x, y, x * 2, reduction=r),
    "probabilities": lambda x, y, w, r: F.cross_entropy(x, y.softmax(1), w, reduction=r, label_smoothing=0.1),
    "multilabel_soft": lambda x, y, w, r: F.multilabel_soft_margin_loss(x, (y > 0).to(D), reduction=r),
}  # fmt: skip


def _losses(rng: random.Random) -> Placed:
    classes, reduction = 4, rng.choice(("mean", "mean", "sum", "none"))
    n = rng.choice((0, 1, 5, 5, 6))
    more = rng.choice(((), (), (3,), (2, 3)))
    x = torch.randn(n, classes, *more, dtype=D)
    w = torch.rand(classes, dtype=D)
    if rng.random() < 0.3:
        w[:2] = 0
    if rng.random() < 0.5:
        name = rng.choice(list(LOSSES))
        y = torch.randn_like(x)

        def loss(x: Tensor, y: Tensor, w: Tensor) -> Any:
            return LOSSES[name](x, y.detach(), w, reduction)

        return placed(rng, f"{name} {reduction}", loss, [*_grads(rng, x), y, w])
    t = torch.randint(0, classes, (n, *more))
    ignored = rng.choice((0.0, 0.3, 1.0, 1.0))
    t[torch.rand(t.shape) < ignored] = -100
    weighted, smoothing = rng.random() < 0.5, rng.choice((0.0, 0.0, 0.1))
    kind = rng.choice(("cross_entropy", "nll", "multi_margin", "module"))

    def classify(x: Tensor, t: Tensor, w: Tensor) -> Any:
        weight = w if weighted else None
        if kind == "nll":
            return F.nll_loss(x.log_softmax(1), t, weight, reduction=reduction)
        # of nothing torch gives what the memory held
        if kind == "multi_margin" and x.ndim == 2 and len(x):
            return F.multi_margin_loss(x, t.clamp(0), weight=weight, reduction=reduction)
        if kind == "module":
            loss = nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=smoothing)
            return loss(x, t)
        return F.cross_entropy(x, t, weight, reduction=reduction, label_smoothing=smoothing)

    return placed(rng, f"{kind} {reduction} {smoothing}", classify, [*_grads(rng, x), t, w])


# sets without elements ----------------------------------------------------------------------------

EMPTY: dict[str, Callable[..., Any]] = {
    **{
        name: lambda x, name=name: getattr(x, name)()
        for name in (
            "sum", "mean", "prod", "std", "var", "max", "min", "amax", "amin", "argmax", "argmin",
            "median", "nanmedian", "nansum", "nanmean", "any", "all", "norm", "unique", "nonzero",
            "aminmax", "logsumexp", "flatten", "count_nonzero", "square", "t", "diff",
        )
    },
    **{f"{name} of rows": f for name, f in ((n, lambda x, f=f: f(x, 0)) for n, f in ROWS.items())},
    **{f"{name} of columns": f for name, f in ((n, lambda x, f=f: f(x, 1)) for n, f in ROWS.items())},
    "histc": lambda x: torch.histc(x.detach(), 3), "histogram": lambda x: torch.histogram(x.detach(), 3),
    "histogram_weight": lambda x: torch.histogram(x.detach(), 3, weight=x.detach()), "bincount": lambda x: torch.bincount(x.flatten().long()),
    "histogram_range": lambda x: torch.histogram(x.detach(), 3, range=(0.0, 1.0)), "cat": lambda x: torch.cat([x, x]),
    "matmul": lambda x: x.mT @ x, "matmul_t": lambda x: x @ x.mT, "linear": lambda x: F.linear(x, torch.ones(2, x.shape[1], dtype=D)),
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(x.shape[1], dtype=D), torch.ones(x.shape[1], dtype=D), training=True),
    "group_norm": lambda x: F.group_norm(x[..., None], 1), "layer_norm_all": lambda x: F.layer_norm(x, x.shape),
    "instance_norm": lambda x: F.instance_norm(x[..., None, None].expand(*x.shape, 2, 2)),
    "dropout": lambda x: F.dropout(x, 0.0), "prelu": lambda x: F.prelu(x, torch.tensor([0.2], dtype=D)),
    "pad": lambda x: F.pad(x, (1, 1, 0, 1), value=0.1), "cov": lambda x: torch.cov(x), "corrcoef": lambda x: torch.corrcoef(x),
    "searchsorted": lambda x: torch.searchsorted(x.flatten().sort()[0], torch.tensor([0.1], dtype=D)),
    "embedding": lambda x: F.embedding(x.flatten().long(), torch.ones(3, 2, dtype=D)),
    "one_hot": lambda x: F.one_hot(x.flatten().long(), 3), "index": lambda x: x[torch.zeros(0, dtype=torch.long)],
    "multinomial": lambda x: list(torch.multinomial(x.abs() + 1, 1).shape), "cdist": lambda x: torch.cdist(x, x + 1),
    "conv": lambda x: F.conv1d(x[:, None], torch.ones(1, 1, 1, dtype=D)), "pool": lambda x: F.avg_pool1d(x[:, None], 1),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x), "split": lambda x: x.chunk(2),
    "repeat": lambda x: x.repeat(2, 1), "roll": lambda x: x.roll(1, 0), "interpolate": lambda x: F.adaptive_avg_pool1d(x[None].detach(), 2),
}  # fmt: skip


def _empty(rng: random.Random) -> Placed:
    shape = rng.choice(((0, 4), (0, 3), (4, 0), (0, 0), (1, 3), (3, 1)))
    x = torch.randn(shape, dtype=D)
    name = rng.choice(list(EMPTY))
    return placed(rng, f"{name} of {shape}", EMPTY[name], _grads(rng, x), rng.choice(MESHES))
