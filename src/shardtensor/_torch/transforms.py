# mypy: disable-error-code="attr-defined, union-attr, assignment, misc"
"""Private torch APIs of forward mode and torch.func: what enters and leaves their levels."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch._C import _functorch
from torch._functorch import autograd_function, eager_transforms, vmap
from torch.autograd import forward_ad

# what a user's autograd.Function becomes under a torch.func transform
FUNCTION_OF_TRANSFORMS = autograd_function.custom_function_call
# which torch.func transform surrounds the call, or None
functorch_level = _functorch.maybe_current_level
# how deep forward mode is, -1 outside of it. Both are no functions of Python: where each op passes,
# they are asked without `transforming`
dual_level = functools.partial(getattr, forward_ad, "_current_level")
set_dual_level = functools.partial(setattr, forward_ad, "_current_level")

# inside, ops are those of no torch.func transform
outside_levels = torch._C._DisableFuncTorch


def transforming() -> bool:
    """Whether torch.func or forward mode follows the ops of this thread."""
    return functorch_level() is not None or dual_level() >= 0


def differentiated(x: torch.Tensor) -> bool:
    """Whether x may have a derivative: one that is asked for, or any under a transform.

    A level of torch.func hides from `requires_grad` what the levels below it ask for.
    """
    if x.requires_grad:
        return True
    return transforming() and (x.dtype.is_floating_point or x.dtype.is_complex)


def followed(x: torch.Tensor) -> bool:
    """Whether a tensor has a tangent, or is one of a torch.func transform: not only its numbers."""
    return _functorch.is_functorch_wrapped_tensor(x) or has_tangent(x)


def has_tangent(x: torch.Tensor) -> bool:
    """Whether forward mode follows a tensor."""
    if forward_ad._current_level < 0 or not torch._C._is_fwd_grad_enabled():
        return False
    return forward_ad.unpack_dual(x).tangent is not None


def is_batched(x: torch.Tensor) -> bool:
    """Whether a tensor is one of a torch.func transform's."""
    return bool(_functorch.is_functorch_wrapped_tensor(x))


def _looked_into(function: Any) -> Any:
    """A function of torch's for Dynamo to go through, which would do so only by the name it had."""
    code = function.__code__.replace(co_filename=__file__)
    same = FunctionType(code, function.__globals__, argdefs=function.__defaults__)
    same.__kwdefaults__ = function.__kwdefaults__
    return same


def lift_transforms(
    is_ours: Callable[[Any], bool],
    inside: Callable[[Any, Callable[[Any], Any]], Any],
    tangent_of: Callable[[Any, Any], Any],
    batch: Callable[[Any, int, Callable[[Any], Any]], Any],
    unbatch: Callable[[Any, int, int, Callable[[Any], Any]], Any],
    refuse: Callable[[], Any],
) -> None:
    """Let levels of torch.func and dual tensors hold the local tensors of ours.

    inside(x, f): x with f of its local tensor. tangent_of(x, t): the local tangent of x's local
    tensor. batch(x, dim, f): x without a dim, of f of its local tensor; unbatch(x, dim, size, f):
    with another one. refuse raises, of a plain tensor with a tangent of ours.
    """

    def lifted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(x: Any, *args: Any, **kwargs: Any) -> Any:
            if is_ours(x):
                return inside(x, lambda local: function(local, *args, **kwargs))
            return function(x, *args, **kwargs)

        return run

    add, remove = vmap._add_batch_dim, vmap._remove_batch_dim

    def add_batch_dim(x: Any, dim: int, level: int) -> Any:
        if is_ours(x):
            return batch(x, dim, lambda local: add(local, dim, level))
        return add(x, dim, level)

    def remove_batch_dim(x: Any, level: int, size: int, dim: int) -> Any:
        if is_ours(x):
            return unbatch(x, dim, size, lambda local: remove(local, level, size, dim))
        return remove(x, level, size, dim)

    make, unpack = map(_looked_into, (forward_ad.make_dual, forward_ad.unpack_dual))

    @functools.wraps(make)
    def make_dual(tensor: Any, tangent: Any, *, level: int | None = None) -> Any:
        if not is_ours(tensor):
            return refuse() if is_ours(tangent) else make(tensor, tangent, level=level)
        t = tangent_of(tensor, tangent)
        return inside(tensor, lambda local: make(local, t, level=level))

    @functools.wraps(unpack)
    def unpack_dual(tensor: Any, *, level: int | None = None) -> Any:
        if not is_ours(tensor):
            return unpack(tensor, level=level)
        found: list[Any] = []

        def primal(local: Any) -> Any:
            found.append(unpack(local, level=level))
            return found[0].primal

        own = inside(tensor, primal)
        t = found[0].tangent
        return forward_ad.UnpackedDualTensor(
            own, None if t is None else inside(tensor, lambda _: t)
        )

    eager_transforms._wrap_for_grad = lifted(eager_transforms._wrap_for_grad)
    eager_transforms._unwrap_for_grad = lifted(eager_transforms._unwrap_for_grad)
    vmap._add_batch_dim, vmap._remove_batch_dim = add_batch_dim, remove_batch_dim
    forward_ad.make_dual, forward_ad.unpack_dual = make_dual, unpack_dual


@contextmanager
def shared_dual_level() -> Iterator[None]:
    """Threads that take turns may be in forward mode at a time: the last one to leave ends it.

    Torch has one level of dual tensors in a process, and forgets all tangents at its end. Whether
    it is there for a thread, `set_dual_level` says when its turn comes.
    """
    enter, leave = forward_ad.enter_dual_level, forward_ad.exit_dual_level
    nesting = eager_transforms.jvp_increment_nesting
    inside = Counter[int]()

    def entered() -> int:
        inside[threading.get_ident()] += 1
        if inside.total() == 1:
            return enter()
        set_dual_level(0)
        return 0

    def left(*, level: int | None = None) -> None:
        me = threading.get_ident()
        inside[me] -= 1
        if not inside.total():
            leave()
        elif not inside[me]:
            set_dual_level(-1)

    @contextmanager
    def nested() -> Iterator[int]:
        entered()
        try:
            with nesting() as level:
                yield level
        finally:
            left()

    forward_ad.enter_dual_level, forward_ad.exit_dual_level = entered, left
    eager_transforms.jvp_increment_nesting = nested
    try:
        yield
    finally:
        forward_ad.enter_dual_level, forward_ad.exit_dual_level = enter, leave
        eager_transforms.jvp_increment_nesting = nesting
        if inside.total():
            set_dual_level(0)
            leave()
