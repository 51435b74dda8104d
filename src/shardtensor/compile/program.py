"""Compile the local program: trace what the rules do on local tensors, then torch.compile it.

Dynamo cannot see through the wrapper. So the program is traced here, before autograd, over
the flattened local tensors: a graph of plain ops and collectives, without ShardTensors, that
`torch.compile` takes like any other, forward and backward. A graph holds for the Python state that
was read while it was traced (see `guards`).
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar, overload

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..cache import register
from ..caller import described, error_line
from ..comm import observers
from ..errors import UnsupportedOpError
from ..tensor import wrap
from ..tensor.apart import note
from . import nested, varied, writes
from .blocks import Programs, blocks_of
from .inputs import Call, Own, further, key_of, modes_of, parted, parts_of
from .members import Members
from .traced import Graph, graph_of, name_of

M = TypeVar("M", bound=nn.Module)
log = logging.getLogger(__name__)
# what a graph is for
_PARTS = (
    "specs", "tensors", "repeated", "parameters", "arguments", "gradients", "training", "autocast",
    "contexts",
)  # fmt: skip

# Shard sizes differ from rank to rank; an order of collectives that depends on them would hang
_SAME_ORDER = {"reorder_for_peak_memory": False, "reorder_for_locality": False}
# states of Python for which graphs of otherwise equal calls are made
_STATES = 8
_STATE = (
    "runs eagerly where Python state that it reads {}: keep such state in buffers, or out of what "
    "is compiled"
)
_NONE = "runs eagerly where no graph holds it: {}"
# traces in which the program changes the state: a cache is filled by the first
_TRIES = 2


class _Found:
    """What the first of simulated ranks found changed by each trace.

    What it put into a global of the process, such as a cache, the others would not find changed.
    """

    def __init__(self) -> None:
        self.of_first: dict[int, str] = {}
        register(self)

    def cache_clear(self) -> None:
        self.of_first.clear()

    def by_all(self, mine: str) -> str:
        if observers.simulated_rank() is None:
            return mine
        number = observers.thread.__dict__.get("traces", 0)
        observers.thread.traces = number + 1
        found = self.of_first.setdefault(number, mine)
        return mine or found


_found = _Found()


@overload
def compile(fn: Callable[..., Any], *, blocks: None = None, **options: Any) -> Compiled: ...
@overload
def compile(fn: M, *, blocks: Iterable[str], **options: Any) -> M: ...
def compile(
    fn: Callable[..., Any], *, blocks: Iterable[str] | None = None, **options: Any
) -> Callable[..., Any]:
    """fn (a module or a function of tensors) with its local program compiled by torch.compile.

    options: those of torch.compile (backend, mode, ...). Traced once for each combination of specs,
    shapes, dtypes, grad mode, train/eval and Python state that fn reads: attributes, hooks,
    globals, closures. A module's parameters and buffers are inputs of the graph, so they may
    change; tensors that a function closes over are read anew at each call. Random numbers are those
    of the eager call: they are drawn before the program runs, and are inputs of it. A call that
    changes Python state (a counter in forward) runs eagerly, with a warning; so does one that no
    graph can hold: Python or random ops that need the values of tensors, seeds, hooks on tensors,
    gradients through an autograd.Function; the warning names the line. With fullgraph=True both
    raise UnsupportedOpError, the first once a second call changes it again. The program sends what
    the eager call does.

    blocks: class names of modules of fn; without names, (), the elements of every outermost
    nn.ModuleList. Then only these are compiled, each by itself and in place, and fn is returned:
    equal blocks share one compiled program, so that compiling costs what one block does, and hooks
    around a block (FSDP2, checkpoints) work as ever. Raises ValueError where there are none.

    At most `Compiled.most` graphs are kept, those used last. The logger "shardtensor.compile" says
    at level INFO what each graph is for and how that differs from the graph before it; at WARNING,
    once, that graphs are dropped.
    """
    if blocks is None:
        return Compiled(fn, options)
    if not isinstance(fn, nn.Module):
        raise ValueError(f"blocks of {name_of(fn)}, which is no module: leave them out")
    found = blocks_of(fn, tuple(blocks))
    if not found:
        raise ValueError(
            "blocks=(): the model has no nn.ModuleList; name the classes of the blocks"
        )
    compile_forward(found, options)
    return fn


def compile_forward(modules: Iterable[nn.Module], options: dict[str, Any]) -> None:
    """Let forward of each of these modules run compiled from now on, inside of their hooks."""
    programs = Programs()
    for module in dict.fromkeys(modules):
        call = module.__dict__.get("forward", type(module).forward.__get__(module))
        if isinstance(call, Compiled):
            call = call.call
        module.__dict__["forward"] = Compiled(module, options, call, programs)


class Compiled:
    """What `compile` returns. `traces` counts the graphs made so far."""

    fn: Callable[..., Any]
    call: Callable[..., Any]
    options: dict[str, Any]
    programs: Programs
    members: Members
    traced: OrderedDict[Any, list[Graph]]
    traces: int

    most: ClassVar[int] = 32

    def __init__(
        self,
        fn: Callable[..., Any],
        options: dict[str, Any],
        call: Callable[..., Any] | None = None,
        programs: Programs | None = None,
    ) -> None:
        # call: how fn is called, where fn itself calls this
        self.fn, self.call = fn, call or fn
        self.members = Members(fn)
        self.programs = Programs() if programs is None else programs
        self.options = dict(options)
        if self.options.get("backend", "inductor") == "inductor" and "mode" not in self.options:
            self.options["options"] = {**_SAME_ORDER, **self.options.get("options", {})}
        self.traced = OrderedDict()
        self.traces = 0
        self.last: dict[str, Any] = {}
        # calls that changed the state that they read
        self.changing: Counter[Any] = Counter()

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiled:
        fn, call = copy.deepcopy(self.fn, memo), copy.deepcopy(self.call, memo)
        return Compiled(fn, self.options, call, self.programs)

    def __reduce__(self) -> Any:
        # a model that is saved whole is not compiled where it is loaded
        return copy.copy, (self.call,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = nested.flat((args, kwargs))
        self.members.find()
        try:
            parts = parts_of(self.members.tensors, leaves)
        except UnsupportedOpError as e:
            if self.options.get("fullgraph"):
                raise
            self._warn(_NONE.format(e))
            return self.call(*args, **kwargs)
        own = Own(self.members, parts)
        specs, given = zip(*map(parted, leaves), strict=True) if leaves else ((), ())
        tensors, again = further(given, own.places)
        modes = modes_of(self.members)
        key = (specs, key_of(given), again, own.key(), str(tree), *modes)
        found = self.traced.get(key, ())
        graph = next((g for g in found if g.reads.hold()), None)
        if graph is None:
            why = self._eager(key, found)
            call = Call(leaves, tree, own, tensors, again, modes)
            graph = None if why else self._make(key, call)
            if graph is None:
                return self.call(*args, **kwargs)
        self.traced.move_to_end(key)
        drawn = [draw() for draw in graph.draws]
        try:
            inputs = [*own.tensors, *own.twins(graph.twins), *tensors, *drawn]
            copies = writes.values(graph.before, inputs)
            run = graph.whole if writes.overlap(inputs, graph.written) else graph.run
            flat = run(*inputs, *varied.values(graph.varied, inputs), *copies)
        except (RuntimeError, IndexError) as e:
            note(e, self.fn, graph.specs, {})
            raise
        form, kinds = graph.out
        flat = [x if s is None else wrap(x, *s) for x, s in zip(flat, kinds, strict=True)]
        return pytree.tree_unflatten(flat, form)

    def _eager(self, key: Any, found: Any) -> bool:
        """Whether a call that no graph is for runs eagerly."""
        if len(found) == _STATES:
            self._told(_STATE.format(f"changes from call to call ({found[-1].reads.changed()})"))
            return True
        return self.changing[key] >= _TRIES and not self.options.get("fullgraph")

    def _told(self, why: str, level: int = 4) -> None:
        """Warn that calls run eagerly; raise where that is not wanted."""
        if self.options.get("fullgraph"):
            raise UnsupportedOpError(f"{name_of(self.fn)} {why}")
        self._warn(why, level + 1)

    def _warn(self, why: str, level: int = 4) -> None:
        warnings.warn(f"{name_of(self.fn)} {why}", stacklevel=level)

    def _make(self, key: tuple[Any, ...], call: Call) -> Graph | None:
        """A graph for a call, None if it changes what it reads, or does what no graph holds."""
        self._note(key)
        try:
            graph, changed = graph_of(
                self.fn, self.call, call, self.members.modules, self._programs(call)
            )
        except UnsupportedOpError as e:
            line = error_line(e.__cause__ or e)
            text = f"{e} ({line})" if line and line not in str(e) else str(e)
            if self.options.get("fullgraph"):
                raise UnsupportedOpError(text) from e
            self.changing[key] = _TRIES
            self._warn(_NONE.format(text))
            return None
        except Exception as e:
            # the caller's own: the eager call raises it, and does before what it does
            if self.options.get("fullgraph"):
                raise
            self._tried(key, _NONE.format(described(e)))
            return None
        changed = _found.by_all(changed)
        if changed:
            self._tried(key, _STATE.format(f"is changed by it ({changed})"))
            return None
        self.traced.setdefault(key, []).append(graph)
        self.traces += 1
        return graph

    def _programs(self, call: Call) -> Callable[[torch.fx.GraphModule], Callable[..., Any]]:
        """What runs a graph of the call."""
        # whether modules train is part of the graph already
        modes = (call.modes[0], *call.modes[2:])
        return lambda graph: self.programs.of(graph, modes, self.options)

    def _tried(self, key: Any, why: str) -> None:
        """Note that a call was traced in vain; warn where none like it will be again."""
        self.changing[key] += 1
        log.info("a call of %s %s", name_of(self.fn), why)
        if self.changing[key] >= _TRIES:
            self._told(why, 5)

    def _note(self, key: tuple[Any, ...]) -> None:
        """Log what a new graph is for; drop those that were not used for longest, if too many."""
        now = dict(zip(_PARTS, key, strict=True))
        changed = [
            f"{k}: {self.last[k]} -> {v}" for k, v in now.items() if self.last.get(k, v) != v
        ]
        changed += [g.reads.changed() for g in self.traced.get(key, ())[-1:]]
        what = "; ".join(changed) or f"specs: {now['specs']}"
        log.info("graph %d of %s: %s", self.traces + 1, name_of(self.fn), what)
        self.last = now
        if sum(map(len, self.traced.values())) < self.most:
            return
        if self.traces == self.most:
            log.warning(
                "%s has more than %d graphs: those not used for long are dropped and will be "
                "compiled again. The newest differs in %s",
                name_of(self.fn), self.most, what,
            )  # fmt: skip
        self.traced.popitem(last=False)
