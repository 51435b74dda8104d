# mypy: disable-error-code="attr-defined, union-attr, assignment, misc"
"""Private torch APIs that tell what a function or an op is."""

from __future__ import annotations

import types
from functools import cache
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

OpOverload = torch._ops.OpOverload
OpOverloadPacket = torch._ops.OpOverloadPacket
# -x as a view
neg_view = torch._neg_view
_aten = torch.ops.aten
# ops that touch no memory
TOUCH_NOTHING = {
    _aten.view.default, _aten.detach.default, _aten.alias.default, _aten._unsafe_view.default
}  # fmt: skip
handle_torch_function_names = (
    "has_torch_function",
    "has_torch_function_unary",
    "has_torch_function_variadic",
)


def aten_packet(name: str) -> Any:
    """The aten op of this name, or None."""
    found = getattr(torch.ops.aten, name, None)
    # the namespace has attributes of its own, such as its name
    return found if isinstance(found, OpOverloadPacket) else None


def overloads(packet: Any) -> list[Any]:
    """All overloads of an op packet."""
    return [getattr(packet, o) for o in packet.overloads()]


# torch (2.11 to 2.15) says that it draws, and refuses a dropout other than 0
_SURE = "_scaled_dot_product_flash_attention_for_cpu"


def is_random(packet: Any) -> bool:
    """Whether the op draws from a random generator."""
    if packet is getattr(_aten, _SURE, None):
        return False
    return any(torch.Tag.nondeterministic_seeded in o.tags for o in overloads(packet))


def is_pointwise(packet: Any) -> bool:
    """Whether every form of the op works element by element, with broadcasting."""
    # max and min of two tensors do; of one they reduce
    name = packet._qualified_op_name.split("::")[-1]
    # eq_, abs_ and others lack the tag that eq and abs have
    alike = (packet, aten_packet(name[:-1]) if name.endswith("_") else None)
    tagged = (torch.Tag.pointwise in o.tags for p in alike if p for o in overloads(p))
    return name not in ("max", "min") and any(tagged)


def is_composite(packet: Any) -> bool:
    """Whether the dispatcher decomposes the op into others before any backend sees it."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    # an aten name may have TorchScript overloads that the dispatcher does not know
    return any(
        torch._C._dispatch_has_kernel(o.name())
        and torch._C._dispatch_has_kernel_for_dispatch_key(o.name(), key)
        for o in overloads(packet)
    )


def is_view(packet: Any) -> bool:
    """Whether the op returns a view of an argument."""
    return any(
        r.alias_info is not None and not r.alias_info.is_write
        for o in overloads(packet)
        for r in o._schema.returns
    )


def is_mutable(overload: Any) -> bool:
    """Whether the op writes to an argument."""
    return bool(overload._schema.is_mutable)


def written_to(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments whose memory the op changes; all of an op that does not say."""
    if not hasattr(op, "_schema"):
        return [args, kwargs]
    places, names = _written(op)
    found = [args[i] for i in places if i < len(args)]
    return found + [kwargs[name] for name in names if name in kwargs]


@cache
def _written(op: Any) -> tuple[list[int], list[str]]:
    # norms of batches write running statistics and do not say so
    found = [
        (i, a.name)
        for i, a in enumerate(op._schema.arguments)
        if (a.alias_info is not None and a.alias_info.is_write) or a.name.startswith("running_")
    ]
    return [i for i, _ in found], [name for _, name in found]


def ops_of(key: Any) -> list[Any]:
    """The overloads that a custom op or an op packet stands for."""
    if isinstance(key, CustomOpDef):
        return [key._opoverload]
    if isinstance(key, torch._ops.OpOverloadPacket):
        return [getattr(key, name) for name in key.overloads()]
    return [key] if isinstance(key, torch._ops.OpOverload) else []


def is_python_function(x: Any) -> bool:
    """Whether x is written in Python."""
    return isinstance(x, types.FunctionType)


def override_checks(names: dict[str, Any]) -> list[str]:
    """Which of a module's names look for `__torch_function__`: torch.foreach (2.15) has its own."""
    known = {id(getattr(torch.overrides, n)) for n in handle_torch_function_names}
    return [n for n, v in names.items() if n in handle_torch_function_names or id(v) in known]


def asks_for_overrides(function: Any) -> bool:
    """Whether a Python function looks for `__torch_function__` of its arguments."""
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    seen = {n: getattr(function, "__globals__", {}).get(n) for n in names}
    return bool(override_checks(seen))
