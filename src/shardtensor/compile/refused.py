"""What a program may not do while it is traced, as the graph would not hold it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .._torch import probe
from ..dispatch.fallback import is_shard
from ..errors import UnsupportedOpError
from ..spec import Spec
from ..tensor import ShardTensor
from ..tensor.aliases import stale
from ..tensor.tape import Tape


def _as_tensor(data: Tensor, dtype: Any = None, device: Any = None) -> Tensor:
    plain = dtype is None and device is None
    return data if plain else data.to(device or data.device, dtype or data.dtype)


def _tensor(
    data: Tensor, dtype: Any = None, device: Any = None, requires_grad: bool = False, **_: Any
) -> Tensor:
    y = _as_tensor(data.detach(), dtype, device).clone()
    return y.requires_grad_() if requires_grad else y


# functions that ask modes alone, never a tensor: traced, they would end at a ShardTensor
_OF_MODES = {torch.as_tensor: _as_tensor, torch.tensor: _tensor}


class NoHooks(torch.overrides.TorchFunctionMode):
    """Raises for what runs in backward and would be lost with the traced tensors.

    specs: those of all ShardTensors that functions took, as of one that is closed over.
    """

    def __init__(self) -> None:
        super().__init__()
        self.specs: dict[Spec, None] = {}

    lost = {  # noqa: RUF012
        Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.backward,
        torch.autograd.backward, Tensor.retain_grad, torch.autograd.grad,
    }  # fmt: skip

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self.lost:
            raise UnsupportedOpError(
                f"{func.__name__} inside a compiled program, which keeps no tensors to call it "
                "for: call it on the result, or leave this part out of st.compile"
            )
        kwargs = kwargs or {}
        for x in pytree.tree_leaves((args, kwargs), is_leaf=is_shard):
            if isinstance(x, ShardTensor):
                self.specs[x._spec] = None
        if func in _OF_MODES and isinstance(args[0] if args else kwargs.get("data"), ShardTensor):
            func = _OF_MODES[func]
        return func(*args, **kwargs)


class NoWrites(TorchDispatchMode):
    """Raises for writes to tensors with memory that were there before: they would happen twice.

    And for a random generator that was seeded since: a graph holds no seeds.
    """

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape
        # kept, so that nothing else gets their memory
        self.made: dict[int, Tensor] = {}
        self.stale = set(stale)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Take back what is stale of such tensors, whose copies were written to, and raise."""
        super().__exit__(kind, error, trace)
        roots = {c: e.piece.roots[0]() for c, e in stale.items() if c not in self.stale}
        missed = [stale.pop(c) for c, x in roots.items() if x is not None and not probe.is_fake(x)]
        if missed and error is None:
            raise UnsupportedOpError(str(missed[0]))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Note the memory that ops make; raise for a write to any other."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.tape.check()
        old = [m for m in map(_memory, pytree.tree_leaves((args, kwargs))) if m not in self.made]
        if func._schema.is_mutable:
            given = {a.name: x for a, x in zip(func._schema.arguments, args, strict=False)} | kwargs
            marks = {a.name: a.alias_info for a in func._schema.arguments}
            written = [x for k, x in given.items() if marks[k] and marks[k].is_write]
            if any(m is not None and m in old for m in map(_memory, pytree.tree_leaves(written))):
                raise UnsupportedOpError(
                    f"{func} of a tensor that a compiled program closes over: make it a buffer of "
                    "the module that is compiled, or leave the write out of st.compile"
                )
        out = func(*args, **kwargs)
        for x in pytree.tree_leaves(out):
            memory = _memory(x)
            if memory is not None and memory not in old:
                self.made[memory] = x
        return out


@contextmanager
def without_what_no_graph_holds() -> Iterator[None]:
    """Refuse what torch ends in words of its own.

    These are torch.func around collectives, which are Functions of its own there: a higher-order
    op that no mode knows; and draws from the user's generators, on torch up to 2.12.
    """
    try:
        yield
    except AssertionError as e:
        if "not registered" not in str(e):
            raise
        raise UnsupportedOpError(
            "torch.func around ops that communicate, in a compiled program: leave this part out of "
            "st.compile"
        ) from e
    except NotImplementedError as e:
        if "Generator" not in str(e):
            raise
        raise UnsupportedOpError(
            "a compiled program that draws from a generator of its own, on torch before 2.13: draw "
            "from torch's default one, or leave it out of st.compile"
        ) from e


def check_whole(graph: fx.GraphModule) -> None:
    """Raise where a graph holds a tensor without memory: what made it was not recorded."""
    for node in graph.graph.nodes:
        held = getattr(graph, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(held, Tensor) and probe.is_fake(held):
            raise UnsupportedOpError(
                "a compiled program takes a tensor that it did not make in a way that can be "
                "recorded: leave this part out of st.compile"
            )


def _memory(x: Any) -> int | None:
    """Where the elements of a real tensor lie."""
    if isinstance(x, Tensor) and not probe.is_fake(x) and x.layout is torch.strided:
        return x.untyped_storage().data_ptr()
    return None
