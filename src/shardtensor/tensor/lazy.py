"""Tensors whose local part is made when something reads it.

What makes it is a `Recipe`, made of specs and of memory that nobody else can write to, so that it
gives the same whenever it runs. Attributes are known before and communicate nothing. A few
functions take such a tensor as it is (`unevaluated`); any other one finds a plain ShardTensor, and
so does whatever reads `_local`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from .. import _torch
from ..comm import counters
from ..errors import UnsupportedOpError
from ..registry import handlers, method
from ..spec import Spec
from . import layout
from .aliases import refuse_stale
from .nodes import ShardNode, edge_of, stand_for
from .shard_tensor import ShardTensor

# torch function -> what may handle it where an operand is lazy; NotImplemented: not this one
unevaluated: dict[Any, list[Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]]] = {}


def takes_lazy(*functions: Any) -> Callable[[Any], Any]:
    """Register the decorated function for torch functions of operands that stay lazy."""

    def register(fn: Any) -> Any:
        for function in functions:
            unevaluated.setdefault(function, []).append(fn)
        return fn

    return register


class Recipe:
    """How a local tensor is made, and what is known of it before: the same on every rank.

    name: of the op in traces. token: stands for its memory among those of its family. bypassed:
    whether gradients go past the tensor, as those of modes that were taken from it.
    """

    name = "lazy"
    bypassed = False

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.grad, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        with _torch.outside_modes() if _torch.is_tracing() else nullcontext():
            self.token = torch.empty(0)

    @property
    def memory(self) -> Tensor:
        """What is stale where reading it would be wrong."""
        return self.token

    @property
    def facts(self) -> Tensor:
        """A tensor that tells what all such tensors are: on which device, of which kind."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    @property
    def grad_fn(self) -> Any:
        """Some node of the graph, None where no gradient is wanted."""
        raise NotImplementedError

    def local(self, x: Lazy, view: bool) -> Tensor:
        """The local tensor of x; view: part of the same memory as what it was taken from."""
        raise NotImplementedError

    @contextmanager
    def then(self) -> Iterator[None]:
        """Inside, ops run as they would have when the recipe was made."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            # a checkpoint that runs the reader again finds it made
            stack.enter_context(_torch.saving_here())
            stack.enter_context(counters.named(f"shardtensor::{self.name}"))
            if counters.records:
                running = counters.running(self.name, "lazy", device=self.device)
                stack.enter_context(running)
            yield


class Lazy(ShardTensor):
    """A ShardTensor before its local tensor is made; then it is a ShardTensor in all respects."""

    __module__ = ShardTensor.__module__
    _recipe: Recipe
    # the node that stands for what will make it
    _waiting: ref[ShardNode] | None = None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _torch.transforming():
            settle(func, args, kwargs)
            return super().__torch_function__(func, types, args, kwargs)
        known = unevaluated.get(func)
        if known is not None:
            name = str(func.__name__).strip("_")
            noted = counters.running(name, "lazy", args, kwargs) if counters.records else None
            with noted or nullcontext([]) as given:
                for fn in known:
                    out = fn(func, args, kwargs)
                    if out is not NotImplemented:
                        given.append(out)
                        return out
        elif getattr(handlers[func], "of_local", False) and isinstance(args[0], Lazy):
            return func(args[0]._recipe.facts, *args[1:], **kwargs)
        settle(func, args, kwargs)
        return super().__torch_function__(func, types, args, kwargs)

    @property
    def _local(self) -> Tensor:
        evaluate(self)
        found: Tensor = self.__dict__["_local"]
        return found

    @_local.setter
    def _local(self, local: Tensor) -> None:
        if self._waiting is not None and self._waiting() is not None:
            # somebody holds the node of what is replaced
            evaluate(self)
            self._local = local
        else:
            self._become(local)

    def _become(self, local: Tensor) -> None:
        bypassed = self._recipe.bypassed
        node = None if self._waiting is None else self._waiting()
        self.__dict__.pop("_waiting", None)
        del self._recipe
        self.__class__ = ShardTensor  # type: ignore[assignment]
        self._local = local
        if bypassed:
            self._bypassed = True
        if node is not None:
            stand_for(self, node)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._recipe.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._recipe.device

    @property
    def requires_grad(self) -> bool:
        return self._recipe.grad_fn is not None

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self._local.requires_grad = value

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        return self._recipe.grad_fn is None

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        if self._recipe.grad_fn is None:
            return None
        node = None if self._waiting is None else self._waiting()
        if node is None:
            node = ShardNode(self._spec, self)
            self._waiting = ref(node)
        return node

    @property
    def retains_grad(self) -> bool:  # type: ignore[override]
        return False


Lazy.__name__ = Lazy.__qualname__ = ShardTensor.__name__


def lazy(recipe: Recipe, spec: Spec, strides: tuple[int, ...] | None = None) -> Lazy:
    """The ShardTensor that lies as spec and is made by a recipe; strides: those of the whole."""
    made = _torch.make_wrapper(Lazy, spec.shape, dtype=recipe.dtype, device=recipe.device)
    made._recipe = recipe
    made._spec = spec
    if strides is None:
        made._strides = layout.Strides(layout.dense(spec.shape), False)
    else:
        made._strides = layout.Strides.of(spec.shape, strides)
    return made


def evaluate(x: Lazy, view: bool = True) -> None:
    """Make the local tensor of x. May communicate: every rank of the mesh must come here."""
    recipe = x._recipe
    refuse_stale(recipe.memory)
    with recipe.then():
        local = recipe.local(x, view)
    if x._strides is not None and x._strides.strides == layout.dense(x._spec.shape):
        x._strides = None
    x._become(local)


def settle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Make the local tensors of all lazy operands of func."""
    found: list[Lazy] = []
    _find(args, found)
    _find(kwargs.values(), found)
    first = args[0] if args else None
    for x in found:
        if isinstance(x, Lazy):
            evaluate(x, view=x is first and _writes(func))


def _find(values: Any, found: list[Lazy]) -> None:
    for x in values:
        if isinstance(x, Lazy):
            found.append(x)
        elif isinstance(x, list | tuple):
            _find(x, found)
        elif isinstance(x, dict):
            _find(x.values(), found)


def _writes(func: Any) -> bool:
    """Whether func writes to its first operand; `*=` comes as mul_."""
    name = str(getattr(func, "__name__", "")).split(".")[0]
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


@method
def refuse_bypassed(x: Any) -> None:
    """Raise UnsupportedOpError for a tensor that gradients of what was taken from it go past."""
    if isinstance(x, ShardTensor) and x._bypassed and x.requires_grad:
        raise UnsupportedOpError(
            f"the gradient of a spectrum on {x._spec}, of which modes were taken or sent alone "
            "before: take them of its .clone(), and ask for the gradient of that"
        )


@method
def engine_input(x: Any) -> Any:
    """What the engine takes for a tensor whose gradient is asked for."""
    local = x._local if isinstance(x, ShardTensor) else edge_of(x)
    refuse_bypassed(x)
    return local
