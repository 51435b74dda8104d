"""Functions of torch that trace or pack their arguments, which loses the shards: refused."""

from __future__ import annotations

from typing import Any, NoReturn

from .. import _torch, registry
from ..dispatch.fallback import fall_back
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
    "torch.func.linearize": "use torch.func.jvp",
}


@rule(*ADVICE)
def refused(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    original = function.__wrapped__
    where = f"{original.__module__}.{original.__name__}"
    advice = next(v for k, v in ADVICE.items() if k.endswith(f".{original.__name__}"))
    raise UnsupportedOpError(f"{where} of ShardTensors: {advice}")


@registry.rule(_torch.FUNCTION_OF_TRANSFORMS)
def function(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NoReturn:
    raise UnsupportedOpError(
        f"torch.func or forward mode through {args[0].__name__}, an autograd.Function, of "
        "ShardTensors: take torch.autograd.grad, or write it in torch's functions"
    )


@registry.rule("quantize_per_tensor", "quantize_per_tensor_dynamic", "quantize_per_channel")
def quantized(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    spec = (*args, *kwargs.values())[0]._spec
    if spec.varying:
        raise UnsupportedOpError(
            f"{func.__name__} of {spec}, as quantized tensors cannot be cut: quantize x.to_local() "
            "or x.full_tensor(), or take torch.fake_quantize_per_tensor_affine"
        )
    return fall_back(func, args, kwargs)


refused.takes_function = True  # type: ignore[attr-defined]
function.takes_function = True  # type: ignore[attr-defined]
quantized.takes_function = True  # type: ignore[attr-defined]
