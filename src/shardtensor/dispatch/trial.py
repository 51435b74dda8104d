"""What torch says of an op: tried on a few ones, where shards without elements say nothing.

Kernels do not look at dtypes, nor all at the number of dims, where there is nothing to compute. So
where some rank has nothing of an operand, all ranks try each new call on ones, once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _torch, cache
from ..errors import UnsupportedOpError
from ..registry import method
from ..tensor import ShardTensor
from ..tensor.redistribute import PLAIN

# each asks for gradients of its operands as they are, on whatever meshes
ENGINE = (torch.autograd.grad, torch.Tensor.backward)
# elements up to which tensors are tried in their own shape
OWN = 2**10
# what a message says of an error that no value changes
_OF_FORM = re.compile(r"not implemented|not support|type|floating|complex|integral|[Bb]ool|\dD\b")
# they draw numbers, though torch does not tag them so, or change no numbers
_UNTRIED = re.compile(
    "dropout|attention|lstm|gru|rnn|requires_grad|pin_memory|share_memory|cuda|^to$"
)


def few(tree: Any, most: int = 2) -> Any:
    """The tree with plain tensors of ones of `most` rows at most, of the same dtypes."""

    def ones(x: Any) -> Any:
        if not _is_tensor(x):
            return x
        return torch.ones([min(n, most) for n in x.shape], dtype=x.dtype, device=x.device)

    return pytree.tree_map(ones, tree, is_leaf=_is_tensor)


def _is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor)


def tried(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Raise what fn raises for dtypes and numbers like these."""
    args, kwargs = few((args, kwargs))
    with torch.no_grad():
        fn(*args, **kwargs)


def is_tried(func: Any, name: str) -> bool:
    """Whether an op can be tried: it is one of torch's own and draws nothing."""
    if _UNTRIED.search(name):
        return False
    if _torch.is_python_function(func) and not hasattr(Tensor, name):
        return func.__module__ in ("torch.functional", "torch.nn.functional")
    packet = _torch.aten_packet(name)
    return packet is not None and not _torch.is_random(packet)


def vacant(values: Iterable[Any]) -> bool:
    """Whether a rank has nothing of an operand that has elements."""
    for x in values:
        kind = x.__class__
        if kind is ShardTensor:
            if x._spec.vacant:
                return True
        elif (kind is list or kind is tuple) and vacant(x):
            return True
    return False


@method
def say_as_torch(error: Exception, func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
    """Raise what torch raises for a call in place of an error of another type, if no values say so.

    Torch is asked with tensors of the global shapes on the meta device, on which kernels raise
    other types of errors; so, where they are small, with ones, too.
    """
    if isinstance(error, UnsupportedOpError) or _torch.under_modes() or _torch.transforming():
        return
    given = args, kwargs or {}
    leaves = pytree.tree_leaves(given, is_leaf=_is_tensor)
    if func in ENGINE or any(map(callable, leaves)):
        # what a user's hook or function raised is no error of the call
        return
    tensors = [x for x in leaves if _is_tensor(x)]
    if any(type(x) not in (ShardTensor, *PLAIN) or x.layout is not torch.strided for x in tensors):
        return
    said = _raised(func, pytree.tree_map(_empty, given, is_leaf=_is_tensor))
    if said is None or "meta" in str(said):
        return
    if all(x.numel() <= OWN for x in tensors):
        said = _raised(func, few(given, OWN)) or said
    elif isinstance(error, LookupError | TypeError) and not isinstance(error, KeyError):
        return
    if type(said) is not type(error):
        raise said.with_traceback(None) from None


def _empty(x: Any) -> Any:
    if not _is_tensor(x):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _raised(func: Any, given: Any) -> Exception | None:
    args, kwargs = given
    try:
        with torch.no_grad():
            func(*args, **kwargs)
    except Exception as e:
        return e
    return None


class _Said:
    """What torch said of calls: an error, or None."""

    def __init__(self) -> None:
        self.calls: dict[Any, Exception | None] = {}

    def cache_clear(self) -> None:
        self.calls.clear()


_said = _Said()
cache.register(_said)


def try_out(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise what torch raises for the dtypes and the dims of a call, alike on all ranks."""
    if _torch.under_modes() or _torch.transforming():
        return
    try:
        facts = _fact(args), _fact(tuple(kwargs.items()))
    except _Unknown:
        return
    device = next(filter(_is_tensor, pytree.tree_leaves((args, kwargs), is_leaf=_is_tensor))).device
    casts = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    key = func, facts, casts
    if key not in _said.calls:
        if len(_said.calls) > 4096:
            _said.calls.clear()
        _said.calls[key] = _error(func, args, kwargs)
    error = _said.calls[key]
    if error is not None:
        raise type(error)(*error.args)


class _Unknown(Exception):
    """An argument of which nothing like it can be made."""


_NUMBERS = (int, float, complex, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


def _fact(x: Any) -> Any:
    """What is known of an argument before its values; hashable."""
    if isinstance(x, Tensor):
        if type(x) not in (ShardTensor, *PLAIN) or x.layout is not torch.strided:
            raise _Unknown
        return x.dtype, x.shape, x.device
    if isinstance(x, list | tuple):
        return tuple(map(_fact, x))
    if x is not None and not isinstance(x, _NUMBERS):
        raise _Unknown
    # 1, 1.0 and True are equal
    return type(x), x


def _error(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    """What func raises of ones, if that is of no values."""
    tensors = [x for x in pytree.tree_leaves((args, kwargs), is_leaf=_is_tensor) if _is_tensor(x)]
    most = OWN if all(x.numel() <= OWN for x in tensors) else 2
    args, kwargs = few((args, kwargs), most)
    try:
        with torch.no_grad():
            func(*args, **kwargs)
    except (RuntimeError, IndexError, TypeError, ValueError) as e:
        # stft names all its arguments first, "return_complex" too
        said = str(e).rpartition(") : ")[2]
        if isinstance(e, NotImplementedError) or _OF_FORM.search(said):
            return e.with_traceback(None)
    return None
