# mypy: disable-error-code="attr-defined, union-attr"
"""Private torch APIs of who looks on: fake tensors, graphs, profilers."""

from __future__ import annotations

import logging
import os
import sys
import threading
import types
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.fx._symbolic_trace import _create_wrapped_func
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ..later import flop_counter, symbolic
from .dispatcher import fake_mode_here, not_tracing
from .world import silent_world

_aten = torch.ops.aten
# set while modes look on above autograd
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
# what a graph calls to record gradients or not
SET_GRAD = torch._C._set_grad_enabled
_key_included = torch._C._dispatch_tls_is_dispatch_key_included
# attention's kernels on CPUs, of which torch counts none, and those that compute as much
_COUNTED_AS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        _aten._scaled_dot_product_flash_attention_backward
    ),
}


def flops_of(op: Any) -> Any:
    """What counts the operations of a product, a convolution or attention; None for other ops."""
    return flop_counter.flop_registry.get(_COUNTED_AS.get(op, op))


@contextmanager
def fake_world(rank: int, ranks: int, mode: Any) -> Iterator[None]:
    """One rank of many on fake tensors, whose ops the mode counts; they run as if nobody looked."""
    quiet = _told_once()
    world = silent_world(rank, ranks)
    with quiet, world, mode.fake, mode, not_tracing(), _copied_deeply(), as_written():
        yield


@contextmanager
def _told_once() -> Iterator[None]:
    """Inside, what an op without memory raises in this thread is raised, but not logged as well."""
    thread, log = threading.get_ident(), logging.getLogger("torch._subclasses.fake_tensor")

    def other(record: logging.LogRecord) -> bool:
        return record.thread != thread

    log.addFilter(other)
    try:
        yield
    finally:
        log.removeFilter(other)


@contextmanager
def as_written() -> Iterator[None]:
    """Inside, what torch.compile made runs eagerly: Dynamo would compile who looks on, too."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def _copied_deeply() -> Iterator[None]:
    """Inside, copy.deepcopy makes fake tensors, of fake and of real ones, without memory.

    Under this thread's fake mode: other threads copy as before.
    """
    stock, mode = torch.Tensor.__deepcopy__, fake_mode_here()

    def deepcopy(self: torch.Tensor, memo: dict[int, Any]) -> torch.Tensor:
        if not self.is_leaf or id(self) in memo or fake_mode_here() is not mode:
            return stock(self, memo)
        new = self.detach().clone(memory_format=torch.preserve_format)
        if isinstance(self, torch.nn.Parameter):
            new = torch.nn.Parameter(new, self.requires_grad)
        memo[id(self)] = new.requires_grad_(self.requires_grad)
        return new

    setattr(torch.Tensor, "__deepcopy__", deepcopy)  # noqa: B010
    try:
        yield
    finally:
        setattr(torch.Tensor, "__deepcopy__", stock)  # noqa: B010


def fake_mode() -> Any:
    """Inside, tensors that are made have no memory, and real ones may meet them."""
    return FakeTensorMode(allow_non_fake_inputs=True)


class Watching(TorchDispatchMode):
    """A mode that torch.compile may look into: keeping it out takes as long as an op's look-up."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Fakes:
    """Makes fake tensors of a mode of which the form is known, without asking the mode."""

    def __init__(self, mode: Any) -> None:
        self.mode = mode
        self.facts: dict[torch.device, dict[str, Any]] = {}

    def make(
        self,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        offset: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        of: torch.Tensor | None,
    ) -> torch.Tensor:
        """A new one, or a view of another's memory."""
        facts = self.facts.get(device)
        with torch._C._DisableTorchDispatch():
            if of is None:
                x = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            else:
                x = torch.empty(0, dtype=dtype, device="meta")
                x.set_(of.untyped_storage(), offset, shape, stride)
            if facts is None:
                found = FakeTensor(self.mode, x, device)
                self.facts[device] = dict(vars(found))
                return found
            found = torch.Tensor._make_subclass(
                FakeTensor, x, False, dispatch_device=True, device_for_backend_keys=device
            )
            torch._C._set_throw_on_mutable_data_ptr(found)
        vars(found).update(facts)
        return found

    @staticmethod
    def apart(x: torch.Tensor) -> torch.Tensor:
        """The same form and memory on the device "meta", which kernels know without a mode."""
        with torch._C._DisableTorchDispatch():
            found = torch.empty(0, dtype=x.dtype, device="meta")
            return found.set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())

    @staticmethod
    def moved(x: torch.Tensor, *args: Any) -> torch.Tensor:
        """x with other memory, as set_ gives it of a storage, an offset, a shape and strides."""
        with torch._C._DisableTorchDispatch():
            return x.set_(*args)

    @staticmethod
    def asked(func: Any, args: Any, kwargs: Any) -> Any:
        """What an op gives of tensors on "meta", nobody looking on."""
        with torch._C._DisableTorchDispatch():
            return func(*args, **kwargs)


# whose memory has a name, by which tensors lie beside each other
LIES = torch.Tensor, FakeTensor
# reads a fake tensor's device
DEVICE = torch.ops.prim.device.default
# what torch.tensor makes of numbers
LIFTED = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)
outside_fake = unset_fake_temporarily


def depends_on_values() -> tuple[type[Exception], ...]:
    """What reading a fake tensor's values raises."""
    return (
        DataDependentOutputException,
        DynamicOutputShapeException,
        symbolic.GuardOnDataDependentSymNode,
    )


def global_hooks() -> list[Any]:
    """The tables of hooks that run for all modules."""
    from torch.nn.modules import module

    return [v for k, v in vars(module).items() if k.startswith("_global_") and isinstance(v, dict)]


def is_recording() -> bool:
    """Whether make_fx makes a graph of ops as they are called, above autograd, in this thread."""
    mode = get_proxy_mode()
    return mode is not None and bool(mode.pre_dispatch)


def is_proxied() -> bool:
    """Whether make_fx makes a graph of what this thread calls, above autograd or below."""
    if not (torch._C._len_torch_dispatch_stack() or _key_included(_PRE_DISPATCH)):
        return False
    return get_proxy_mode() is not None


def is_fake(x: torch.Tensor) -> bool:
    """Whether a tensor has no memory."""
    return isinstance(x, FakeTensor)


def allocations(step: Callable[[], Any]) -> list[int]:
    """Signed bytes of every CPU allocation and release during step(), in time order."""
    with allocating() as found:
        step()
    return [nbytes for _, nbytes in found]


@contextmanager
def allocating() -> Iterator[list[tuple[float, int]]]:
    """When it is left, the list has (time.time(), signed bytes) of CPU allocations in it."""
    prof = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    found: list[tuple[float, int]] = []
    with _no_stderr():
        prof.start()
        try:
            yield found
        finally:
            prof.stop()
    moves = _moves(prof.profiler.kineto_results.experimental_event_tree())
    # by nanoseconds: as seconds, moves that follow each other closely would fall together
    found += [(1e-9 * ns, nbytes) for ns, nbytes in _released(sorted(moves, key=lambda m: m[0]))]


def _moves(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """(nanoseconds, address, signed bytes) of what is allocated and released in events."""
    for e in events:
        if e.name == "[memory]":
            yield e.start_time_ns, e.extra_fields.ptr, e.extra_fields.alloc_size
        yield from _moves(e.children)


def _released(moves: Iterable[tuple[int, int, int]]) -> Iterator[tuple[int, int]]:
    """(nanoseconds, signed bytes) with releases that the profiler does not see.

    It does not follow the threads of gloo, which may be the last to hold a message. What lay where
    a tensor is made has gone.
    """
    starts: list[int] = []
    sizes: dict[int, int] = {}
    for ns, at, nbytes in moves:
        if nbytes > 0:
            first, end = bisect_right(starts, at), bisect_left(starts, at + nbytes)
            if first and starts[first - 1] + sizes[starts[first - 1]] > at:
                first -= 1
            for gone in starts[first:end]:
                yield ns, -sizes.pop(gone)
            starts[first:end] = [at]
            sizes[at] = nbytes
        elif sizes.pop(at, None) is not None:
            del starts[bisect_left(starts, at)]
        yield ns, nbytes


def sequence_nr() -> int:
    """The number that the next node of autograd gets in this thread."""
    return torch._C._autograd._get_sequence_nr()


def backward_nr() -> int | None:
    """The number of the node whose backward is running in this thread."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


profiling = torch._C._autograd._profiler_enabled
# how many modes see the ops of this thread
dispatch_modes = torch._C._len_torch_dispatch_stack


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


# of what torch.fx puts in the place of functions that `torch.fx.wrap` was told of, while it traces
_IN_PLACE = _create_wrapped_func(lambda: None).__code__


def in_its_place(x: Any) -> Any:
    """What x is where no graph is traced."""
    if type(x) is types.FunctionType and x.__code__ is _IN_PLACE:
        return x.__wrapped__
    return x
