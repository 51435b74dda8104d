"""The class of an op, by which its time is measured, and what it makes besides its results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._torch import kernels

# bytes of a block that the C library's allocator always gets from the system and gives back: the
# upper bound of M_MMAP_THRESHOLD, mallopt(3)
LARGE = 2**25

# channels below which a convolution reads an image as it is
FEW = 8

_CLASSES = {
    "gemm": "mm bmm dot mv",
    "gemm, added": "addmm baddbmm addmv",
    "conv": "convolution",
    "conv backward": "convolution_backward",
    "norm": "native_layer_norm",
    "norm, batch": "native_batch_norm",
    "norm, group": "native_group_norm",
    "norm, softmax": "_softmax _log_softmax",
    "norm backward": "native_layer_norm_backward",
    "norm backward, batch": "native_batch_norm_backward",
    "norm backward, group": "native_group_norm_backward",
    "norm backward, softmax": "_softmax_backward_data _log_softmax_backward_data",
    "fft": "_fft_c2c",
    "fft, real": "_fft_r2c",
    "fft, inverse": "_fft_c2r",
    "index": "index index_put index_put_ index_add index_add_ gather scatter scatter_add "
    "index_select embedding embedding_dense_backward",
    "function": "gelu silu sigmoid tanh exp log pow erf logaddexp",
    "function, backward": "gelu_backward silu_backward",
    "reduce": "sum mean amax amin var var_mean max_pool2d_with_indices avg_pool2d "
    "max_pool2d_with_indices_backward",
    "copy": "copy_ clone cat _to_copy constant_pad_nd stack index_fill repeat",
    "nothing": "empty new_empty empty_like empty_strided new_empty_strided",
}
_CLASS = {op: name for name, ops in _CLASSES.items() for op in ops.split()}
# where its weight and its groups are among a convolution's arguments
_CONVS = {"convolution": (1, 8), "convolution_backward": (2, 9)}


class Work(NamedTuple):
    """What an op costs.

    moved: bytes of what it reads and writes; kind: its class; inside: bytes that it makes on a CPU
    besides its results, columns of a convolution or scores of attention; fresh: bytes of new memory
    in blocks that the system has to provide each time; copied: of operands that it first copies;
    renewed: of smaller columns, which it has to provide now and then.
    """

    flop: int
    moved: int
    dtype: torch.dtype
    kind: str
    inside: float = 0
    fresh: float = 0
    copied: float = 0
    renewed: float = 0


def class_of(func: Any, args: Sequence[Any], made: Sequence[Tensor] = ()) -> str:
    """The class of an op that gives `made`: "pointwise" if it is no other; after a comma a part."""
    name = func.overloadpacket.__name__
    if "attention" in name:
        return "attention backward" if name.endswith("backward") else "attention"
    found = _CLASS.get(name, "pointwise")
    if found == "gemm" and args[0].is_complex():
        return "gemm, complex"
    if found == "copy":
        return "copy, strided" if _strided(args, made) else found
    if name not in _CONVS:
        return found
    at = _CONVS[name][0]
    weight = args[at]
    if groups_of(func, args) > 1:
        return f"{found}, groups"
    if prod(weight.shape[2:]) == 1:
        return f"{found}, pointwise"
    deep = ", 3-D" if weight.ndim > 4 else ""
    # x, weight, then: stride, padding, dilation, transposed, output padding, groups
    library = kernels.conv_backend(args[at - 1], weight, None, *args[at + 2 : at + 8], None)
    if library.name.startswith("Slow"):
        return f"{found}{deep}, columns"
    return f"{found}, few channels" if weight.shape[1] < FEW and not deep else f"{found}{deep}"


def groups_of(func: Any, args: Sequence[Any]) -> int:
    """Of a convolution or its backward; 1 of any other op."""
    at = _CONVS.get(func.overloadpacket.__name__)
    return 1 if at is None or len(args) <= at[1] else int(args[at[1]])


def inside(func: Any, args: Sequence[Any], kind: str) -> float:
    """Bytes that an op makes besides its results."""
    if kind.startswith("attention"):
        query, key = args[kind.endswith("backward") :][:2]
        return float(query.element_size() * prod(query.shape[:-1]) * key.shape[-2])
    if not kind.endswith(", columns"):
        return 0.0
    at = _CONVS[func.overloadpacket.__name__][0]
    x, weight, _, stride, padding, dilation, transposed = args[at - 1 : at + 6]
    places = list(x.shape[2:])
    if not transposed:
        sides = zip(places, weight.shape[2:], stride, padding, dilation, strict=True)
        places = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides]
    return float(x.element_size() * x.shape[0] * prod(places) * prod(weight.shape[1:]))


def fresh(kind: str, besides: float, blocks: Iterable[float]) -> tuple[float, float]:
    """Of blocks that an op makes, and of columns for each product, the bytes that are new.

    And those of smaller columns, which are at times.
    """
    columns = besides * (1 + ("backward" in kind)) if kind.endswith(", columns") else 0.0
    large = float(sum(n for n in blocks if n >= LARGE))
    return (large + columns, 0.0) if besides >= LARGE else (large, columns)


def copied(kind: str, args: Sequence[Any]) -> float:
    """Bytes of operands that an op copies first, as they do not lie in order."""
    if not kind.startswith("norm"):
        return 0.0
    given = (x for x in args if isinstance(x, Tensor) and x.dim() > 1)
    return float(sum(x.numel() * x.element_size() for x in given if not x.is_contiguous()))


def _strided(args: Sequence[Any], made: Sequence[Tensor]) -> bool:
    """Whether rows of what is copied become columns."""
    many = args[0] if isinstance(args[0], list | tuple) else args
    orders = [_order(x) for x in (*many, *made) if isinstance(x, Tensor) and x.dim() > 1]
    return any(o[-1:] != orders[0][-1:] for o in orders)


def _order(x: Tensor) -> list[int]:
    """Its dims, counted from the last, from that of the largest stride on; not those of none."""
    strides: tuple[int, ...] = x.stride()
    dims = [d for d in range(-x.dim(), 0) if x.shape[d] > 1 and strides[d]]
    return sorted(dims, key=lambda d: -strides[d])
