"""Steps that compute."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as some
from torch import Tensor

from .program import Program, maker, operand, some_dim


@maker
def unary(draw: Any, x: Tensor, program: Program) -> Any:
    name = draw(some.sampled_from(["sin", "tanh", "sigmoid", "exp", "square", "neg", "cos"]))
    return name, lambda x, args: getattr(torch, name)(x * 0.7)


@maker
def binary(draw: Any, x: Tensor, program: Program) -> Any:
    shape = tuple(draw(some.sampled_from([n, 1])) for n in x.shape)
    shape = shape[draw(some.integers(0, x.ndim)) :]
    i = operand(draw, shape, program)
    name = draw(some.sampled_from(["add", "mul", "sub", "maximum", "where"]))
    if name == "where":
        return f"where {shape}", lambda x, args: torch.where(args[i] > 0.1, x, args[i])
    return f"{name} {shape}", lambda x, args: getattr(torch, name)(x, args[i])


@maker
def reduction(draw: Any, x: Tensor, program: Program) -> Any:
    d, keep = some_dim(draw, x), draw(some.booleans())
    names = ["sum", "mean", "amax", "logsumexp", "norm", "prod", "var", "median", "nansum"]
    name = draw(some.sampled_from(names))
    if not x.shape[d] or (name == "var" and x.shape[d] < 2):
        return None
    if name == "median":
        return f"median {d}", lambda x, args: x.median(d).values
    return f"{name} {d} {keep}", lambda x, args: getattr(torch, name)(x, dim=d, keepdim=keep)


@maker
def along(draw: Any, x: Tensor, program: Program) -> Any:
    d = some_dim(draw, x)
    if not x.shape[d]:
        return None
    ops: dict[str, Callable[[Tensor], Tensor]] = {
        "softmax": lambda x: x.softmax(d),
        "log_softmax": lambda x: x.log_softmax(d),
        "cumsum": lambda x: x.cumsum(d),
        "cumprod": lambda x: x.cumprod(d),
        "flip": lambda x: x.flip(d),
        "diff": lambda x: torch.cat([x, x], d).diff(dim=d),
        "sort": lambda x: x.sort(d).values,
        "topk": lambda x: x.topk(max(1, x.shape[d] // 2), d).values,
        "normalize": lambda x: F.normalize(x, dim=d),
        "logcumsumexp": lambda x: x.logcumsumexp(d),
        "cummax": lambda x: x.cummax(d).values,
    }
    name = draw(some.sampled_from(sorted(ops)))
    return f"{name} {d}", lambda x, args: ops[name](x)


@maker
def linear(draw: Any, x: Tensor, program: Program) -> Any:
    out = draw(some.integers(1, 4))
    i = operand(draw, (out, x.shape[-1]), program)
    return f"linear {out}", lambda x, args: F.linear(x, args[i])


@maker
def product(draw: Any, x: Tensor, program: Program) -> Any:
    if x.ndim < 2:
        return None
    i = operand(draw, tuple(x.shape), program)
    return "matmul", lambda x, args: x @ args[i].transpose(-1, -2)


@maker
def convolved(draw: Any, x: Tensor, program: Program) -> Any:
    if x.ndim not in (3, 4) or 0 in x.shape:
        return None
    kernel = [draw(some.integers(1, 3)) for _ in x.shape[2:]]
    stride = [draw(some.integers(1, 2)) for _ in kernel]
    i = operand(draw, (2, x.shape[1], *kernel), program)
    conv = F.conv1d if x.ndim == 3 else F.conv2d
    pads = [draw(some.integers(0, k // 2)) for k in kernel]
    if any(n + 2 * p < k for n, p, k in zip(x.shape[2:], pads, kernel, strict=True)):
        return None
    name = f"conv {kernel} stride {stride} padding {pads}"
    return name, lambda x, args: conv(x, args[i], stride=stride, padding=pads)


@maker
def pooled(draw: Any, x: Tensor, program: Program) -> Any:
    if x.ndim not in (3, 4) or 0 in x.shape or min(x.shape[2:]) < 2:
        return None
    name = draw(some.sampled_from(["max_pool", "avg_pool", "adaptive_avg_pool", "interpolate"]))
    n = draw(some.integers(2, 3))
    if name == "interpolate":
        mode = "linear" if x.ndim == 3 else "bilinear"
        return f"{name} {n}", lambda x, args: F.interpolate(x, scale_factor=n, mode=mode)
    fn = getattr(F, f"{name}{x.ndim - 2}d")
    return f"{name} {n}", lambda x, args: fn(x, n if "adaptive" in name else 2)


@maker
def normed(draw: Any, x: Tensor, program: Program) -> Any:
    if x.ndim < 3 or prod(x.shape[1:]) < 2 or 0 in x.shape or x.numel() < 4:
        return None
    name = draw(some.sampled_from(["layer_norm", "group_norm", "batch_norm"]))
    if name == "layer_norm":
        if x.shape[-1] < 2:
            return None
        return name, lambda x, args: F.layer_norm(x, x.shape[-1:], eps=0.1)
    if name == "group_norm":
        return name, lambda x, args: F.group_norm(x, 1, eps=0.1)
    if x.numel() // x.shape[1] < 2:
        return None

    def norm(x, args):
        # torch 2.13 on a CPU gives a wrong gradient of a transposed input, and where a gradient of
        # one row may seem to lie in two ways
        flat = x.flatten(2) if 1 in x.shape else x.contiguous()
        return F.batch_norm(flat, None, None, training=True, eps=0.1).view(x.shape)

    return name, norm


@maker
def in_place(draw: Any, x: Tensor, program: Program) -> Any:
    shape = tuple(draw(some.sampled_from([n, 1])) for n in x.shape)
    i = operand(draw, shape, program)
    name = draw(some.sampled_from(["add_", "mul_", "clamp_", "sigmoid_", "copy_"]))

    def step(x: Tensor, args: Any) -> Tensor:
        y = x.clone()
        if name == "clamp_":
            return y.clamp_(-0.9, 0.9)
        return y.sigmoid_() if name == "sigmoid_" else getattr(y, name)(args[i])

    return f"{name} {shape}", step


@maker
def compared(draw: Any, x: Tensor, program: Program) -> Any:
    i = operand(draw, tuple(x.shape[-1:]), program)
    name = draw(some.sampled_from(["cdist", "einsum", "lerp", "cross_entropy"]))
    if name == "cdist" and x.ndim >= 2 and x.shape[-1]:
        return name, lambda x, args: torch.cdist(x * 1.01, x.flip(-2).detach() + 0.3)
    if name == "einsum":
        return name, lambda x, args: torch.einsum("...i,i->...i", x, args[i])
    if name == "lerp":
        return name, lambda x, args: torch.lerp(x, args[i], 0.3)
    if x.ndim < 2 or not x.shape[1] or 0 in x.shape:
        return None
    target = torch.zeros((x.shape[0], *x.shape[2:]), dtype=torch.int64)
    return name, lambda x, args: F.cross_entropy(x, target, reduction="none")


@maker
def spectrum(draw: Any, x: Tensor, program: Program) -> Any:
    d = some_dim(draw, x)
    if not x.shape[d]:
        return None
    return f"rfft {d}", lambda x, args: torch.view_as_real(torch.fft.rfft(x, dim=d)).sum(-1)
