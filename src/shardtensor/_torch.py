# mypy: disable-error-code="attr-defined, union-attr, assignment, misc"
"""Every use of a private torch API (checked on torch 2.11 and 2.13)."""

from __future__ import annotations

import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import _SingleLevelFunction
from torch.profiler import ProfilerActivity, profile
from torch.utils import _python_dispatch

make_wrapper = torch.Tensor._make_wrapper_subclass
no_torch_function = torch._C.DisableTorchFunctionSubclass
handle_torch_function_names = (
    "has_torch_function",
    "has_torch_function_unary",
    "has_torch_function_variadic",
)

# torch 2.13 renamed all_gather_into_tensor
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_outer = threading.local()


@contextmanager
def composite_call() -> Iterator[None]:
    """Around a call of a C++ composite on wrappers: its leaf ops reach `__torch_dispatch__`.

    Sets the state of the dispatcher out here, and modes that trace, aside for `leaf_call`.
    """
    before = getattr(_outer, "state", None)
    with ExitStack() as stack:
        modes: list[Any] = []
        if is_tracing():
            modes = stack.enter_context(_python_dispatch._disable_current_modes())
        keys = (
            torch._C._dispatch_tls_local_include_set(),
            torch._C._dispatch_tls_local_exclude_set(),
        )
        _outer.state = (keys, modes)
        stack.enter_context(no_torch_function())
        try:
            yield
        finally:
            _outer.state = before


@contextmanager
def leaf_call() -> Iterator[None]:
    """Around the local program of a leaf op: autograd, autocast, tracing as at the outer call."""
    state = getattr(_outer, "state", None)
    if state is None:
        yield
        return
    keys, modes = state
    with torch._C._ForceDispatchKeyGuard(*keys), torch._C._EnableTorchFunction():
        for mode in reversed(modes):
            _python_dispatch._push_mode(mode)
        try:
            yield
        finally:
            for mode in modes:
                _python_dispatch._pop_mode(getattr(mode, "_dispatch_key", None))


def c_grad_fn(x: torch.Tensor) -> Any:
    """The autograd node that C++ sees on a wrapper."""
    with no_torch_function():
        return torch._C.TensorBase.grad_fn.__get__(x)


def install_function_hook(around: Callable[[Callable[..., Any], tuple[Any, ...]], Any]) -> None:
    """Route `autograd.Function.apply` of every Function through around(apply, args).

    `Function.apply` looks `super().apply` up at each call, so this also reaches an `apply` that was
    stored before the library was imported.
    """

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        call = super(_SingleLevelFunction, cls).apply
        return around(call, args) if not kwargs else call(*args, **kwargs)

    _SingleLevelFunction.apply = classmethod(apply)


def install_engine_hook(
    roots: Callable[[Any, Any], tuple[Any, Any]], unwrap: Callable[[Any], Any]
) -> None:
    """Map what `torch.autograd.backward` hands to the engine: roots(outputs, grads) and inputs."""
    engine = torch.autograd._engine_run_backward

    def run(outputs: Any, grads: Any = (), *args: Any, **kwargs: Any) -> Any:
        if len(args) >= 3 and args[2]:
            args = (*args[:2], tuple(unwrap(x) for x in args[2]), *args[3:])
        return engine(*roots(outputs, grads), *args, **kwargs)

    torch.autograd._engine_run_backward = run


def install_ddp_hook(unwrap: Callable[[Any], Any]) -> None:
    """Let DDP look for unused parameters in the graphs of local tensors."""
    import torch.nn.parallel.distributed as ddp

    find = ddp._find_tensors
    ddp._find_tensors = lambda found: [unwrap(x) for x in find(found)]


def aten_packet(name: str) -> Any:
    """The aten op of this name, or None."""
    return getattr(torch.ops.aten, name, None) if not name.startswith("__") else None


def overloads(packet: Any) -> list[Any]:
    """All overloads of an op packet."""
    return [getattr(packet, o) for o in packet.overloads()]


def is_random(packet: Any) -> bool:
    """Whether the op draws from a random generator."""
    return any(torch.Tag.nondeterministic_seeded in o.tags for o in overloads(packet))


def is_pointwise(packet: Any) -> bool:
    """Whether every form of the op works element by element, with broadcasting."""
    # max and min of two tensors do; of one they reduce
    name = packet._qualified_op_name.split("::")[-1]
    return name not in ("max", "min") and any(
        torch.Tag.pointwise in o.tags for o in overloads(packet)
    )


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


@contextmanager
def threaded_world(join: Callable[[str, int, int, Any, Any], Any]) -> Iterator[None]:
    """torch.distributed with one world per thread, whose groups rendezvous through `join`.

    join(group name, group size, rank, collective, data) must run collective.work(list of every
    rank's data) once and then return on every rank.
    """
    from torch.testing._internal.distributed import multi_threaded_pg as threaded

    numbers = itertools.count()

    class Collective:
        def __init__(self, size: int, collective: Any, pg: Any) -> None:
            self.size, self.collective, self.key = size, collective, next(numbers)

        def join(self, rank: int, data: Any) -> Any:
            join(str(self.key), self.size, rank, self.collective, data)
            return threaded.ret_work(data)

    kept = threaded.Collective
    threaded.Collective = Collective
    # the stock creator blocks in a store until all ranks come; here ranks run one at a time
    dist.Backend.register_backend(
        "threaded",
        lambda store, rank, size, timeout: threaded.ProcessLocalGroup(rank, size),
        devices=["cpu"],
    )
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    try:
        yield
    finally:
        threaded._uninstall_threaded_pg()
        threaded.ProcessLocalGroup.reset()
        threaded.Collective = kept
        torch._C._distributed_c10d._set_thread_isolation_mode(False)


def is_tracing() -> bool:
    """Whether a dispatch mode (fake tensors, make_fx) is watching the ops of this thread."""
    return torch._C._len_torch_dispatch_stack() > 0


def allocations(step: Callable[[], Any]) -> list[int]:
    """Signed bytes of every CPU allocation and release during step(), in time order."""
    prof = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _no_stderr():
        prof.start()
        try:
            step()
        finally:
            prof.stop()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Torch 2.13's profiler writes lines of its own to the process's stderr."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def has_cpu_flash(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether torch's flash attention for CPUs takes these (B, H, L, E)."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1] and 0 not in q.shape


def cpu_flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, log-sum-exp (B, H, L)); mask is additive."""
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    found = op(q, k, v, 0.0, False, attn_mask=_mask_4d(mask, q, k), scale=scale)
    return found[0], found[1]


def cpu_flash_backward(
    g: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v, for an output and a log-sum-exp that may cover more keys than k."""
    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    # the kernel lays the log-sum-exp out as (B, L, H)
    lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    mask = _mask_4d(mask, q, k)
    found = op(g, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)
    return found[0], found[1], found[2]


def _mask_4d(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    if mask is None:
        return None
    mask = mask.expand(*mask.shape[:-2], q.shape[-2], k.shape[-2])
    return mask if mask.ndim in (2, 4) else mask[(None,) * (4 - mask.ndim)]
