# mypy: disable-error-code="attr-defined, union-attr, assignment, misc"
"""Private torch APIs of autograd: nodes, hooks, the engine."""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch
from torch.autograd import set_multithreading_enabled
from torch.autograd.function import FunctionMeta, _SingleLevelFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import _composable_state

from .dispatcher import hide_from_dynamo, no_torch_function, outside_modes
from .memory import is_zero, storage


def c_grad_fn(x: torch.Tensor) -> Any:
    """The autograd node that C++ sees on a wrapper."""
    with no_torch_function():
        return torch._C.TensorBase.grad_fn.__get__(x)


def saving_elsewhere() -> bool:
    """Whether what autograd saves goes through hooks (a checkpoint, saving on the CPU)."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def saving_here() -> AbstractContextManager[Any]:
    """Inside, what autograd saves stays as it is, and a checkpoint outside does not count it."""
    return saved_tensors_hooks(_same, _same) if saving_elsewhere() else nullcontext()


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def install_function_hook(around: Callable[[Callable[..., Any], tuple[Any, ...]], Any]) -> None:
    """Route `autograd.Function.apply` of every Function through around(apply, args).

    Up to torch 2.13 `Function.apply` looks `super().apply` up at each call, so this also reaches an
    `apply` that was stored before the library was imported. Since 2.14 it is C++'s own.
    """

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        call = super(_SingleLevelFunction, cls).apply
        return around(call, args) if not kwargs else call(*args, **kwargs)

    def whole(cls: type, *args: Any, **kwargs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super(_SingleLevelFunction, cls).apply(*args, **kwargs)
        return apply(cls, *args, **kwargs)

    _SingleLevelFunction.apply = classmethod(apply)
    if not isinstance(vars(torch.autograd.Function)["apply"], classmethod):
        torch.autograd.Function.apply = classmethod(whole)


def install_engine_hook(
    roots: Callable[[Any, Any, bool, Any], tuple[Any, Any]],
    unwrap: Callable[[Any], Any],
    found: Callable[[Any, Any], Any],
    around: Callable[[Any], AbstractContextManager[Any]],
    under_way: list[FrameType],
) -> None:
    """Map what goes to the engine and comes from it; it runs in around(outputs) under anomalies.

    roots(outputs, grads, whether leaves accumulate, inputs), unwrap(an input), found(inputs, their
    gradients).
    under_way has a frame below each call that the engine is at.
    """
    engine = torch.autograd._engine_run_backward

    def run(outputs: Any, grads: Any = (), *args: Any, **kwargs: Any) -> Any:
        inputs = args[2] if len(args) >= 3 else ()
        if inputs:
            args = (*args[:2], tuple(unwrap(x) for x in inputs), *args[3:])
        accumulate = kwargs.get("accumulate_grad", False)
        given = roots(outputs, grads, accumulate, inputs)
        create_graph, anomalies = len(args) >= 2 and args[1], torch.is_anomaly_enabled()
        under_way.append(sys._getframe())
        try:
            if anomalies or (create_graph and torch.distributed.is_initialized()):
                # Nodes that are ready run in the order in which they were made, as each thread
                # counts. Those of two threads would run in another where a shard takes other nodes
                looking = around(outputs) if anomalies else nullcontext()
                with looking, set_multithreading_enabled(False):
                    out = engine(*given, *args, **kwargs)
            else:
                out = engine(*given, *args, **kwargs)
        finally:
            under_way.remove(sys._getframe())
        return found(inputs, out) if inputs and not accumulate else out

    # as torch.autograd, which Dynamo leaves alone
    hide_from_dynamo(run)
    torch.autograd._engine_run_backward = run


def install_node_hooks(
    ours: Callable[[Any], bool], accumulator: Callable[[Any], Any], raw: Callable[[Any], Any]
) -> None:
    """Let torch.autograd.graph know nodes of our tensors: accumulator(a leaf), raw(a node)."""
    find = torch.autograd.graph._get_grad_fn_or_grad_acc
    will, count = torch._C._will_engine_execute_node, torch._C._increment_version

    def node(t: Any) -> Any:
        return accumulator(t) if ours(t) and t.requires_grad and t.is_leaf else find(t)

    def increment(tensors: Any) -> None:
        count(tuple([x._local if ours(x) else x for x in tensors]))

    torch.autograd.graph._get_grad_fn_or_grad_acc = node
    torch._C._will_engine_execute_node = lambda x: will(raw(x))
    torch._C._increment_version = increment


def accumulator(leaf: torch.Tensor) -> Any:
    """The node that accumulates a leaf's gradient."""
    with torch.enable_grad():
        return leaf.view_as(leaf).grad_fn.next_functions[0][0]


def install_ddp_hook(unwrap: Callable[[Any], Any]) -> None:
    """Let DDP look for unused parameters in the graphs of local tensors."""
    import torch.nn.parallel.distributed as ddp

    find = ddp._find_tensors
    ddp._find_tensors = lambda found: [unwrap(x) for x in find(found)]


def install_gradcheck_hook(is_ours: Callable[[Any], bool]) -> None:
    """Let gradcheck of our tensors leave out undefined gradients, which its node makes in C++."""
    module = sys.modules["torch.autograd.gradcheck"]
    test = module._test_undefined_backward_mode

    def run(func: Any, outputs: Any, inputs: Any) -> bool:
        return any(map(is_ours, outputs)) or bool(test(func, outputs, inputs))

    module._test_undefined_backward_mode = run


class _OwnFunction(FunctionMeta):
    def __init__(cls, name: str, bases: Any, attrs: Any) -> None:
        super().__init__(name, bases, attrs)
        cls.apply = super(_SingleLevelFunction, cls).apply
        node = cls._backward_cls
        node.apply, node.saved_tensors = cls.backward, torch._C._FunctionBase.saved_tensors


class Function(torch.autograd.Function, metaclass=_OwnFunction):
    """A Function of plain tensors: C++ calls forward and backward, with nothing of Python between.

    One that torch.func or ShardTensors come to is torch.autograd.Function.
    """


# the number of the backward pass that runs in this thread, -1 if none does
graph_task: Callable[[], int] = torch._C._current_graph_task_id


def in_backward() -> bool:
    """Whether a backward runs in this thread."""
    return graph_task() != -1


# whether the backward pass that runs has a node of a graph to run, or has run it
will_run: Callable[[Any], bool] = torch._C._will_engine_execute_node


def after_backward(call: Callable[[], None]) -> None:
    """Let the backward that runs in this thread call this when it has come to its end."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


# lets backward run a node when nothing else is left to do
run_last: Callable[[Any], None] = operator.methodcaller("_set_sequence_nr", 0)


def number_of(node: Any) -> int:
    """By what the engine orders nodes: those of higher numbers, made later, run first."""
    return int(node._sequence_nr())


def run_after(node: Any, number: int) -> None:
    """Let backward run a node when no node of a higher number is left to do."""
    node._set_sequence_nr(number)


# Whether, in this thread, a view that is made and then written to is taken anew of its base by the
# op that made it. By its strides, as is torch's default, the gradient of a view without elements
# has no graph. Values of a sparse view must be asked for as that was made (torch 2.13).
replay_views: Callable[[bool], None] = torch._C._set_view_replay_enabled
replays_views: Callable[[], bool] = torch._C._is_view_replay_enabled


def skip_numbers(n: int) -> None:
    """Give no node that this thread makes from now on one of the first n numbers."""
    for _ in range(n - torch.autograd._get_sequence_nr()):
        # a node, in a tenth of the time of one that an op makes
        torch._C._functions.DelayedError("", 1)


def has_composable_modules() -> bool:
    """Whether there is a module to which FSDP2, or another composable function, was applied."""
    return bool(_composable_state._module_state_mapping)


def first_hook(leaf: torch.Tensor, hook: Callable[[torch.Tensor], Any]) -> Any:
    """A hook on a leaf's gradient before all others; it replaces one of the same method."""
    wanted = leaf.requires_grad
    handle = leaf.requires_grad_().register_hook(hook)
    leaf.requires_grad_(wanted)
    # C++ calls them in the order in which they came into the dict
    hooks: Any = leaf._backward_hooks
    for key in [k for k in hooks if k != handle.id]:
        other = hooks.pop(key)
        if getattr(other, "__func__", None) is not getattr(hook, "__func__", hook):
            hooks[key] = other
    # `swap_tensors` keeps the dict, but C++ forgets it (torch 2.13)
    leaf._backward_hooks = hooks
    return handle


def is_only_gradient(grads: tuple[Any, ...]) -> bool:
    """Whether nobody else holds the one gradient that a `Function`'s backward got, or its memory.

    And it is all that this memory is for. Called in backward with its `*grads`; `count_gradients`
    was called before.
    """
    if type(grads[0]) is not torch.Tensor or not _fills_memory(grads[0]):
        return False
    usual = count_gradients()[grads[0]._is_view()]
    return all(map(operator.le, _holders(grads), usual))


@functools.cache
def count_gradients() -> tuple[tuple[int, ...], ...]:
    """The references to a gradient that only a Function's backward got; then if it is a view."""
    found: list[tuple[int, ...]] = []

    class Seen(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.detach()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> None:
            found.append(_holders(grads))

    with outside_modes(), torch.inference_mode(False), torch.enable_grad():
        one = torch.ones(1, 1)
        x = one.clone().requires_grad_()
        # the kernel makes it, nothing else in the graph has it
        (Seen.apply(x) * one).backward(one)
        (Seen.apply(x).t() * one).backward(one)
    return tuple(found)


def _fills_memory(x: torch.Tensor) -> bool:
    """Whether its values are what its memory holds, and all of that."""
    if x.layout is not torch.strided or is_zero(x) or x.is_neg() or x.is_conj():
        return False
    own = storage(x)
    return x.is_contiguous() and own.resizable() and own.nbytes() == x.nbytes


def _holders(grads: tuple[torch.Tensor, ...]) -> tuple[int, ...]:
    """References of Python and of C++: to the first, its memory, and what it is a view of."""
    base, own = grads[0]._base, storage(grads[0])
    of_base = () if base is None else (sys.getrefcount(base), base._use_count())
    of_memory = sys.getrefcount(own), torch._C._storage_Use_Count(own._cdata)
    return sys.getrefcount(grads[0]), grads[0]._use_count(), *of_memory, *of_base
