"""Torch's errors of values that one rank holds: it may catch them, but the others do not know.

An op that sends nothing, such as an embedding, raises for an index out of range where the index
lies. That rank has left the others: what it sent next would be taken for what they wait for. So
its next collective raises.
"""

from __future__ import annotations

import dis
import re
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from ..comm import groups
from ..comm.observers import Hooks
from ..spec import Spec
from .shard_tensor import ShardTensor

E = TypeVar("E", bound=BaseException)
T = TypeVar("T")
_OF_VALUES = re.compile(
    r"^(\w+\(\): )?index (-?\d+ is )?out of (range|bounds)|tried to access index|^Target .* bounds|"
    r"target\b.* out of range|^INDICES element is out|elements of input should|invalid max index"
)
_RAISE = dis.opmap["RAISE_VARARGS"]


def told(error: E) -> E:
    """An error that every rank has, or knows of."""
    error.everywhere = True  # type: ignore[attr-defined]
    return error


def alike(same: bool, fn: Callable[..., T], *args: Any) -> T:
    """fn(*args), whose errors all ranks have if the index among args is the same on all."""
    try:
        return fn(*args)
    except (RuntimeError, IndexError) as e:
        if same:
            told(e)
        raise


def of_rows(table: Tensor, same: bool, fn: Callable[..., T], *args: Any) -> T:
    """`alike` of fn, which looks up this rank's rows of a table: an IndexError on every rank.

    Where a rank's rows are empty, torch raises a RuntimeError.
    """
    try:
        return alike(same, fn, *args)
    except RuntimeError as e:
        if "out of DATA bounds" not in str(e) or not table.numel():
            raise
        # with the place where it was raised, which `note` looks at
        error = IndexError("index out of range in self").with_traceback(e.__traceback__)
        raise told(error) if same else error from None


def note(error: BaseException, func: Any, args: Any, kwargs: Any) -> None:
    """Set this rank apart if torch raised for a value of which other ranks may know nothing.

    Among the arguments may be Specs of what else the call took.
    """
    if not _OF_VALUES.search(str(error)) or _agreed(error):
        return
    if Hooks.meeting is not None:
        # the guard compares what ranks did since they met, and tells all of them
        return
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=lambda x: isinstance(x, ShardTensor))
    for x in leaves:
        spec = x._spec if isinstance(x, ShardTensor) else x
        if isinstance(spec, Spec) and _varies(spec):
            name = getattr(func, "__name__", type(func).__name__)
            groups.part(
                f"this rank raised {type(error).__name__}: {str(error).splitlines()[0]} ({name} of "
                f"{spec}); the others may not have: they wait, or are in another step. Check "
                "such values on all ranks before, or let the error end the program"
            )
            return


def _varies(spec: Spec) -> bool:
    return any(spec.mesh.size(axis) > 1 for axis in spec.varying)


def _agreed(error: BaseException) -> bool:
    """Whether all ranks raise it: they told each other, or the library read it off specs."""
    if getattr(error, "everywhere", False):
        return True
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    return last is not None and last.tb_frame.f_code.co_code[last.tb_lasti] == _RAISE
