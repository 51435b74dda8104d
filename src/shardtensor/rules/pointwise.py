"""Elementwise ops: broadcasting of plain, replicated and sharded operands.

The output takes the sharding of its largest operand, then of the others where mesh axes are left.
An operand that has the dim is cut the same way; one that is broadcast there stays whole.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .. import _torch
from ..cache import cached
from ..dispatch.follow import MOVED, follow
from ..dispatch.trial import tried
from ..dispatch.writes import check_writable
from ..errors import UnsupportedOpError
from ..registry import POINTWISE, rule
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from ..tensor.layout import takes_format
from ..tensor.redistribute import fit, local_of, reduced, replicate
from . import labels
from .agreed import agreed
from .empty import with_one

# two operands, no more: gradients of a sum need neither
_SUMS = {"add", "__add__", "__radd__"}
# bytes from which on a sum is made in the memory of an operand that came from other ranks
LARGE = 2**20


@rule(POINTWISE)
def pointwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The handler of every op with torch's pointwise tag."""
    spec = None
    inside = []
    for a in args:
        if a.__class__ is ShardTensor:
            if spec is None:
                spec = a._spec
            elif a._spec is not spec and a._spec != spec:
                return _aligned(func, args, kwargs)
            inside.append(a._local)
        elif isinstance(a, Tensor):
            return _aligned(func, args, kwargs)
        else:
            inside.append(a)
    if spec is None or spec.partial or kwargs:
        return _aligned(func, args, kwargs)
    if is_in_place(func):
        target = args[0]
        if target.__class__ is not ShardTensor:
            return _aligned(func, args, kwargs)
        func(*inside)
        return target
    out = func(*inside)
    if out is inside[0]:
        # what torch gives as it is
        return args[0]
    return wrap(out, spec) if out.__class__ is Tensor else _wrap_all(out, spec)


def _wrap_all(out: Any, spec: Spec) -> Any:
    if isinstance(out, Tensor):
        return wrap(out, spec)
    return type(out)([_wrap_all(o, spec) for o in out])


def _aligned(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """func on local tensors of operands that broadcast, cut alike."""
    name = func.__name__
    # loops: a comprehension is a call of Python
    given, named, tensors = [*args], {**kwargs}, list[Any]()
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            tensors.append(reduced(x))
    in_place = is_in_place(func)
    spec, wanted = align(*tensors)
    if in_place:
        target = args[0]
        if isinstance(target, ShardTensor):
            check_writable(target, name)
        elif spec.varying and not isinstance(target, nn.Parameter):
            raise UnsupportedOpError(
                f"{name}: writes a sharded result into a plain tensor; use the op that returns a "
                "new tensor"
            )
        elif spec.varying:
            # part of an update of many parameters (LBFGS): every rank has this one whole
            tensors = [replicate(x) if isinstance(x, ShardTensor) else x for x in tensors]
            spec, wanted = align(*tensors)
        if spec.shape != target.shape:
            raise RuntimeError(
                f"{name}: output with shape {tuple(target.shape)} doesn't match the broadcast "
                f"shape {tuple(spec.shape)}"
            )
        if isinstance(target, ShardTensor):
            spec, wanted = align_to(target._spec, *tensors)
    values = fit(spec.mesh, spec.varying, *zip(tensors, wanted, strict=True))
    if name in _SUMS and len(args) == len(values) == 2 and not kwargs:
        result = _summed_into(values, tensors, wanted, spec)
        if result is not None:
            return wrap(result, spec)
    found = iter(values)
    for i, x in enumerate(args):
        if isinstance(x, Tensor):
            given[i] = next(found)
    for key, x in kwargs.items():
        if isinstance(x, Tensor):
            named[key] = next(found)
    result = func(*given, **named)
    if in_place:
        return target
    made = _wrap_all(result, spec)
    hidden, turned = spec.thin, False
    for x, dims in zip(tensors, wanted, strict=True):
        cut = isinstance(x, ShardTensor)
        hidden = hidden or (cut and x._spec.dims != dims)
        turned = turned or not (x._local if cut else x).is_contiguous()
    if hidden and turned:
        # an operand whose strides show decides how a result lies whose own do not
        follow(MOVED, func, args, kwargs, made)
    return made


def _summed_into(values: Any, tensors: list[Tensor], wanted: Any, spec: Spec) -> Tensor | None:
    """The sum, where an operand was moved for it: in what came, which nobody else has.

    So a large bias cut along other dims than the scores takes no memory beside the two and the sum.
    None: none was, or it is small, or of another shape, dtype or format than the sum.
    """
    for x, dims, local, other in zip(tensors, wanted, values, values[::-1], strict=True):
        if (
            isinstance(x, ShardTensor)
            and x._spec.dims != dims
            and local.nbytes >= LARGE
            and not _torch.transforming()
            and local.numel() == prod(spec.local_shape)
            and local.dtype == torch.result_type(local, other)
            and local.is_contiguous()
            and other.is_contiguous()
            and not local._is_view()
            and _torch.storage(local)._cdata != _torch.storage(x._local)._cdata
        ):
            # of the larger number of dims the first have one row
            other = other.reshape(other.shape[max(0, other.ndim - local.ndim) :])
            # no view, which writes to it would have to go through
            return torch.ops.aten._unsafe_view(local.add_(other), spec.local_shape)
    return None


@cache
def is_in_place(func: Any) -> bool:
    """Whether a torch function, method or aten op writes to its first argument."""
    name = func.__name__.split(".")[0]
    if name.startswith("__"):
        return name.startswith("__i") and name != "__invert__"
    return name.endswith("_")


def align(*tensors: Tensor) -> tuple[Spec, tuple[tuple[Dim, ...], ...]]:
    """The spec of the broadcast result and the dims in which each operand is wanted."""
    return _align(*map(labels.known, tensors))


@cached
def _align(*known: labels.Known) -> tuple[Spec, tuple[tuple[Dim, ...], ...]]:
    ndims = [len(k.dims if isinstance(k, Spec) else k) for k in known]
    plan = labels.plan_of(labels.elementwise(*ndims), None, None, *known)
    return plan.out, plan.wanted


def align_to(spec: Spec, *tensors: Tensor) -> tuple[Spec, tuple[tuple[Dim, ...], ...]]:
    """As `align`, for a result whose spec is given."""
    return spec, tuple(dims_for(spec.dims, x.shape) for x in tensors)


def dims_for(dims: tuple[Dim, ...], shape: torch.Size) -> tuple[Dim, ...]:
    own = dims[len(dims) - len(shape) :]
    return tuple(d if d.size == n else Dim(n) for d, n in zip(own, shape, strict=True))


def function_rule(*names: str) -> Any:
    """Register a handler(func, args, kwargs) for several ops that differ only in the local call."""

    def register(handler: Any) -> Any:
        handler.takes_function = True
        return rule(*names)(handler)

    return register


@function_rule("div", "div_")
def div(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return divided(func, args, kwargs) if kwargs else pointwise(func, args, kwargs)


@function_rule("floor_divide", "floor_divide_", "remainder", "remainder_", "fmod", "fmod_")
def divided(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An integer divided by zero is an error on CPUs: on every rank, whichever has the zero."""
    given = (*args, *(kwargs[k] for k in ("input", "self", "other") if k in kwargs))[:2]
    x, by = given[0], given[-1]
    cut = next(t for t in given if isinstance(t, ShardTensor))
    if cut.is_floating_point() or cut.device.type != "cpu" or not cut._spec.varying:
        return pointwise(func, args, kwargs)
    if isinstance(by, Tensor):
        spec, _ = align(*(t for t in given if isinstance(t, Tensor)))
        run = lambda: pointwise(func, args, kwargs)  # noqa: E731
        return agreed(run, spec, spec.varying, RuntimeError, "ZeroDivisionError on {0} other ranks")
    if (
        isinstance(by, int)
        and x.numel()
        and not x._local.numel()
        and kwargs.get("rounding_mode", "floor")
    ):
        torch.fmod(x._local.new_ones(1), by)
    return pointwise(func, args, kwargs)


def check_number(x: Tensor, value: Any, dtype: torch.dtype | None = None) -> None:
    """Raise as torch does for a number that halves cannot hold; one element alone it fills."""
    dtype = dtype or x.dtype
    halves = dtype in (torch.float16, torch.bfloat16) and isinstance(value, int | float)
    if halves and torch.finfo(dtype).max < abs(value) < float("inf") and x.numel() > 1:
        torch.empty(2, dtype=dtype).fill_(value)


# ops that keep every element in place and depend on nothing else
@function_rule(
    "clone", "contiguous", "detach", "detach_", "alias", "requires_grad_",
    "_conj", "conj", "resolve_conj", "resolve_neg", "pin_memory", "lift_fresh", "positive", "real",
    "imag", "_conj_physical", "_neg_view",
)  # fmt: skip
def keep(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0] if args else kwargs.pop("input")
    if any(op not in ("sum", "avg") for _, op in x._spec.partial):
        # the largest real part is not that of the largest number
        x = reduced(x)
    if func.__name__ == "contiguous":
        # a shard of one row is contiguous where the whole is not, and must be copied all the same
        form = args[1] if len(args) > 1 else kwargs.get("memory_format", torch.contiguous_format)
        if x.is_contiguous(form):
            return x
        return wrap(x._local.clone(memory_format=form), x._spec)
    out = func(x._local, *args[1:], **kwargs)
    # torch gives the tensor itself
    return x if out is x._local and func.__name__ != "alias" else wrap(out, x._spec)


@function_rule("zeros_like", "ones_like", "full_like", "empty_like")
def like_it(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A new tensor that lies as x; where x is addends, whole on each rank."""
    x = args[0] if args else kwargs.pop("input")
    if func.__name__.startswith("full_like"):
        check_number(x, args[1] if len(args) > 1 else kwargs["fill_value"], kwargs.get("dtype"))
    return wrap(func(x._local, *args[1:], **kwargs), x._spec.cotangent)


@function_rule(
    "to", "_to_copy", "type", "type_as", "float", "double", "half", "bfloat16", "int", "long",
    "short", "char", "byte", "bool", "cfloat", "cdouble", "chalf", "cpu", "cuda", "zero_", "fill_",
    "nan_to_num_",
)  # fmt: skip
def cast(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rounding a sum of addends is not the sum of rounded addends: partial sums are added first."""
    if func.__name__.startswith("fill_") and isinstance(args[0], ShardTensor):
        value = args[1] if len(args) > 1 else kwargs["value"]
        if isinstance(value, Tensor):
            # whose gradient is the sum over the shards
            return pointwise(func, args, kwargs)
        check_number(args[0], value)
    x, *rest = (reduced(a) for a in args)
    rest = [local_of(a) for a in rest]
    if not isinstance(x, ShardTensor):
        return func(x, *rest, **kwargs)
    if is_in_place(func):
        check_writable(args[0], func.__name__)
        func(args[0]._local, *rest, **kwargs)
        return args[0]
    local = func(x._local, *rest, **kwargs)
    form = kwargs.get("memory_format") or torch.preserve_format
    if form is not torch.preserve_format and isinstance(local, Tensor):
        # as for contiguous
        same = local.dtype == x.dtype and local.device == x.device and not kwargs.get("copy")
        if same and takes_format(x, form):
            return x
        local = local.clone(memory_format=form) if local is x._local else local
    if local is x._local:
        # torch gives the tensor itself
        return x
    return wrap(local, x._spec) if isinstance(local, Tensor) else local


@rule("equal")
def equal(input: Tensor, other: Tensor) -> bool:
    return input.shape == other.shape and bool((input == other).all())


@rule("prelu")
def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """weight: one number, or one for each channel (dim 1)."""
    channels = input.shape[1] if input.ndim > 1 else 1
    if weight.numel() != 1:
        if weight.numel() != channels:
            raise RuntimeError(
                f"Mismatch of parameter numbers and input channel size. Found parameter numbers = "
                f"{weight.numel()} and channel size = {channels}."
            )
        weight = weight.reshape(-1, *[1] * (input.ndim - 2))
    elif weight.ndim:
        weight = weight.reshape(())
    return pointwise(_prelu, (input, weight), {})


def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    """Torch's own kernel, whose backward holds fewer tensors of x's size than products would."""
    # of a rank without rows where x has one row: no numbers either, which torch counts
    return torch.prelu(x, with_one(weight, range(weight.ndim), 0.0).reshape(-1))


@rule("glu")
def glu(input: Tensor, dim: int = -1) -> Tensor:
    if not input.is_floating_point():
        tried(torch.nn.functional.glu, input, dim)
    if input.shape[dim] % 2:
        raise RuntimeError(f"Halving dimension must be even, but dimension {dim} is not")
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


def _check_expands(shape: torch.Size, target: torch.Size) -> None:
    """Raise on all ranks what torch raises where local sizes happen not to fit."""
    for d in range(-1, -1 - min(len(shape), len(target)), -1):
        if shape[d] not in (1, target[d]):
            raise RuntimeError(
                f"The expanded size of the tensor ({target[d]}) must match the existing size "
                f"({shape[d]}) at non-singleton dimension {d % len(target)}.  Target sizes: "
                f"{list(target)}.  Tensor sizes: {list(shape)}"
            )


@rule("copy_")
def copy_(input: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(input, ShardTensor):
        value: ShardTensor = reduced(src)  # type: ignore[assignment]
        if value._spec.varying:
            raise UnsupportedOpError(
                "copy_ of a ShardTensor into a plain tensor: copy x.full_tensor() or x.to_local()"
            )
        return input.copy_(value._local, non_blocking)
    check_writable(input, "copy_")
    if src.shape != input.shape:
        _check_expands(src.shape, input.shape)
    spec, wanted = align_to(input._spec, input, src)
    (local,) = fit(spec.mesh, spec.varying, (src, wanted[1]))
    input._local.copy_(local, non_blocking)
    return input
