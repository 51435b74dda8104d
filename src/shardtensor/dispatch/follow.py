"""Strides of the whole, followed through ops whose local results need not show them.

A shard of one row looks the same in any order of dims, and a slice along a cut dim has gaps on some
ranks only. Such a view remembers the strides that torch gives the whole: of the same op on tensors
without memory. So does what is computed from tensors of another order than rows first, and, under
match_single_device, every result: torch draws in the order of memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _torch
from .._torch import probe
from ..cache import register
from ..comm.formats import FORMATS, memory_format
from ..spec import Spec
from ..tensor import ShardTensor, layout
from ..tensor.lazy import Lazy
from ..tensor.random import matching

_VIEWS = {
    "permute", "transpose", "t", "T", "numpy_T", "mT", "H", "mH", "adjoint", "movedim", "moveaxis",
    "swapaxes", "swapdims", "select", "unbind", "view", "reshape", "_unsafe_view", "_reshape_alias",
    "view_as", "reshape_as", "flatten", "ravel", "unflatten", "squeeze", "unsqueeze", "expand",
    "expand_as", "broadcast_to", "view_as_real", "view_as_complex", "real", "imag", "alias",
    "detach", "conj",
}  # fmt: skip
# views of some rows of each rank
_PARTS = {
    "slice", "getitem", "narrow", "split", "split_with_sizes", "chunk", "tensor_split", "hsplit",
    "vsplit", "dsplit", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk",
}  # fmt: skip
# their results need not be rows first where the operands are
_OWN = {
    "clone", "contiguous", "to", "_to_copy", "zeros_like", "ones_like", "full_like", "empty_like",
    "rand_like", "randn_like", "randint_like", "index", "einsum", "tensordot", "stft", "istft",
    "cdist", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "convolution", "nonzero", "cat", "stack", "sort", "topk", "float", "double",
    "half", "bfloat16", "cfloat", "cdouble", "chalf", "bool", "byte", "char", "short", "int",
    "long",
}  # fmt: skip
# laid out by libraries, in another way on each device
_LIBRARIES = ("fft_", "linalg_", "_linalg_", "cholesky", "qr", "inverse", "lu", "triangular_solve",
              "scaled_dot_product", "_scaled_dot_product", "ormqr", "geqrf", "svd")  # fmt: skip
# whose results torch lays out otherwise than it says of tensors without memory
_UNKNOWN = ("max_unpool", "nonzero_static", "pad", "reflection_pad", "replication_pad", "copysign",
            "floor_divide")  # fmt: skip
# of a number to powers that are tensors: rows first
_POWERS = ("pow", "float_power")
# images with the channels last give such images; what has no memory is not asked for its format
_OF_IMAGES = ("conv", "group_norm", "batch_norm", "native_batch_norm", "native_group_norm",
              "pixel_shuffle", "channel_shuffle", "native_channel_shuffle", "roll")  # fmt: skip
# views of what need not be the first element
_WITHIN = {"select", "unbind", "diagonal", "imag"}
NOT, VIEW, PART, TURN, OWN, LIBRARY, MOVED = range(7)
_NEW = (NOT, OWN, LIBRARY, MOVED)


def kind_of(name: str) -> int:
    """Of an op: a VIEW, one of some rows (PART), one that strides otherwise (TURN), or none (NOT).

    OWN, LIBRARY: it orders the dims of a new tensor, whose shards show it unless they MOVED.
    """
    if name in _VIEWS or name in _PARTS:
        return VIEW if name in _VIEWS else PART
    if name in ("unfold", "diagonal"):
        return TURN
    if name.startswith(_LIBRARIES):
        # the rule of transforms knows where rows moved
        return OWN if name.startswith("fft_") else LIBRARY
    return OWN if name in _OWN else NOT


def begins_within(name: str) -> bool:
    """Whether an op gives views that begin elsewhere in memory than what they are views of."""
    return name in _PARTS or name in _WITHIN


def hides(kind: int, args: tuple[Any, ...], out: Any) -> bool:
    """Whether local strides of the result of an op on tensors that show theirs may tell nothing."""
    first = out[0] if type(out) is tuple and out else out
    if type(first) is not ShardTensor or first._spec.thin:
        return not isinstance(first, Lazy)
    if kind in (OWN, MOVED) or not args:
        return kind != OWN
    x = args[0]
    if kind == LIBRARY:
        return type(x) is not ShardTensor or x._spec.cuts != first._spec.cuts
    if type(x) is not ShardTensor or x._strides is not None:
        return True
    if kind == VIEW and len(x._spec.cuts) > len(first._spec.cuts):
        # a row that another rank has
        return True
    return kind in (PART, TURN) and _gaps(kind, x, first._spec)


def follow(kind: int, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Let the results of func remember the strides of the whole, if they must."""
    given = [*_shards(args), *_shards(kwargs.values())]
    outs = out if isinstance(out, tuple | list) else (out,)
    # what is lazy, and what was told its strides already, knows them
    unknown = [o for o in outs if isinstance(o, ShardTensor) and o._strides is None]
    new = [o for o in unknown if not any(o is x for x in given)]
    if not new or not given:
        return
    odd = any(x._strides is not None and x._strides.turned for x in given)
    every = odd or matching()
    if not (every or (kind and hides(kind, args, out))):
        return
    found = _found(func, args, kwargs, outs)
    if found is None or len(found) != len(outs):
        found = [_made_like(o, given) if odd and kind in _NEW else None for o in outs]
    for o, strides in zip(outs, found, strict=True):
        if strides is not None and any(o is n for n in new) and len(strides) == o.ndim:
            layout.told(o, strides)


def _made_like(out: Any, given: list[ShardTensor]) -> tuple[int, ...] | None:
    """The strides of what elementwise ops make."""
    same = [x for x in given if isinstance(out, ShardTensor) and x.shape == out.shape]
    if not same:
        return None
    return layout.kept(same[0].shape, layout.stride(same[0]))


def _gaps(kind: int, x: ShardTensor, new: Spec) -> bool:
    """Whether some rows of x, which lie so, may leave gaps that differ from rank to rank."""
    old = x._spec
    if kind == TURN:
        return bool(old.varying)
    # rows of the outermost dim leave none
    return old.cuts != new.cuts and not (old.dims[1:] == new.dims[1:] and x._local.is_contiguous())


def _shards(values: Any) -> Iterator[ShardTensor]:
    for x in values:
        if isinstance(x, ShardTensor):
            yield x
        elif isinstance(x, list | tuple):
            yield from _shards(x)


# the same op on tensors without memory ------------------------------------------------------------


class _Kept(dict[Any, Any]):
    def cache_clear(self) -> None:
        self.clear()


_kept = _Kept()
register(_kept)


def _found(func: Any, args: Any, kwargs: Any, out: Any) -> list[tuple[int, ...] | None] | None:
    """The strides of the results, None if torch does not tell."""
    name = str(getattr(func, "__name__", "")).split(".")[0]
    if name.startswith(_UNKNOWN) or kwargs.get("rounding_mode") or not _is_torchs(func):
        return None
    if name == "__rpow__" or (name in _POWERS and not isinstance(_first(args, kwargs), Tensor)):
        return [layout.dense(x.shape) for x in out]
    if name.startswith(_OF_IMAGES):
        return _of_images(args, kwargs, out)
    try:
        key = (func, _key(args), _key(tuple(kwargs.items())))
        if key in _kept:
            found: list[tuple[int, ...] | None] | None = _kept[key]
            return found
    except (TypeError, RuntimeError):
        # what cannot be hashed, or has no strides
        key = None
    made = _run(func, args, kwargs)
    if key is not None:
        if len(_kept) >= 4096:
            _kept.clear()
        _kept[key] = made
    return made


def _first(args: Any, kwargs: Any) -> Any:
    return args[0] if args else kwargs.get("input", kwargs.get("self"))


def _of_images(args: Any, kwargs: Any, outs: Any) -> list[tuple[int, ...] | None]:
    given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim in (4, 5))
    last = any(memory_format(x) is not torch.contiguous_format for x in given)
    found: list[tuple[int, ...] | None] = []
    for o in outs:
        form = FORMATS.get(o.ndim) if last and isinstance(o, Tensor) else None
        found.append(layout.in_format(o.shape, form) if isinstance(o, Tensor) else None)
    return found


def _is_torchs(func: Any) -> bool:
    """Whether func is torch's own: others may do more than compute."""
    module = getattr(func, "__module__", None) or "torch"
    return isinstance(func, _torch.OpOverload) or module.split(".")[0] == "torch"


def _run(func: Any, args: Any, kwargs: Any) -> list[tuple[int, ...] | None] | None:
    name = str(getattr(func, "__name__", ""))
    index = name == "__getitem__"
    options = {k: v for k, v in kwargs.items() if k not in ("generator", "pin_memory", "out")}
    fake = name.startswith(_LIBRARIES)
    if options.get("device") is not None and not fake:
        options["device"] = "meta"
    try:
        with (
            torch.no_grad(),
            _torch.no_torch_function_at_all(),
            _torch.outside_modes(),
            probe.fake_mode() if fake else nullcontext(),
        ):
            made = [_meta(v, index, fake) for v in (*args, *options.values())]
            out = func(*made[: len(args)], **dict(zip(options, made[len(args) :], strict=True)))
    except Exception:
        # numbers that it needs
        return None
    outs = out if isinstance(out, tuple | list) else (out,)
    return [tuple(o.stride()) if isinstance(o, Tensor) else None for o in outs]


def _meta(x: Any, index: bool, fake: bool) -> Any:
    """An argument without memory; fake: where fakes are made, which have a device."""
    if isinstance(x, Tensor):
        plain = not isinstance(x, ShardTensor)
        if index and plain and not (x.ndim or x.is_floating_point() or x.dtype == torch.bool):
            return int(x)
        strides, device = x.stride() if plain else layout.stride(x), x.device if fake else "meta"
        return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=device)
    if type(x) in (list, tuple):
        return type(x)(_meta(v, index, fake) for v in x)
    return x


def _index(x: Tensor) -> int | None:
    """The number of a tensor that may be an index."""
    if x.ndim or x.is_floating_point() or x.is_complex():
        return None
    if x.device.type != "cpu" or _torch.is_tracing():
        raise TypeError("its value is not at hand")
    return int(x)


def _key(x: Any) -> Any:
    if isinstance(x, ShardTensor):
        return x.shape, layout.stride(x), x.dtype
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, _index(x)
    if type(x) in (list, tuple):
        return (type(x), *map(_key, x))
    if isinstance(x, slice):
        return slice, _key((x.start, x.stop, x.step))
    return type(x), x
