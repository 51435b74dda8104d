# mypy: disable-error-code="attr-defined, union-attr, assignment, misc"
"""Private torch APIs of the dispatcher: wrappers, modes, what Dynamo and torch.func see."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.utils import _python_dispatch, checkpoint
from torch.utils._device import DeviceContext

from .. import cache
from ..later import when_loaded

# what runs between user and us under torch.set_default_device
DEVICE_CONTEXT = DeviceContext.__torch_function__.__code__

make_wrapper = torch.Tensor._make_wrapper_subclass

no_torch_function = torch._C.DisableTorchFunctionSubclass
# for modes, too
no_torch_function_at_all = torch._C.DisableTorchFunction

_outer = threading.local()

# the dispatcher's state above autograd, outside of autocast
_KEYS = (
    torch._C._dispatch_tls_local_include_set(),
    torch._C._dispatch_tls_local_exclude_set(),
)
_LEVELS = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode).add(
    torch._C.DispatchKey.FuncTorchDynamicLayerBackMode
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
        # levels of torch.func are inside of local tensors: the leaf ops go through them
        stack.enter_context(torch._C._ExcludeDispatchKeyGuard(_LEVELS))
        try:
            yield
        finally:
            _outer.state = before


def inside_composite() -> bool:
    """Whether a C++ composite is under way, by whose leaf ops this thread came here."""
    return getattr(_outer, "state", None) is not None


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


def hide_from_dynamo(fn: Callable[..., Any]) -> None:
    """Let Dynamo run fn, and all that it calls, as they are."""
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(fn.__code__, frames._FrameExecStrategy(skip, skip))


def leave_alone(modules: Iterable[str]) -> None:
    """Let Dynamo run functions of these modules as they are, where it meets them: they communicate.

    Not those that stand around torch's own functions, which it looks through.
    """

    def skip(rules: Any) -> None:
        for name in modules:
            rules.add(name)

    when_loaded("torch._dynamo.trace_rules", skip)


def tell_dynamo(warn: Callable[..., None], why: str) -> None:
    """In a frame that Dynamo traces: call warn at that time, and break the graph, saying why."""
    torch._dynamo.comptime.comptime(warn)
    torch._dynamo.graph_break(msg=why)


def is_tracing() -> bool:
    """Whether a dispatch mode (fake tensors, make_fx) is recording the ops of this thread."""
    return torch._C._len_torch_dispatch_stack() > 0 and not getattr(_outer, "counting", False)


def under_modes() -> bool:
    """Whether a dispatch mode sees the ops of this thread: what they make may be fake."""
    return torch._C._len_torch_dispatch_stack() > 0


def fake_mode_here() -> Any:
    """The fake mode of this thread, or of whose backward it runs; None where there is none."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


_SELECTING = checkpoint._CachingTorchDispatchMode, checkpoint._CachedTorchDispatchMode


def unrecorded() -> AbstractContextManager[Any]:
    """Around what is made once and then kept, where selective checkpoints look on, and nobody else.

    They know ops by their number. What the repetition finds made would shift those after it, which
    would be given the results of others.
    """
    if not under_modes():
        return nullcontext()
    modes = _python_dispatch._get_current_dispatch_mode_stack()
    return outside_modes() if all(isinstance(m, _SELECTING) for m in modes) else nullcontext()


cache.making = unrecorded


@contextmanager
def not_tracing() -> Iterator[None]:
    """Modes of this thread only count: ops run as if nobody looked."""
    _outer.counting = True
    try:
        yield
    finally:
        _outer.counting = False


def keep_apart(op: Any) -> None:
    """Let compilers take no two calls of an op for one, as they do where all arguments are equal.

    Of a collective they may be equal on one rank, where it has nothing to give, and not on another.
    They keep two calls of what draws random numbers apart.
    """

    def enter(compiler: Any) -> None:
        compiler.rand_ops = [*compiler.rand_ops, op.overloadpacket]

    when_loaded("torch._functorch.compile_utils", enter)
