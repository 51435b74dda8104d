"""A score_mod or mask_mod of flex_attention, recorded: what it calls, and the tensors it captures.

A recording runs again on blocks of scores, in backward too, when what the function refers to may be
something else; with other tensors in place of those that it captures; and two that do the same
compare equal. It is made at the level of torch functions, in which Python has had its say.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import _torch
from ..errors import UnsupportedOpError


class Ref(NamedTuple):
    """Tensor number i of a recording; captured: of those that come from outside."""

    i: int
    captured: bool = False


class Call(NamedTuple):
    """A function of torch, its arguments and what it gives, with a Ref for each tensor."""

    function: Any
    args: Any
    kwargs: Any
    out: Any


class Recording:
    """The calls of a function of `arity` scalars, each of which a vmap hides four dims of."""

    def __init__(
        self,
        fn: Callable[..., Any],
        name: str,
        examples: Sequence[Tensor],
        stand_in: Callable[[Tensor], Tensor],
    ) -> None:
        """Raises what torch raises of the function.

        examples: as of `run`, of one element each. stand_in: a plain tensor for one it captures.
        """
        self._stand_in = stand_in
        self.name, self.calls, self.captured = name, list[Call](), list[Tensor]()
        self.first = examples[0].ndim == 4
        self._made: dict[int, Ref] = {}
        self._alive: list[Tensor] = []
        self.result: Any = None
        self.dtype: torch.dtype | None = None

        def once(*scalars: Tensor) -> Any:
            for i, x in enumerate(scalars):
                self._number(x, i)
            self._next = len(scalars)
            with _Recorder(self):
                out = fn(*scalars)
            if isinstance(out, Tensor) and out.ndim:
                raise RuntimeError(f"{name} gave a tensor of shape {tuple(out.shape)}, no scalar")
            self.result = self._known(out)
            self.dtype = getattr(out, "dtype", None)
            captured = type(self.result) is Ref and self.result.captured
            return self._stand_in(out) if captured else out

        counts = not examples[0].is_inference()
        before = examples[0]._version if counts else 0
        with torch.no_grad():
            _over_scores(once, self.first)(*examples)
        # whether it changes its first argument in place; there is no backward of inference tensors
        self.writes = counts and examples[0]._version != before
        self._made, self._alive = {}, []

    @property
    def key(self) -> Hashable:
        """Equal for recordings that compute the same from the same captured tensors."""
        return _hashable([self.result, [tuple(c) for c in self.calls]])

    def run(self, captured: Sequence[Tensor], *indices: Tensor) -> Tensor:
        """What the function gives of all scores; captured: in place of what it captures."""
        out: Tensor = _over_scores(self.function(captured), self.first)(*indices)
        return out

    def function(self, captured: Sequence[Tensor]) -> Callable[..., Any]:
        """The function of scalars, with these in place of what it captures."""

        def replay(*scalars: Tensor) -> Any:
            table = list(scalars)

            def value(x: Any) -> Any:
                return (captured if x.captured else table)[x.i] if type(x) is Ref else x

            for call in self.calls:
                out = call.function(*_mapped(call.args, value), **_mapped(call.kwargs, value))
                _store(call.out, out, table)
            return value(self.result)

        # torch asks how many arguments it takes
        if self.first:
            return lambda score, b, h, i, j: replay(score, b, h, i, j)
        return lambda b, h, i, j: replay(b, h, i, j)

    def _number(self, x: Tensor, i: int) -> Ref:
        self._alive.append(x)
        return self._made.setdefault(id(x), Ref(i))

    def _known(self, x: Any) -> Any:
        """What stands for an argument."""
        if not isinstance(x, Tensor):
            return x
        ref = self._made.get(id(x))
        if ref is None:
            if _torch.is_batched(x):
                raise UnsupportedOpError(
                    f"flex_attention of ShardTensors: its {self.name} calls an autograd.Function "
                    "or an op of torch.ops, which are not recorded: write it in torch functions"
                )
            ref = self._made[id(x)] = Ref(len(self.captured), captured=True)
            self.captured.append(x)
        return ref

    def _new(self, x: Any) -> Any:
        """What stands for a result."""
        if not isinstance(x, Tensor):
            return None
        known = self._made.get(id(x))
        if known is not None:
            return known
        self._next += 1
        return self._number(x, self._next - 1)

    def note(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Call a function and record it."""
        given = _mapped(args, self._known), _mapped(kwargs, self._known)

        def plain(x: Any) -> Any:
            ref = self._made.get(id(x)) if isinstance(x, Tensor) else None
            return self._stand_in(x) if ref is not None and ref.captured else x

        out = function(*_mapped(args, plain), **_mapped(kwargs, plain))
        self.calls.append(Call(function, *given, _mapped(out, self._new)))
        return out


class _Recorder(TorchFunctionMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self.recording = recording

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            # an index that is a scalar of a batch has no value to select by
            if all(isinstance(i, Tensor | int) and not isinstance(i, bool) for i in index):
                func, args = _index, (args[0], *index)
        return self.recording.note(func, args, kwargs or {})


def _index(x: Tensor, *index: Tensor | int) -> Tensor:
    found = [i if isinstance(i, Tensor) else torch.tensor(i, device=x.device) for i in index]
    return torch.ops.aten.index.Tensor(x, found)


def _over_scores(fn: Callable[..., Any], scores: bool) -> Callable[..., Any]:
    """A function of scalars, of vectors of b, h, q and k; scores: and first of scores of them."""
    first = (0,) if scores else ()
    for hidden in (3, 2, 1, 0):
        dims = [None] * 4
        dims[hidden] = 0  # type: ignore[call-overload]
        fn = torch.vmap(fn, in_dims=(*first, *dims))
    return fn


def _mapped(tree: Any, f: Callable[[Any], Any]) -> Any:
    kind = type(tree)
    if kind in (tuple, list):
        return kind([_mapped(x, f) for x in tree])
    if kind is dict:
        return {k: _mapped(x, f) for k, x in tree.items()}
    if kind is slice:
        return slice(*(_mapped(x, f) for x in (tree.start, tree.stop, tree.step)))
    if isinstance(tree, tuple) and not isinstance(tree, torch.Size | Ref):
        # what torch returns of several results
        return tuple([_mapped(x, f) for x in tree])
    return f(tree)


def _store(refs: Any, out: Any, table: list[Any]) -> None:
    if type(refs) is Ref:
        if not refs.captured:
            table.extend([None] * (refs.i + 1 - len(table)))
            table[refs.i] = out
    elif isinstance(refs, tuple | list):
        for ref, x in zip(refs, out, strict=True):
            _store(ref, x, table)


def _hashable(tree: Any) -> Hashable:
    if isinstance(tree, tuple | list):
        return tuple([_hashable(x) for x in tree])
    if isinstance(tree, dict):
        return tuple([(k, _hashable(x)) for k, x in tree.items()])
    if isinstance(tree, slice):
        return "slice", _hashable((tree.start, tree.stop, tree.step))
    try:
        hash(tree)
    except TypeError:
        return repr(tree)
    # 1, 1.0 and True are equal
    return type(tree), tree
