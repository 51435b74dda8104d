"""Gradients through `autograd.Function`s that receive ShardTensors.

C++ runs such a Function on the wrapper, past `__torch_function__`. So the wrapper must carry
autograd history of its own there: on the way in it is attached to the graph of its local tensor,
on the way out the local graph continues from the wrapper's history. FSDP2's hooks, module backward
hooks, reentrant checkpoints and users' Functions all pass through here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge
from torch.utils.checkpoint import CheckpointFunction as _Checkpoint

from .. import _torch, later
from .._torch import probe
from .._torch.dtensor import is_around_unit, weights_of_units
from ..comm import observers
from ..errors import UnsupportedOpError
from ..registry import handlers, method, rules
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from ..tensor.aliases import refuse_copy
from ..tensor.nodes import edge_of, spec_of
from ..tensor.redistribute import PLAIN, cotangent, gradient, like, local_of, replicate


class _Attach(torch.autograd.Function):
    """Makes `wrapper` a C++ tensor whose gradient flows to its local tensor."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, wrapper: ShardTensor) -> ShardTensor:
        ctx.materialize_grads = False
        ctx.spec = wrapper._spec
        ctx.mark_dirty(wrapper)
        return wrapper

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        return None if grad is None else cotangent(grad, ctx.spec), None


class _Continue(torch.autograd.Function):
    """The local tensor of a wrapper that came out of a Function; its gradient goes there."""

    @staticmethod
    def forward(ctx: Any, wrapper: ShardTensor, local: Tensor, spec: Spec) -> Tensor:
        ctx.materialize_grads = False
        ctx.spec = spec
        return local.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[ShardTensor | None, None, None]:
        return None if grad is None else gradient(grad, ctx.spec), None, None


class _Pass(torch.autograd.Function):
    """As `_Continue`, of a Function's result that is a view of what it was given.

    Autograd refuses writes to it, which the base would not learn of.
    """

    @staticmethod
    def forward(ctx: Any, wrapper: ShardTensor, local: Tensor, spec: Spec) -> Tensor:
        ctx.materialize_grads = False
        ctx.spec = spec
        return local

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[ShardTensor | None, None, None]:
        return None if grad is None else gradient(grad, ctx.spec), None, None


class _Overwrite(torch.autograd.Function):
    """As `_Continue`, of a tensor that the Function changed in place; its base and views follow."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, wrapper: ShardTensor, spec: Spec) -> Tensor:
        ctx.materialize_grads = False
        ctx.spec = spec
        ctx.mark_dirty(local)
        return local

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ShardTensor | None, None]:
        if grad is None:
            return None, None, None
        return torch.zeros_like(grad), gradient(grad, ctx.spec), None


@method
def leaf(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What C++ calls on wrappers: a leaf op of a composite, or what a function without override is.

    Of the latter torch.func has done its part on the wrapper, which is in none of its levels.
    """
    if not _torch.inside_composite():
        for x in args:
            if isinstance(x, ShardTensor) and _torch.is_batched(x._local):
                raise UnsupportedOpError(
                    f"torch.func through {func}, which torch calls on a ShardTensor by itself, as "
                    "in torch.as_tensor: leave that out, or cast by x.to(dtype)"
                )
    with _torch.leaf_call():
        return handlers[func](func, args, kwargs)


def around_apply(call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """`Function.apply`: on the way in and out, wrappers join their local graphs."""
    if not any(isinstance(a, ShardTensor) for a in args):
        if _torch.is_tracing():
            _check_recording(call.__self__, args)  # type: ignore[attr-defined]
        out = call(*args)
        _continue(out, {})
        return out
    function: Any = call.__self__  # type: ignore[attr-defined]
    if function in (_Attach, _Continue, _Pass, _Overwrite):
        return call(*args)
    if function in rules:
        return rules[function](*args)
    _check_tangents(function, args)
    _check_recording(function, args)
    sent: dict[int, ShardTensor] = {}
    passed = []
    for a in args:
        if isinstance(a, ShardTensor):
            inside = wrap(a._local, a._spec, a._strides)
            if a._local.requires_grad and torch.is_grad_enabled():
                _Attach.apply(a._local, inside)
            sent[id(inside)] = a
            a = inside
        passed.append(a)
    out = call(*passed)
    node = _node_of(out)
    if node is not None:
        if is_around_unit(function):
            # what has no gradient on one device has none in a unit either
            node.materialize_grads = False
        _watch_saved(node, out, passed)
        _keep_plain(node, passed)
    return _continue(out, sent)


def _node_of(out: Any) -> Any:
    """What autograd recorded of a Function, None if nothing."""
    nodes = (_torch.c_grad_fn(x) for x in _tensors(out))
    return next((n for n in nodes if n is not None), None)


def _tensors(out: Any) -> list[Tensor]:
    return [x for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, Tensor)]


def _keep_plain(node: Any, passed: list[Any]) -> None:
    """Let the gradients of plain tensors be plain and whole, though backward computes of shards."""
    given = [a for a in passed if isinstance(a, Tensor)]
    plain = [type(a) in PLAIN and a.requires_grad for a in given]
    if not any(plain):
        return

    def hook(grads: tuple[Any, ...], _: Any) -> tuple[Any, ...] | None:
        if not any(p and isinstance(g, ShardTensor) for p, g in zip(plain, grads, strict=True)):
            return None
        return tuple(
            replicate(g)._local if p and isinstance(g, ShardTensor) else g
            for p, g in zip(plain, grads, strict=True)
        )

    node.register_hook(hook)


def _check_tangents(function: Any, args: tuple[Any, ...]) -> None:
    """Raise where an argument has a tangent, of which C++ knows nothing on a wrapper."""
    if _torch.dual_level() < 0:
        return
    if any(_torch.followed(local_of(a)) for a in args if isinstance(a, Tensor)):
        raise UnsupportedOpError(
            f"torch.func or forward mode through {function.__name__}, an autograd.Function, of "
            "ShardTensors: take torch.autograd.grad, or write it in torch's functions"
        )


def _check_recording(function: Any, args: tuple[Any, ...]) -> None:
    """Raise where a graph is made, which would hold forward's ops and lose backward."""
    if not (_torch.is_tracing() and probe.is_recording() and torch.is_grad_enabled()):
        return
    if any(isinstance(a, Tensor) and a.requires_grad for a in args) or function is _Checkpoint:
        raise UnsupportedOpError(
            f"{function.__name__}.apply in a compiled program, which would lose its backward: "
            "register a rule for it (shardtensor.rule), make it a torch.library.custom_op, use "
            "checkpoint(..., use_reentrant=False), or leave this part out of st.compile"
        )


def _watch_saved(node: Any, out: Any, passed: list[Any]) -> None:
    """Let backward raise, as torch does, if a ShardTensor saved by the Function was written to.

    Writes go to local tensors, so C++, which saved the wrappers, does not see their versions move.
    """
    if not getattr(node, "_raw_saved_tensors", ()):
        return
    if _torch.saving_elsewhere():
        node.register_prehook(_refuse_second)
        return
    shards = [x._local for x in (*passed, *_tensors(out)) if isinstance(x, ShardTensor)]
    node._versions_of_shards = {
        _torch.storage(x)._cdata: x._version for x in shards if not x.is_inference()
    }


_saved: Any = BackwardCFunction.saved_tensors


def _unchanged(node: Any) -> Any:
    """What a Function saved, each as it was then."""
    found = _saved.__get__(node)
    versions = node.__dict__.get("_versions_of_shards")
    for x in found if versions else ():
        then = versions.get(_storage(x)) if isinstance(x, ShardTensor) else None
        if then is not None and x._local._version != then:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an "
                f"inplace operation: ShardTensor {list(x.shape)} is at version "
                f"{x._local._version}; expected version {then} instead"
            )
        if then is not None and torch.is_grad_enabled() and not x._local.requires_grad:
            # a result that was saved: C++ gives it history, of which its local tensor knows nothing
            _continue(x, {})
    return found


BackwardCFunction.saved_tensors = property(_unchanged)  # type: ignore[assignment]


def _refuse_second(_: Any) -> None:
    """Raise where backward itself is differentiated: what hooks saved came back without history."""
    if torch.is_grad_enabled():
        raise UnsupportedOpError(
            "second derivatives through an autograd.Function that saved a ShardTensor inside a "
            "checkpoint or saved_tensors_hooks: call the Function outside of them, or register a "
            "rule for it (shardtensor.rule)"
        )


def _storage(x: ShardTensor) -> int:
    return _torch.storage(x._local)._cdata


def _continue(out: Any, sent: dict[int, ShardTensor]) -> Any:
    """Let the local graph of what a Function gave go on from the wrapper's history."""
    if isinstance(out, tuple):
        return tuple(_continue(o, sent) for o in out)
    if not isinstance(out, ShardTensor):
        return out
    # marked dirty: the caller's tensor is the result
    source = sent.get(id(out))
    if source is not None and source.is_leaf and source.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "a leaf Variable that requires grad has been used in an in-place operation."
        )
    if _torch.c_grad_fn(out) is not None:
        if source is not None:
            refuse_copy(source._local)
        if source is not None and source._local is out._local:
            out._local = _Overwrite.apply(out._local, out, out._spec)
        elif any(_storage(out) == _storage(x) for x in sent.values()):
            out._local = _Pass.apply(out, out._local, out._spec)
        else:
            out._local = _Continue.apply(out, out._local, out._spec)
    if source is None:
        return out
    # addends are added up by a write
    source._local, source._spec = out._local, out._spec
    return source


def engine_roots(
    outputs: Any, grads: Any, accumulate: bool, inputs: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    if inputs and later.fsdp_classes():
        _refuse_weights(inputs, accumulate)
    roots: tuple[Any, ...] = tuple(outputs)
    sharded = False
    for x in roots:
        sharded = sharded or isinstance(x, ShardTensor | GradientEdge)
    if sharded:
        roots = tuple(edge_of(local_of(x)) for x in roots)
    if accumulate:
        observers.claim(leaves(roots))
    if not sharded:
        return roots, tuple(grads)
    specs = map(spec_of, outputs)
    paired = [
        g if g is None or spec is None else cotangent(g, spec)
        for g, spec in zip(grads, specs, strict=True)
    ]
    return roots, tuple(paired)


def _refuse_weights(inputs: Any, accumulate: bool) -> None:
    """Raise where gradients are asked for of weights to whose shards FSDP2 brings them."""
    asked = [x for x in inputs if isinstance(x, torch.nn.Parameter)]
    names = weights_of_units(asked, accumulate) if asked else []
    if names:
        asked_by = "backward(inputs=...)" if accumulate else "torch.autograd.grad"
        raise UnsupportedOpError(
            f"{asked_by} of {', '.join(names[:3])}, to whose shards FSDP2 brings gradients in a "
            "whole backward: call backward() and read their .grad, or leave fsdp out of parallelize"
        )


def engine_results(inputs: Any, grads: Any) -> Any:
    """Gradients for which edges of ShardTensors were given, as ShardTensors."""
    specs = [spec_of(x) if isinstance(x, GradientEdge) else None for x in inputs]
    if not any(specs):
        return grads
    return tuple(
        g if g is None or spec is None else gradient(g, spec)
        for g, spec in zip(grads, specs, strict=True)
    )


def leaves(roots: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors into which a backward would accumulate gradients."""
    nodes: list[Any] = [x.node if isinstance(x, GradientEdge) else x.grad_fn for x in roots]
    yield from (x for x, node in zip(roots, nodes, strict=True) if node is None)
    waiting = [node for node in nodes if node is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            yield node.variable
        for other, _ in getattr(node, "next_functions", ()):
            if other is not None and other not in seen:
                seen.add(other)
                waiting.append(other)


def inside(x: ShardTensor, f: Callable[[Tensor], Tensor]) -> ShardTensor:
    """The tensor with f of its local tensor, which lies alike."""
    return wrap(f(x._local), x._spec, x._strides)


def batch(x: ShardTensor, d: int, f: Callable[[Tensor], Tensor]) -> ShardTensor:
    """One of a batch, whose dim f hides."""
    if x._spec.dims[d].axes:
        raise UnsupportedOpError(
            f"torch.func.vmap over dim {d} of {x._spec}, which is sharded: redistribute it so that "
            "this dim is whole, or write the batch as a dim of the tensor"
        )
    return wrap(f(x._local), x._spec.drop([d]))


def unbatch(x: ShardTensor, d: int, size: int, f: Callable[[Tensor], Tensor]) -> ShardTensor:
    """The batch again, of which x is one."""
    return wrap(f(x._local), x._spec.insert(d % (x.ndim + 1), Dim(size)))


def refuse_tangent() -> None:
    raise UnsupportedOpError(
        "a dual number of a plain tensor with a ShardTensor as its tangent: distribute both alike"
    )


def tangent_of(x: ShardTensor, t: Tensor) -> Tensor:
    """This rank's part of a tangent, cut as the tensor is."""
    return like(t, x._spec)._local


def recomputed_from(x: Any) -> Any:
    """An input of a reentrant checkpoint, which hooks of an outer one may have cut from history."""
    if isinstance(x, ShardTensor) and _torch.c_grad_fn(x) is not None:
        x._local.requires_grad_(x._local.is_floating_point() or x._local.is_complex())
    return x
