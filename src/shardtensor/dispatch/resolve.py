"""From a torch function to its handler: a rule, pointwise, a decomposition or the fallback."""

from __future__ import annotations

import sys
import traceback
import types
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import _torch
from .._torch import probe, script
from ..comm import counters
from ..errors import UnsupportedOpError
from ..registry import OUT, POINTWISE, Handler, handlers, rules
from ..spec import Spec, hollow, when_hollow
from ..tensor import ShardTensor, wrap
from ..tensor.aliases import stale
from ..tensor.layout import turned
from ..tensor.offset import take_rows
from .axes import NOWHERE, mesh_of, met
from .direct import DIRECT
from .fallback import fall_back, into_plain, is_shard, op_name
from .follow import NOT, begins_within, follow, hides, kind_of
from .results import keep_result, saves_result
from .trial import ENGINE, is_tried, try_out, vacant
from .writes import check_readable, writing

# dunder methods whose aten op has another name; those in _REFLECTED swap their arguments
_DUNDER = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "invert": "bitwise_not"}
_DUNDER |= {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder"}
_DUNDER |= {"lshift": "bitwise_left_shift", "rshift": "bitwise_right_shift"}
_REFLECTED = {"radd", "rmul", "rsub", "rtruediv", "rfloordiv", "rmod", "rpow", "rmatmul"}
_REFLECTED |= {"rand", "ror", "rxor", "rlshift", "rrshift"}
_PLAIN_DUNDER = {"add", "sub", "mul", "pow", "matmul", "eq", "ne", "lt", "le", "gt", "ge", "neg"}
_PLAIN_DUNDER |= {"abs", "getitem", "setitem", "pos"}
_ALIASES = {"true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub"}
_ALIASES |= {"arctan2": "atan2", "_is_all_true": "all", "_is_any_true": "any"}
_ALIASES |= {f"{name}_": f"{op}_" for name, op in _ALIASES.items()}
# elementwise, though torch does not tag them so
_UNTAGGED = {"hardswish", "hardswish_", "log_sigmoid", "complex", "polar", "floor_divide"}
# they change what the tensor looks like, not what it holds
_IN_PLACE_VIEWS = {"t_", "transpose_", "swapaxes_", "swapdims_", "squeeze_", "unsqueeze_"}
# they add up in the dtype of `out=`
_ADDING = {"sum", "prod", "cumsum", "cumprod"}
# attributes of the local tensor that are those of the whole
_LOCAL_ATTRIBUTES = {
    "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_mkldnn", "is_xpu", "is_mps",
    "is_nested", "is_sparse_csr", "layout", "itemsize", "names", "_version", "output_nr",
    "_backward_hooks", "is_ort", "is_xla", "is_ipu", "is_maia", "is_vulkan", "is_mtia", "is_hpu",
    "get_device", "is_floating_point", "is_complex", "is_signed", "element_size", "is_inference",
    "is_conj", "is_neg", "_is_view", "is_pinned", "is_coalesced", "has_names", "is_distributed",
    "is_shared", "name",
}  # fmt: skip


def _canonical(func: Any) -> tuple[str, bool]:
    """The aten name of a torch function, and whether it takes its arguments reflected."""
    if isinstance(func, _torch.OpOverload):
        func = func.overloadpacket
    name = getattr(func, "__name__", "")
    if isinstance(func, _torch.OpOverloadPacket):
        name = func._qualified_op_name.split("::")[-1]
    if name == "__get__":
        # a C descriptor, or a property written in Python
        return getattr(func.__self__, "__name__", None) or func.__self__.fget.__name__, False
    if not (name.startswith("__") and name.endswith("__")):
        return _ALIASES.get(name, name), False
    bare = name[2:-2]
    if bare in _REFLECTED:
        bare = bare[1:]
        return _DUNDER.get(bare, bare), True
    if bare in _DUNDER or bare in _PLAIN_DUNDER:
        return _DUNDER.get(bare, bare), False
    if bare.startswith("i") and (bare[1:] in _DUNDER or bare[1:] in _PLAIN_DUNDER):
        return _DUNDER.get(bare[1:], bare[1:]) + "_", False
    return name, False


def _resolve(func: Any) -> Handler:
    """The handler of a function: a rule, its parts, pointwise, or the fallback."""
    if isinstance(func, script.Scripted):
        return _counted(_scripted, str(func.name), False, False)
    name, reflected = _canonical(func)
    packet = _torch.aten_packet(name)
    own = func in rules or name in rules
    handler: Handler
    if not isinstance(func, _torch.OpOverload) and _has_rule(packet):
        # torch chooses the overload, which comes back through `__torch_dispatch__`
        return _decompose
    if func in rules:
        handler = _calling(rules[func])
    elif name in rules and (
        not _torch.is_python_function(func) or getattr(Tensor, name, None) is func
    ):
        # a Python method of Tensor is what C++ names when its builtin of that name is overridden
        handler = _calling(rules[name])
    elif name in _LOCAL_ATTRIBUTES:
        return _local_attribute
    elif getattr(func, "__name__", "") == "__set__":
        raise UnsupportedOpError(f"setting the attribute {func.__self__.__name__} of a ShardTensor")
    elif _torch.is_python_function(func):
        return _opened(func)
    elif name in _UNTAGGED or _elementwise(name, packet):
        handler = rules[POINTWISE]
    elif not isinstance(func, _torch.OpOverload) and (packet is None or _splits_up(packet)):
        return _decompose
    else:
        handler = fall_back
    if reflected:
        handler = _reflected(handler, name, own)
    writes = name == "setitem" or (name.endswith("_") and not name.endswith("__"))
    if writes and name not in _IN_PLACE_VIEWS:
        alone = getattr(rules.get(name), "takes_plain", False) or "foreach" in name
        handler = writing(handler, name, handler if alone else _onto(handler))
    return _counted(handler, name, writes, is_tried(func, name) and _own(handler))


def _has_rule(packet: Any) -> bool:
    """Whether there is a rule for an overload of an aten op."""
    return packet is not None and any(getattr(packet, o) in rules for o in packet.overloads())


def _elementwise(name: str, packet: Any) -> bool:
    """Whether torch tags the op so, or the one that returns a new tensor."""
    packets = (packet, _torch.aten_packet(name[:-1]) if name.endswith("_") else None)
    found = [p for p in packets if p is not None]
    return any(map(_torch.is_pointwise, found)) and not any(map(_torch.is_random, found))


def _splits_up(packet: Any) -> bool:
    return _torch.is_composite(packet)


def _calling(fn: Callable[..., Any]) -> Handler:
    """The handler of a rule: arguments bound by Python, numpy's names for them translated."""
    if getattr(fn, "takes_function", False):
        return fn

    def handler(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not kwargs:
            return fn(*args)
        if "axis" in kwargs:
            kwargs["dim"] = kwargs.pop("axis")
        if "keepdims" in kwargs:
            kwargs["keepdim"] = kwargs.pop("keepdims")
        return fn(*args, **kwargs)

    handler.rule = fn  # type: ignore[attr-defined]
    return handler


def _reflected(handler: Handler, name: str, own: bool) -> Handler:
    forward = getattr(torch, name)

    def reflect(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        a, b = args
        if not isinstance(b, Tensor):
            b = torch.as_tensor(b, device=a.device) if name == "matmul" else b
        return handlers[forward](forward, (b, a), kwargs)

    return reflect


# of the op that makes the first empty shards, until it ends
_first: list[types.FrameType] = []


def _begin() -> None:
    """If an op makes the first empty shards, let it make its views as later ones do."""
    if not _torch.replays_views():
        stack, name = traceback.walk_stack(None), "_counted.<locals>.run"
        _first[:] = [f for f, _ in stack if f.f_code.co_qualname == name][-1:]
        _torch.replay_views(bool(_first))


def _are_strided(*operands: Any) -> bool:
    """Whether none is a sparse tensor."""
    for x in operands:
        plain = x.__class__ is not ShardTensor and isinstance(x, Tensor)
        if plain and x.layout is not torch.strided:
            return False
    return True


def _counted(handler: Handler, name: str, writes: bool, tries: bool) -> Handler:
    """The handler that notes its op in open traces, of operands on one mesh."""
    kind = NOT if writes else kind_of(name)
    kept = saves_result(name)
    within = begins_within(name)
    # what the handler calls where there is nothing to translate
    rule = getattr(handler, "rule", None)

    def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The op: stale operands, other mesh axes, `out=`, then its handler."""
        if hollow and not _torch.replays_views() and _are_strided(*args, *kwargs.values()):
            _torch.replay_views(True)
            try:
                return run(func, args, kwargs)
            finally:
                _torch.replay_views(False)
        try:
            if stale:
                check_readable(args, kwargs)
            mesh = mesh_of(args, None)
            if kwargs and mesh is not NOWHERE:
                mesh = mesh_of(kwargs.values(), mesh)
            if mesh is NOWHERE and func not in ENGINE:
                return met(run, writes, func, args, kwargs)
            if kwargs and "out" in kwargs:
                return _into(run, func, args, kwargs)
            if hollow and tries and (vacant(args) or (kwargs and vacant(kwargs.values()))):
                try_out(func, args, kwargs)
            if not (counters.records or probe.profiling()):
                out = handler(func, args, kwargs) if kwargs or rule is None else rule(*args)
            else:
                with (
                    counters.named(f"shardtensor::{name}"),
                    counters.running(name, handler.__name__, args, kwargs) as given,
                ):
                    out = handler(func, args, kwargs)
                    given.append(out)
            if (turned and not writes) or (kind and hides(kind, args, out)):
                follow(kind, func, args, kwargs, out)
            if kept:
                keep_result(out)
            if within:
                for x in args[:1] or kwargs.values():
                    if x.__class__ is ShardTensor:
                        take_rows(x)
            return out
        finally:
            if _first and _first[0] is sys._getframe():
                _first.clear()
                _torch.replay_views(False)

    return run


def _own(handler: Handler) -> bool:
    """Whether what happens is what torch says: no rule of a user."""
    rule = getattr(handler, "rule", handler)
    return str(getattr(rule, "__module__", "")).startswith(__name__.partition(".")[0])


def _into(run: Handler, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result written into `out=`, whatever handles func; of plain tensors alone func itself."""
    out = kwargs.pop("out")
    if isinstance(func, _torch.OpOverload):
        func = func.overloadpacket
    if isinstance(out, Tensor) and func.__name__ in _ADDING and kwargs.get("dtype") is None:
        kwargs["dtype"] = out.dtype
    sharded = any(is_shard(x) for x in pytree.tree_leaves((args, kwargs), is_leaf=is_shard))
    result = run(func, args, kwargs) if sharded or out is None else func(*args, **kwargs)
    return result if out is None else rules[OUT](func, args, kwargs, out, result)


def _onto(handler: Handler) -> Handler:
    """The handler of an in-place op that may write what is sharded into a plain tensor."""

    def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        plain = args and isinstance(args[0], Tensor)
        if plain and isinstance(func, _torch.OpOverload) and _torch.inside_composite():
            _refuse_history(func, args)
        return (into_plain if plain else handler)(func, args, kwargs)

    return run


def _refuse_history(func: Any, args: tuple[Any, ...]) -> None:
    """Raise where C++, which made the plain tensor that is written to, would lose a gradient."""
    given = [x for x in args if is_shard(x)]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise UnsupportedOpError(
            f"{op_name(func)} of {given[0]._spec} into a plain tensor, which torch's C++ does "
            "inside of a function: its gradient would be lost. Write the function in Python, or "
            "gather its operands (full_tensor())"
        )


def _local_attribute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(args[0]._local, *args[1:], **kwargs)


# of a tensor that is not made yet they are told without it
_local_attribute.of_local = True  # type: ignore[attr-defined]


def _scripted(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What torch.jit made: the Python that was scripted, else its graph op by op."""
    python = script.python_of(func)
    if python is not None:
        return python(*args, **kwargs)
    program, given = script.op_by_op(func, args, kwargs)
    return _decompose(program, given, {}, True)


def handler_of_shards(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Handler | None:
    leaves = pytree.tree_leaves((args, kwargs), is_leaf=is_shard)
    return handlers[func] if any(map(is_shard, leaves)) else None


def _decompose(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], every: bool = False
) -> Any:
    """A C++ composite: its leaf ops come back through `__torch_dispatch__`.

    every: plain tensors are wrapped too, for a program with autograd of its own.
    """
    if "out" in kwargs:
        return _into(_decompose, func, args, kwargs)
    leaves, tree = pytree.tree_flatten((args, kwargs), is_leaf=is_shard)
    mesh = next(x._spec.mesh for x in leaves if is_shard(x))
    # what the composite does to plain tensors alone must be traced, and their tangents followed
    every = every or _torch.is_tracing() or _torch.transforming()
    given = {}
    for i, x in enumerate(leaves):
        if is_shard(x):
            # without history of its own, else C++ would record the composite a second time
            leaves[i] = wrap(x._local, x._spec, x._strides)
            given[id(leaves[i])] = x
        elif isinstance(x, Tensor) and every:
            leaves[i] = wrap(x, Spec.whole(mesh, x.shape))
    args, kwargs = pytree.tree_unflatten(leaves, tree)
    with _torch.composite_call():
        out = func(*args, **kwargs)
    # an argument given back as it is (atleast_2d)
    same = given.get(id(out))
    return out if same is None or same._local is not out._local else same


class _Instead:
    """A module of which some names are others."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


# for bodies that ask torch.overrides itself, such as those of nn.init
_unasking = _Instead(
    torch,
    overrides=_Instead(
        torch.overrides,
        **{n: lambda *_: False for n in _torch.handle_torch_function_names if n.startswith("has_")},
    ),
)


@cache
def opened(func: Any) -> Callable[..., Any]:
    """A Python composite without its own override check, so that calling it runs its body.

    Functions called by the body still dispatch, but for its private helpers (`_max_pool2d` behind
    `max_pool2d`), whose check would lead back to func.
    """
    inside = dict(func.__globals__)
    for name, instead in (("torch", _unasking), ("overrides", _unasking.overrides)):
        # torch's own file has the module by its bare name
        if inside.get(name) is instead._module and "overrides" in func.__code__.co_names:
            inside[name] = instead
    for name in _torch.override_checks(inside):
        inside[name] = lambda *_: False
    for name in func.__code__.co_names:
        private = inside.get(name)
        if name.startswith("_") and _asks(private) and private is not func:
            inside[name] = opened(private)
    cells = tuple(
        types.CellType(opened(c.cell_contents))
        # torch.unique chooses between functions that choose again before any checks
        if _torch.is_python_function(c.cell_contents) and c.cell_contents is not func
        else c
        for c in func.__closure__ or ()
    )
    copy = types.FunctionType(func.__code__, inside, func.__name__, func.__defaults__, cells)
    copy.__kwdefaults__ = func.__kwdefaults__
    return wraps(func)(copy)


def _asks(x: Any) -> bool:
    return _torch.is_python_function(x) and _torch.asks_for_overrides(x)


def _opened(func: Any) -> Handler:
    body, direct = opened(func), DIRECT.get(func)
    run: Handler = lambda f, args, kwargs: body(*args, **kwargs)  # noqa: E731
    return run if direct is None else direct(run)


handlers.resolve = _resolve
when_hollow.append(_begin)
handlers.passing = script.Scripted
