"""Python numbers beside tensors of every dtype: values, promotion, rounding, overflow, errors."""

from __future__ import annotations

import math
import operator
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from placing import Placed, placed
from torch import Tensor

Op = Callable[[Tensor, Any], Any]
DTYPES = (
    torch.float64, torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64,
    torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex128, torch.complex64,
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 0.1, -0.7, 1.5, 1e-9, 300, 2**40, 1e300, True, False, 0.0, math.inf, -math.inf,
    math.nan, 1j, 0.1 + 2j, 7.0, 2**62,
)  # fmt: skip


def _written(x: Tensor, index: Any, value: Any) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


def _first(x: Tensor) -> Tensor:
    """An index of its first row, none for an empty tensor."""
    return torch.arange(min(1, x.shape[0] if x.ndim else 1))


def _in_place(name: str) -> Op:
    return lambda x, s: getattr(x.clone(), name)(s)


OPS: dict[str, Op] = {
    **{
        name: getattr(operator, name)
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "eq", "ne", "lt",
                     "le", "gt", "ge", "and_", "or_", "xor", "lshift", "rshift")
    },
    **{
        f"r{name}": lambda x, s, name=name: getattr(operator, name)(s, x)
        for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lt", "and_", "or_",
                     "xor")
    },
    **{
        name: _in_place(name)
        for name in ("add_", "sub_", "mul_", "div_", "pow_", "clamp_min_", "clamp_max_", "fill_",
                     "eq_", "lt_", "floor_divide_", "remainder_", "fmod_", "bitwise_and_",
                     "copysign_", "float_power_")
    },
    **{
        name: lambda x, s, name=name: getattr(torch, name)(x, s)
        for name in ("fmod", "remainder", "floor_divide", "float_power", "xlogy", "copysign",
                     "clamp_min", "clamp_max", "bitwise_or", "full_like", "isin", "hardshrink",
                     "nan_to_num", "special_xlog1py", "special_zeta", "ldexp", "rsub", "fill",
                     "bitwise_left_shift", "true_divide", "eq", "gt")
    },
    **{
        name: lambda x, s, name=name: getattr(F, name)(x, s)
        for name in ("leaky_relu", "elu", "celu", "softshrink", "hardshrink", "softplus")
    },
    "clamp": lambda x, s: x.clamp(max=s), "clamp_min_max": lambda x, s: x.clamp(s, 3),
    "clip": lambda x, s: torch.clip(x, -1, s), "hardtanh": lambda x, s: F.hardtanh(x, -1, s),
    "threshold": lambda x, s: F.threshold(x, 0.1, s), "threshold_at": lambda x, s: F.threshold(x, s, 2),
    "where": lambda x, s: torch.where(x == 1, x, s), "where_other": lambda x, s: torch.where(x == 1, s, x),
    "where_both": lambda x, s: torch.where(x == 1, s, 2), "masked_fill": lambda x, s: x.masked_fill(x == 1, s),
    "masked_fill_": lambda x, s: x.clone().masked_fill_(x == 1, s),
    "masked_fill_tensor": lambda x, s: x.masked_fill(x == 1, torch.tensor(s)),
    "set_mask": lambda x, s: _written(x, x == 1, s), "set_all": lambda x, s: _written(x, slice(None), s),
    "set_row": lambda x, s: _written(x, 0, s), "set_rows": lambda x, s: _written(x, _first(x), s),
    "set_last": lambda x, s: _written(x, (Ellipsis, 0), s),
    "set_tensor": lambda x, s: _written(x, x == 1, torch.tensor(s)),
    "set_rows_tensor": lambda x, s: _written(x, _first(x), torch.tensor(s)),
    "new_full": lambda x, s: x.new_full(x.shape, s), "new_full_small": lambda x, s: x.new_full((2,), s),
    "new_tensor": lambda x, s: x.new_tensor(s), "add_alpha": lambda x, s: torch.add(x, x, alpha=s),
    "sub_alpha": lambda x, s: torch.sub(x, 1, alpha=s), "addcmul": lambda x, s: torch.addcmul(x, x, x, value=s),
    "addcdiv": lambda x, s: torch.addcdiv(x, x, x + 3, value=s), "lerp": lambda x, s: torch.lerp(x, x + 1, s),
    "lerp_tensor": lambda x, s: torch.lerp(x, x + 1, torch.tensor(s, dtype=x.dtype)),
    "pad": lambda x, s: F.pad(x, (1, 2), value=s), "pad_none": lambda x, s: F.pad(x, (0, 0), value=s),
    "pad_first": lambda x, s: F.pad(x, [0, 0] * (x.ndim - 1) + [1, 0], value=s),
    "scatter": lambda x, s: x.scatter(0, torch.zeros([1] * x.ndim, dtype=torch.long), s),
    "scatter_add": lambda x, s: x.scatter(0, torch.zeros([1] * x.ndim, dtype=torch.long), s, reduce="add"),
    "index_fill": lambda x, s: x.index_fill(0, _first(x), s),
    "index_fill_": lambda x, s: x.clone().index_fill_(0, _first(x), s),
    "index_add": lambda x, s: x.index_add(0, _first(x), x[:1], alpha=s),
    "index_put": lambda x, s: x.index_put((_first(x),), torch.tensor(s, dtype=x.dtype)),
    "fill_diagonal_": lambda x, s: x.clone().fill_diagonal_(s), "norm": lambda x, s: torch.linalg.vector_norm(x, s),
    "norm_dim": lambda x, s: torch.linalg.vector_norm(x, s, 0), "renorm": lambda x, s: torch.renorm(x, 2, 0, s),
    "div_floor": lambda x, s: torch.div(x, s, rounding_mode="floor"),
    "div_trunc": lambda x, s: torch.div(x, s, rounding_mode="trunc"),
    "logit": lambda x, s: torch.logit(x, s), "gelu_mul": lambda x, s: F.gelu(x) * s,
    "maximum": lambda x, s: torch.maximum(x, torch.tensor(s)), "isclose": lambda x, s: torch.isclose(x, torch.tensor(s, dtype=x.dtype)),
    "addmm": lambda x, s: torch.addmm(x, x, x.mT, beta=s, alpha=s), "sum_times": lambda x, s: x.sum() * s,
    "mean_plus": lambda x, s: x.mean(0) + s, "to_then": lambda x, s: x.to(torch.float32) + s,
    "isin_r": lambda x, s: torch.isin(s, x), "bucketize": lambda x, s: torch.bucketize(s, x.flatten().sort()[0]),
    "searchsorted": lambda x, s: torch.searchsorted(x.flatten().sort()[0], s),
    "quantile": lambda x, s: torch.quantile(x, s), "dropout": lambda x, s: F.dropout(x, s, False),
    "cumsum_times": lambda x, s: x.cumsum(0) * s, "copy_": lambda x, s: x.clone().copy_(torch.tensor(s)),
    "foreach_add": lambda x, s: torch._foreach_add([x, x], s), "foreach_mul": lambda x, s: torch._foreach_mul([x, x], [s, s]),
    "foreach_pow": lambda x, s: torch._foreach_pow([x], s), "foreach_addcmul": lambda x, s: torch._foreach_addcmul([x], [x], [x], s),
    "foreach_clamp": lambda x, s: torch._foreach_clamp_max([x], s), "foreach_lerp": lambda x, s: torch._foreach_lerp([x], [x + 1], s),
    "equal": lambda x, s: torch.equal(x, torch.full_like(x, s)), "any_eq": lambda x, s: (x == s).any(),
    "count": lambda x, s: (x > s).sum(),     "histc": lambda x, s: torch.histc(x, 4, 0, s), "promote_0d": lambda x, s: x + torch.tensor(s),
    "promote_1d": lambda x, s: x + torch.tensor([s]), "stack_number": lambda x, s: torch.stack([x, x * s]),
    "result_type": lambda x, s: str(torch.result_type(x, s)), "polygamma": lambda x, s: torch.special.polygamma(1, x) * s,
    "clamp_tensor": lambda x, s: x.clamp(max=torch.tensor(s)), "heaviside": lambda x, s: torch.heaviside(x, torch.tensor(s, dtype=x.dtype)),
    "baddbmm": lambda x, s: torch.baddbmm(x[None], x[None], x[None].mT, beta=s), "round": lambda x, s: torch.round(x * s, decimals=2),
    "smooth_l1": lambda x, s: F.smooth_l1_loss(x, x + 1, beta=s), "huber": lambda x, s: F.huber_loss(x, x + 1, delta=s),
    "margin": lambda x, s: F.margin_ranking_loss(x, x + 1, torch.ones_like(x), margin=s), "softmax_t": lambda x, s: (x / s).softmax(0),
}  # fmt: skip
SHAPES = ((5, 4), (3, 3), (2, 3, 4), (6,), (), (0, 3), (1, 5), (7, 1))


def _tensor(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    x = torch.randint(-2, 3, shape).to(torch.float64)
    if dtype.is_floating_point or dtype.is_complex:
        x = x + rng.choice((0, 0, 0.1, 1e-3))
        x = x.to(dtype)
        return x.requires_grad_(rng.random() < 0.5)
    return x.abs().to(dtype) if dtype in (torch.uint8, torch.bool) else x.to(dtype)


def draw(rng: random.Random) -> Placed:
    name = rng.choice(list(OPS))
    x = _tensor(rng, rng.choice(SHAPES), rng.choice(DTYPES))
    s = rng.choice(NUMBERS)
    if name == "index_add" and isinstance(s, complex):
        # torch forgets to conjugate the factor in backward
        s = 2
    if name.startswith("norm") and abs(s) > 60000 and x.dtype in (torch.float16, torch.bfloat16):
        # torch raises in backward only
        s = 4
    if name in ("addmm", "baddbmm") and not math.isfinite(abs(s)):
        # a product of the gradient by infinity, or infinity times the product
        x = x.detach()
    case = placed(rng, f"{name} with {s!r}", lambda x: OPS[name](x, s), [x])
    return case
