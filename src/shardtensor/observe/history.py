"""The ops that a rank ran on ShardTensors: a running fingerprint for each mesh, and the last ops.

The ranks of a mesh must run the same ops on its tensors, in the same order. What only reads, or
makes replicated tensors without a gradient of others, is left out: one rank may log alone. The
values of such tensors are compared where they meet others.
"""

from __future__ import annotations

import functools
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _torch
from ..caller import call_of_user
from ..comm import counters
from ..tensor import ShardTensor
from .signature import is_one_value, is_whole, operands

_MOST_OPS = 1000
# methods of ShardTensor that do not go through dispatch, but must be called on all ranks
_METHODS = ("backward", "redistribute")
# ops that do not read their first operand: it may be fresh memory
_WRITES_ALL = {
    "copy_", "zero_", "fill_", "setitem", "normal_", "uniform_", "bernoulli_", "random_",
    "exponential_", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like",
    "randn_like", "new_empty", "new_zeros", "new_ones", "new_full",
}  # fmt: skip
_thread = threading.local()
# of all threads of this process
_guards = {"all": 0}
_kept: dict[str, Callable[..., Any]] = {}


class Trail:
    """What one thread ran on the tensors of one mesh."""

    def __init__(self) -> None:
        self.count = self.sum = 0
        self.ops: deque[dict[str, Any]] = deque(maxlen=_MOST_OPS)
        # by a group's ranks: how many ops they have agreed on
        self.agreed: dict[tuple[int, ...], int] = {}

    def add(self, op: dict[str, Any]) -> None:
        self.count += 1
        self.ops.append(op)
        text = f"{op['op']}|{os.path.basename(op['line'])}|{op['what']}"
        op["before"] = self.sum
        self.sum = zlib.crc32(text.encode(), self.sum)

    def drop(self, op: dict[str, Any]) -> None:
        """Take an op back, if nothing came after it."""
        if self.ops and self.ops[-1] is op:
            self.ops.pop()
            self.count -= 1
            self.sum = op["before"]

    def since(self, group: tuple[int, ...]) -> dict[str, Any]:
        """For the others of a group: how many ops, their fingerprint, those not agreed on yet."""
        new = self.count - self.agreed.get(group, 0)
        ops = list(self.ops)[-new:] if new else []
        return {"count": self.count, "sum": self.sum, "ops": ops}


def depth() -> int:
    """How many guards this rank is in. Simulated ranks are threads, and enter one by one."""
    return _guards["all"] + getattr(_thread, "guards", 0)


def enter() -> None:
    """Begin to note this rank's ops."""
    if not depth():
        forget()
    _count(1)


def leave() -> None:
    """End what `enter` began."""
    _count(-1)
    if not depth():
        forget()


def _count(n: int) -> None:
    if counters.simulated_rank() is None:
        _guards["all"] += n
    else:
        _thread.guards = getattr(_thread, "guards", 0) + n


def _trails() -> dict[tuple[int, ...], Trail]:
    found: dict[tuple[int, ...], Trail] = _thread.__dict__.setdefault("trails", {})
    return found


def since_last(group: Sequence[int]) -> dict[str, dict[str, Any]]:
    """By mesh (its ranks as text): what this rank ran on it since the group's last agreement."""
    key = tuple(group)
    return {
        ",".join(map(str, mesh)): t.since(key)
        for mesh, t in _trails().items()
        if len(set(mesh).intersection(key)) > 1
    }


def agreed(group: Sequence[int]) -> None:
    """What was run so far is the same on all ranks of the group."""
    for t in _trails().values():
        t.agreed[tuple(group)] = t.count


def forget(group: Sequence[int] | None = None) -> None:
    """Begin anew: after the guard, or with the ranks of a group that were told that they part."""
    trails = _trails()
    for mesh in list(trails):
        if group is None or len(set(mesh).intersection(group)) > 1:
            del trails[mesh]


def began(op: str, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Note an op of the user, with what must be the same on all ranks."""
    if not depth() or _torch.is_tracing():
        return None
    first = args[0] if args and isinstance(args[0], Tensor) else None
    found = operands((args, kwargs), first if op in _WRITES_ALL else None)
    if op == "distribute_tensor" and kwargs and kwargs["src_data_rank"] is not None:
        x, mesh = args
        if mesh.get_rank() != mesh.mesh.flatten()[kwargs["src_data_rank"]] and is_one_value(x):
            # it only stands for the shape
            found["values"] = [None]
    return _noted({"op": op, "line": call_of_user()[0], **found})


def _noted(op: dict[str, Any]) -> dict[str, Any]:
    ranks = tuple(op.pop("ranks"))
    op["mesh"] = ranks
    if ranks:
        _trails().setdefault(ranks, Trail()).add(op)
    return op


def ended(op: dict[str, Any], args: Any, given: list[Any], error: BaseException | None) -> None:
    """Note how an op ended that `began` noted: `given` holds its result, if it has one."""
    trail = _trails().get(op["mesh"])
    if trail is None:
        return
    if error is not None:
        trail.add({**op, "op": f"{op['op']} raised {type(error).__name__}"})
    elif given and given[0] is not None and not _matters(op["op"], args, given[0]):
        trail.drop(op)


def _matters(op: str, args: Any, result: Any) -> bool:
    """Whether other ranks must run the op, too."""
    made = [x for x in _leaves(result) if isinstance(x, ShardTensor)]
    if not made or op.endswith("_"):
        return bool(made)
    whole = all(map(is_whole, _leaves((args, made))))
    return not whole or any(x.requires_grad for x in made)


def _leaves(tree: Any) -> list[Any]:
    return pytree.tree_leaves(tree, is_leaf=lambda x: isinstance(x, ShardTensor))


def follow_methods() -> None:
    """Let the methods of ShardTensor that are not dispatched be noted, too."""
    for name in _METHODS:
        _kept[name] = getattr(ShardTensor, name)
        setattr(ShardTensor, name, _following(name, _kept[name]))


def leave_methods() -> None:
    """End what `follow_methods` began."""
    while _kept:
        setattr(ShardTensor, *_kept.popitem())


def _following(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: ShardTensor, *args: Any, **kwargs: Any) -> Any:
        if not getattr(counters.current_op, "name", "") and not _torch.in_backward():
            began(name, (self, *args), kwargs)
        return method(self, *args, **kwargs)

    return call
