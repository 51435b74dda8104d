# mypy: disable-error-code="attr-defined, union-attr, assignment, misc"
"""Every use of a private torch API (checked on torch 2.11 and 2.13)."""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._functorch import eager_transforms, vmap
from torch._library.custom_ops import CustomOpDef
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
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
# the dispatcher's state above autograd, outside of autocast
_KEYS = (
    torch._C._dispatch_tls_local_include_set(),
    torch._C._dispatch_tls_local_exclude_set(),
)


@contextmanager
def composite_call() -> Iterator[None]:
    """Around a call of a C++ composite on wrappers: its leaf ops reach `__torch_dispatch__`.

    Sets the state of the dispatcher out here, and modes that trace, aside for `leaf_call`.
    """
    before = getattr(_outer, "state", None)
    with ExitStack() as stack:
        modes: list[Any] = []
        if torch._C._len_torch_dispatch_stack() > 0:
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
    """Around the local program of a leaf op: autograd, autocast, tracing as at the outer call.

    Where C++ came here by itself it has done its autograd on the wrapper, which has none.
    """
    keys, modes = getattr(_outer, "state", None) or (_KEYS, ())
    with torch._C._ForceDispatchKeyGuard(*keys), torch._C._EnableTorchFunction():
        for mode in reversed(modes):
            _python_dispatch._push_mode(mode)
        try:
            yield
        finally:
            for mode in modes:
                _python_dispatch._pop_mode(getattr(mode, "_dispatch_key", None))


# no fake tensors and no graph inside
outside_modes = _python_dispatch._disable_current_modes


def c_grad_fn(x: torch.Tensor) -> Any:
    """The autograd node that C++ sees on a wrapper."""
    with no_torch_function():
        return torch._C.TensorBase.grad_fn.__get__(x)


def saving_elsewhere() -> bool:
    """Whether what autograd saves goes through hooks (a checkpoint, saving on the CPU)."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


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
    world = threaded._install_threaded_pg()
    if not hasattr(world, "comms"):
        # torch 2.11 asks for it, but its threaded world lacks it
        world.comms = []
    try:
        yield
    finally:
        threaded._uninstall_threaded_pg()
        threaded.ProcessLocalGroup.reset()
        threaded.Collective = kept
        torch._C._distributed_c10d._set_thread_isolation_mode(False)


def default_store() -> Any:
    """The key-value store by which the ranks of this program met."""
    return dist.distributed_c10d._get_default_store()


def at_uncaught(call: Callable[[BaseException], None]) -> None:
    """Run call(error) when an exception is about to end the program, before it is printed."""
    before = sys.excepthook

    def hook(kind: Any, error: BaseException, at: Any) -> None:
        # an interactive session goes on
        if not hasattr(sys, "ps1"):
            call(error)
        before(kind, error, at)

    sys.excepthook = hook


def checkpointed(module: torch.nn.Module) -> None:
    """Keep only the module's inputs for backward; its class and its state_dict stay."""
    from torch.distributed._composable import checkpoint

    checkpoint(module)


def hide_from_dynamo(fn: Callable[..., Any]) -> None:
    """Let Dynamo run fn, and all that it calls, as they are."""
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(fn.__code__, frames._FrameExecStrategy(skip, skip))


def tell_dynamo(warn: Callable[..., None], why: str) -> None:
    """In a frame that Dynamo traces: call warn at that time, and break the graph, saying why."""
    torch._dynamo.comptime.comptime(warn)
    torch._dynamo.graph_break(msg=why)


def storage_ref(x: torch.Tensor) -> Any:
    """A weak reference to the memory of x: `cdata` names it, `expired()` tells when it is gone."""
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(x.untyped_storage())


def is_tracing() -> bool:
    """Whether a dispatch mode (fake tensors, make_fx) is recording the ops of this thread."""
    return torch._C._len_torch_dispatch_stack() > 0 and not getattr(_outer, "counting", False)


@contextmanager
def not_tracing() -> Iterator[None]:
    """Modes of this thread only count: ops run as if nobody looked."""
    _outer.counting = True
    try:
        yield
    finally:
        _outer.counting = False


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


def asks_for_overrides(function: Any) -> bool:
    """Whether a Python function looks for `__torch_function__` of its arguments."""
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    return any(n in names for n in handle_torch_function_names)


def owns_memory(x: torch.Tensor) -> bool:
    """Whether no view, numpy array or other library shares the memory of a tensor."""
    storage = x.untyped_storage()
    return storage.resizable() and torch._C._storage_Use_Count(storage._cdata) <= _uses_alone()


@functools.cache
def _uses_alone() -> int:
    storage = torch.zeros(1).untyped_storage()
    # the tensor is gone: one less than when it holds the storage
    return torch._C._storage_Use_Count(storage._cdata) + 1


# which torch.func transform surrounds the call, or None
functorch_level = torch._C._functorch.maybe_current_level


def guard_transforms(check: Callable[[Any], None]) -> None:
    """Let check(tensor) see what enters torch.func.grad, jvp and dual tensors past overrides."""

    def checked(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            check(tensor)
            return function(tensor, *args, **kwargs)

        return run

    eager_transforms._wrap_for_grad = checked(eager_transforms._wrap_for_grad)
    vmap._add_batch_dim = checked(vmap._add_batch_dim)
    forward_ad.make_dual = checked(forward_ad.make_dual)


def apply(function: Any, *args: Any) -> Any:
    """As apply of one of the library's own Functions of plain tensors, in half the time."""
    return super(_SingleLevelFunction, function).apply(*args)


def graph_task() -> int:
    """The number of the backward pass that runs in this thread, -1 if none does."""
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    """Whether a backward runs in this thread."""
    return graph_task() != -1


def will_run(node: Any) -> bool:
    """Whether the backward pass that runs has a node of a graph to run, or has run it."""
    return torch._C._will_engine_execute_node(node)


def run_last(node: Any) -> None:
    """Let backward run a node when nothing else is left to do."""
    node._set_sequence_nr(0)


def first_hook(leaf: torch.Tensor, hook: Callable[[torch.Tensor], Any]) -> Any:
    """A hook on a leaf's gradient before all others, those of earlier and of later; its handle."""
    wanted = leaf.requires_grad
    handle = leaf.requires_grad_().register_hook(hook)
    leaf.requires_grad_(wanted)
    # C++ calls them in the order in which they came into the dict
    hooks: Any = leaf._backward_hooks
    for key in [k for k in hooks if k != handle.id]:
        hooks[key] = hooks.pop(key)
    return handle


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same numbers in memory."""
    return (
        a.untyped_storage()._cdata == b.untyped_storage()._cdata
        and a.dtype is b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.storage_offset() == b.storage_offset()
    )


class AttentionKernel(NamedTuple):
    """A fused attention kernel of q (B, H, L, E), k and v (B, G, S, E), H a multiple of G.

    forward(q, k, v, bias, causal, scale) gives (out, lse). backward(g, q, k, v, bias, out, lse,
    causal, scale) gives (dq, dk, dv) and takes an lse over more keys than k's.
    """

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def attention_kernel(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, causal: bool
) -> AttentionKernel | None:
    """The kernel that takes a block of attention, None if none does."""
    cuda = torch.backends.cuda
    if q.device.type == "cpu":
        return _FLASH_CPU if cuda.flash_sdp_enabled() else None
    if q.device.type != "cuda" or torch.version.hip or mask is not None or q.shape[-1] % 8:
        return None
    same = q.shape[1] // k.shape[1]
    params = cuda.SDPAParams(q, _heads(k, same), _heads(v, same), None, 0.0, causal, False)
    if cuda.can_use_flash_attention(params):
        return _FLASH_CUDA
    return _EFFICIENT_CUDA if cuda.can_use_efficient_attention(params) else None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor with rows that lie in one piece, as the kernels ask."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: torch.Tensor, times: int) -> torch.Tensor:
    return x if times == 1 else x.repeat_interleave(times, 1)


def _summed_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    return x if times == 1 else x.unflatten(1, (-1, times)).sum(2)


def _flash_cpu(q: Any, k: Any, v: Any, bias: Any, causal: bool, scale: float) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        _rows(q), _rows(k), _rows(v), 0.0, causal, attn_mask=bias, scale=scale
    )


def _flash_cpu_backward(
    g: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, lse: Any, causal: bool, scale: float
) -> Any:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        _rows(g), _rows(q), _rows(k), _rows(v), _rows(out), lse, 0.0, causal, attn_mask=bias,
        scale=scale,
    )  # fmt: skip


def _flash_cuda(q: Any, k: Any, v: Any, bias: Any, causal: bool, scale: float) -> Any:
    same = q.shape[1] // k.shape[1]
    return torch.ops.aten._scaled_dot_product_flash_attention(
        _rows(q), _rows(_heads(k, same)), _rows(_heads(v, same)), 0.0, causal, False, scale=scale
    )[:2]


def _flash_cuda_backward(
    g: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, lse: Any, causal: bool, scale: float
) -> Any:
    same = q.shape[1] // k.shape[1]
    # without dropout the kernel does not read its random state
    state, unused = (torch.empty(n, dtype=torch.uint64, device=q.device) for n in ([2], []))
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        g.contiguous(), _rows(q), _rows(_heads(k, same)), _rows(_heads(v, same)), out, 
        lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, state, unused,
        scale=scale,
    )  # fmt: skip
    return dq, _summed_heads(dk, same), _summed_heads(dv, same)


def _efficient_cuda(q: Any, k: Any, v: Any, bias: Any, causal: bool, scale: float) -> Any:
    same = q.shape[1] // k.shape[1]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        _rows(q), _rows(_heads(k, same)), _rows(_heads(v, same)), None, True, 0.0, causal,
        scale=scale,
    )  # fmt: skip
    # the kernel pads the rows of lse to a multiple of 32
    return out, lse[:, :, : q.shape[2]]


def _efficient_cuda_backward(
    g: Any, q: Any, k: Any, v: Any, bias: Any, out: Any, lse: Any, causal: bool, scale: float
) -> Any:
    same = q.shape[1] // k.shape[1]
    padded = torch.nn.functional.pad(lse, (0, -q.shape[2] % 32), value=float("inf"))
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        g.contiguous(), _rows(q), _rows(_heads(k, same)), _rows(_heads(v, same)), None, out,
        padded.contiguous(), state, state, 0.0, [True, True, True, False], causal, scale=scale,
    )  # fmt: skip
    return dq, _summed_heads(dk, same), _summed_heads(dv, same)


_FLASH_CPU = AttentionKernel(_flash_cpu, _flash_cpu_backward)
# the kernels for CUDA are written from the signatures of torch 2.11 to 2.13
_FLASH_CUDA = AttentionKernel(_flash_cuda, _flash_cuda_backward)
_EFFICIENT_CUDA = AttentionKernel(_efficient_cuda, _efficient_cuda_backward)
