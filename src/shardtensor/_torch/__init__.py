"""Every use of a private torch API, by subject (checked on torch 2.11 and 2.13).

Here is what many modules use; `probe`, `dtensor`, `script`, `modules` and `kernels` are imported by
name.
"""

from .attention import AttentionKernel, attention_kernel
from .autograd import (
    apply,
    c_grad_fn,
    first_hook,
    graph_task,
    in_backward,
    install_ddp_hook,
    install_engine_hook,
    install_function_hook,
    run_last,
    saving_elsewhere,
    will_run,
)
from .checkpoint import checkpointed
from .dispatcher import (
    composite_call,
    functorch_level,
    guard_transforms,
    hide_from_dynamo,
    is_tracing,
    leaf_call,
    make_wrapper,
    no_torch_function,
    not_tracing,
    outside_modes,
    tell_dynamo,
)
from .memory import owns_memory, same_memory, storage_ref
from .ops import (
    OpOverload,
    OpOverloadPacket,
    asks_for_overrides,
    aten_packet,
    handle_torch_function_names,
    is_composite,
    is_mutable,
    is_pointwise,
    is_python_function,
    is_random,
    is_view,
    ops_of,
    overloads,
)
from .world import all_gather_flat, at_uncaught, default_store, threaded_world

__all__ = [
    "AttentionKernel",
    "OpOverload",
    "OpOverloadPacket",
    "all_gather_flat",
    "apply",
    "asks_for_overrides",
    "at_uncaught",
    "aten_packet",
    "attention_kernel",
    "c_grad_fn",
    "checkpointed",
    "composite_call",
    "default_store",
    "first_hook",
    "functorch_level",
    "graph_task",
    "guard_transforms",
    "handle_torch_function_names",
    "hide_from_dynamo",
    "in_backward",
    "install_ddp_hook",
    "install_engine_hook",
    "install_function_hook",
    "is_composite",
    "is_mutable",
    "is_pointwise",
    "is_python_function",
    "is_random",
    "is_tracing",
    "is_view",
    "leaf_call",
    "make_wrapper",
    "no_torch_function",
    "not_tracing",
    "ops_of",
    "outside_modes",
    "overloads",
    "owns_memory",
    "run_last",
    "same_memory",
    "saving_elsewhere",
    "storage_ref",
    "tell_dynamo",
    "threaded_world",
    "will_run",
]
