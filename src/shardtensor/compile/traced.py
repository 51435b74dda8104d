"""One call traced: what the rules do on local tensors as a graph, and what it reads and changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from .. import _torch
from .._torch import probe
from ..dispatch.writes import check_readable
from ..errors import UnsupportedOpError
from ..settings import setting
from ..spec import Spec
from ..tensor import ShardTensor
from ..tensor.tape import Tape
from . import nested, varied, writes
from .draws import Draw, hoist
from .guards import Reads, recording
from .inputs import Call, replaced, seen, using
from .refused import NoHooks, NoWrites, check_whole, without_what_no_graph_holds
from .varied import Varied
from .writes import Before

# what a call gives, as it is put together of local tensors
Out = tuple[pytree.TreeSpec, list[tuple[Spec, Any] | None]]


@dataclass
class Graph:
    """A compiled program, and as it is without; what it reads, returns and draws.

    twins: the parameters whose gradients are summed later, by name. varied: inputs whose gradients
    are summed over ranks; written: that it writes to; before: of which it takes copies. specs: of
    all that its functions took.
    """

    run: Callable[..., Any]
    whole: Callable[..., Any]
    reads: Reads
    out: Out
    draws: list[Draw]
    twins: list[str]
    varied: list[Varied]
    written: list[int]
    before: list[Before]
    specs: list[Spec]


def graph_of(
    fn: Callable[..., Any],
    run: Callable[..., Any],
    call: Call,
    modules: list[nn.Module],
    compiled: Callable[[torch.fx.GraphModule], Callable[..., Any]],
) -> tuple[Graph, str]:
    """The graph of a call, and what of the state that it reads it changed.

    run: how fn is called, modules: those of fn, compiled: what runs a graph.
    """
    nested.check_scripted(modules)
    state, local = call.own, _Local(fn, run, call, modules)
    tensors = [*state.tensors, *state.doubles(), *call.tensors]
    # what is traced sets the mode; an error would leave it so
    grad = torch.is_grad_enabled()
    trace = make_fx(local.run, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)
    try:
        # a checkpoint that runs the call again finds its graph
        with without_what_no_graph_holds(), _torch.saving_here():
            graph = trace(*tensors)
    except probe.depends_on_values() as e:
        raise UnsupportedOpError(
            f"Python in {name_of(fn)} needs the value of a tensor (int, item, if), which a "
            "compiled program cannot hold: keep it as a Python number, use torch.where, or "
            "leave it out of st.compile"
        ) from e
    finally:
        torch.set_grad_enabled(grad)
        local.tape.close()
    check_whole(graph)
    places = (n for n in graph.graph.nodes if n.op == "placeholder")
    graded = {n for n, x in zip(places, tensors, strict=True) if grad and x.requires_grad}
    draws = hoist(graph, local.tape)
    twins = state.used(graph, writes.written(graph.graph.nodes))
    further = varied.hoist(graph)
    written, before = writes.hoist(graph, graded)
    # Dynamo takes neither names for the profiler nor questions about dtypes, traced too
    for node in reversed(graph.graph.nodes):
        if getattr(node.target, "namespace", "") == "profiler":
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    assert local.reads is not None and local.out is not None
    return Graph(
        compiled(graph), graph.forward, local.reads, local.out, draws, twins, further, written,
        before, [*local.hooks.specs],
    ), local.changed  # fmt: skip


class _Local:
    """A call on local tensors alone: its `run` is traced, and notes specs and state."""

    reads: Reads | None = None
    out: Out | None = None
    changed = ""

    def __init__(
        self,
        fn: Callable[..., Any],
        call: Callable[..., Any],
        given: Call,
        modules: list[nn.Module],
    ) -> None:
        self.fn, self.call, self.given = fn, call, given
        self.inputs = frozenset(map(id, modules))
        self.tape, self.hooks = Tape(), NoHooks()

    def run(self, *tensors: Tensor) -> list[Any]:
        own, given = self.given.own.inside(iter(tensors), self.given.leaves, self.given.again)
        kept = [x._local if isinstance(x, ShardTensor) else x for x in given]
        args, kwargs = pytree.tree_unflatten(given, self.given.tree)
        out, reads = self._called(own, args, kwargs)
        if any(
            isinstance(x, ShardTensor) and x._local is not k
            for x, k in zip(given, kept, strict=True)
        ):
            raise UnsupportedOpError(
                f"{name_of(self.fn)} gives an argument other data or another spec in place, "
                "which a compiled program cannot: return a new tensor"
            )
        reads.close()
        flat, spec = nested.flat(out)
        nested.check_results(flat)
        # where a write to a view would have to be written back
        check_readable((*own.values(), *given, *flat), {})
        self.reads, self.out = reads, (spec, [seen(x) for x in flat])
        return [x._local if isinstance(x, ShardTensor) else x for x in flat]

    def _called(self, own: Any, args: Any, kwargs: Any) -> tuple[Any, Reads]:
        """What the call gives, and what it read; state that it changed is as before."""
        with (
            using(self.fn, own),
            recording(self.inputs, self.tape, lambda: (self.fn, args, kwargs)) as reads,
            setting("tape", self.tape),
            self.hooks,
            NoWrites(self.tape),
        ):
            try:
                out = self.call(*args, **kwargs)
                self.tape.check()
            except BaseException:
                # what was done so far will be done again
                reads.restore()
                raise
            self.changed = reads.changed() or replaced(self.fn, own)
            if self.changed:
                reads.restore()
        return out, reads


def name_of(fn: Any) -> str:
    """What messages call it."""
    return type(fn).__name__ if isinstance(fn, nn.Module) else getattr(fn, "__name__", str(fn))
