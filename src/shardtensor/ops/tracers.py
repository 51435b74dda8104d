"""Functions of torch that trace or pack their arguments, which loses the shards: refused."""

from __future__ import annotations

from typing import Any, NoReturn

from ..dispatch.rule import rule
from ..errors import UnsupportedOpError

_HIGHER = "call the branch or the body that is meant in Python, on ShardTensors"
_JAGGED = (
    "put the samples one after the other in one tensor, and attend within each by varlen_attn or "
    "flex_attention with a mask of their numbers"
)
ADVICE = {
    "torch.cond": _HIGHER,
    "torch._higher_order_ops.while_loop.while_loop": _HIGHER,
    "torch._higher_order_ops.scan.scan": _HIGHER,
    "torch._higher_order_ops.associative_scan.associative_scan": "use cumsum, cumprod or their kin",
    "torch._higher_order_ops.map.map": _HIGHER,
    "torch.nested.nested_tensor": _JAGGED,
    "torch.nested.as_nested_tensor": _JAGGED,
    "torch.jit.trace": "trace the model on plain tensors, then call it with ShardTensors",
    "torch.jit.trace_module": "trace the model on plain tensors, then call it with ShardTensors",
    "torch.export.export": "export the model with plain tensors",
}


@rule(*ADVICE)
def refused(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    original = function.__wrapped__
    where = f"{original.__module__}.{original.__name__}"
    advice = next(v for k, v in ADVICE.items() if k.endswith(f".{original.__name__}"))
    raise UnsupportedOpError(f"{where} of ShardTensors: {advice}")


refused.takes_function = True  # type: ignore[attr-defined]
