"""`grad_fn` of a ShardTensor: the node of its local graph, whose hooks see global gradients.

What autograd keeps are local tensors. A hook before the node gets the gradient of the ShardTensor
that the node made; what only knows local tensors (hooks after it, what it saved, nodes below) is
refused. Walking the graph works as on any node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NoReturn
from weakref import WeakValueDictionary, ref

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from .. import _torch
from ..errors import UnsupportedOpError
from ..registry import method, methods
from ..spec import Spec
from .shard_tensor import ShardTensor, wrap


class ShardNode(Node):
    """A node of a local graph.

    spec: how what it made lies, None if that is unknown. of: a ShardTensor whose local tensor
    nobody has made yet, which `stand` is called for when somebody does.
    """

    def __init__(self, spec: Spec | None, of: ShardTensor | None = None) -> None:
        self.spec, self._of = spec, of
        self._node: Any = None
        self._place, self._alive = 0, None
        self._leaf: Callable[[Tensor], ShardTensor] | None = None

    def stand(self, node: Any, place: int, alive: Any) -> None:
        """Stand for a node, for which of its results, and keep what keeps it alive."""
        self._node, self._place, self._alive, self._of = node, place, alive, None

    @property
    def node(self) -> Any:
        """The node itself."""
        # no cached_property: until Python 3.12 it locks, while this may wait for other ranks
        if self._of is not None:
            self._of._local  # noqa: B018
        return self._node

    @property
    def place(self) -> int:
        self.node  # noqa: B018
        return self._place

    def name(self) -> str:
        return str(self.node.name())

    @property
    def next_functions(self) -> tuple[tuple[Any, int], ...]:
        below: tuple[tuple[Any, int], ...] = self.node.next_functions
        if self._plain():
            return below
        return tuple((_below(node, self), place) for node, place in below)

    @property
    def metadata(self) -> dict[Any, Any]:  # type: ignore[override]
        found: dict[Any, Any] = self.node.metadata
        return found

    @property
    def _input_metadata(self) -> list[Any]:
        found = list(self.node._input_metadata)
        if self.spec is not None:
            found[self.place] = _Facts(self.spec, found[self.place])
        return found

    def _sequence_nr(self) -> int:
        return _torch.number_of(self.node)

    def register_prehook(self, fn: Callable[..., Any]) -> Any:
        """Call fn with the gradient of the tensor that the node made, as a ShardTensor."""
        spec = self.known("register_prehook")
        if len(self.node._input_metadata) > 1:
            self._refuse("register_prehook")

        # torch's errors name the hook
        @wraps(fn)
        def run(grads: Sequence[Tensor | None]) -> Any:
            new = fn(tuple(None if g is None else methods["gradient"](g, spec) for g in grads))
            if not isinstance(new, tuple):
                # None changes nothing; of anything else torch says what is wrong
                return new
            return tuple(methods["cotangent"](g, spec) if isinstance(g, Tensor) else g for g in new)

        return self.node.register_prehook(run)

    def register_hook(self, fn: Callable[..., Any]) -> Any:
        """As torch's where all below is whole; else what is passed on lies nobody knows how."""
        if not self._plain():
            self._refuse("register_hook")
        return self.node.register_hook(fn)

    def _register_hook_dict(self, tensor: Tensor) -> Any:
        if not self._plain():
            self._refuse("_register_hook_dict")
        return self.node._register_hook_dict(tensor)

    def _plain(self) -> bool:
        """Whether all tensors below are whole: no node of the library's own cuts or joins any."""
        if self.spec is None or self.spec.varying or self.spec.partial:
            return False
        waiting = [self.node]
        seen = set(waiting)
        while waiting:
            node = waiting.pop()
            if isinstance(node, BackwardCFunction):
                return False
            for other, _ in node.next_functions:
                if other is not None and other not in seen:
                    seen.add(other)
                    waiting.append(other)
        return True

    def known(self, what: str) -> Spec:
        """How what the node made lies; raises UnsupportedOpError where that is unknown."""
        self.node  # noqa: B018
        return self._refuse(what) if self.spec is None else self.spec

    def _refuse(self, what: str) -> NoReturn:
        raise UnsupportedOpError(
            f"{what} of {self.name()}, an autograd node of local tensors"
            f"{'' if self.spec is None else f' of {self.spec}'}: use tensor.register_hook, "
            "tensor.grad_fn.register_prehook or a module's register_full_backward_hook, and keep "
            "tensors that are read later"
        )

    def __getattr__(self, name: str) -> Any:
        if name == "variable":
            local = self.node.variable
            if self._leaf is None:
                # what walks a graph asks whether a node has one
                raise AttributeError("variable of a node that was not found by its leaf")
            return self._leaf(local)
        if name.startswith(("_saved_", "_raw_saved_")):
            found = getattr(self.node, name)
            return found if self._plain() else self._refuse(name)
        return getattr(self.node, name)

    def __eq__(self, other: object) -> bool:
        return bool(self.node == (other.node if isinstance(other, ShardNode) else other))

    def __hash__(self) -> int:
        return hash(self.node)

    def __repr__(self) -> str:
        return f"<{self.name()} of {self.spec}>"


class _Facts:
    """What a node knows of a result, with the global shape."""

    def __init__(self, spec: Spec, local: Any) -> None:
        self.shape, self._facts = list(spec.shape), local

    def __getattr__(self, name: str) -> Any:
        return getattr(self._facts, name)


# the nodes that somebody holds: a node is one object, as torch's are
_held: WeakValueDictionary[tuple[int, int, Spec | None], ShardNode] = WeakValueDictionary()


def _stands(node: Any, place: int, spec: Spec | None, alive: Any) -> ShardNode:
    """Ours of a node."""
    found = _held.get((id(node), place, spec))
    if found is None:
        found = _held[id(node), place, spec] = ShardNode(spec)
        found.stand(node, place, alive)
    return found


def _below(node: Any, above: ShardNode) -> Any:
    """A node further down: its tensors are local, but for parameters, which are whole."""
    if node is None or isinstance(getattr(node, "variable", None), nn.Parameter):
        return node
    # only the graph keeps a node of Python alive
    return _stands(node, 0, None, above if isinstance(node, BackwardCFunction) else None)


@method
def node_of(x: ShardTensor) -> Any:
    """The node that made x, None of a leaf."""
    own = _torch.c_grad_fn(x)
    if own is not None:
        return own
    local = x._local
    if local.grad_fn is None:
        return None
    node, place, alive = get_gradient_edge(local)
    return _stands(node, place, _told(x), alive)


@method
def named(x: ShardTensor) -> Callable[[Tensor], ShardTensor]:
    """What gives, for the local tensor of x, x itself; another object if that is gone."""
    known, spec = ref(x), x._spec

    def of(local: Tensor) -> ShardTensor:
        found = known()
        return wrap(local, spec) if found is None else found

    return of


def stand_for(x: ShardTensor, node: ShardNode) -> None:
    """Let a node stand for what made x, now that its local tensor is there."""
    found, place, alive = get_gradient_edge(x._local)
    node.spec = _told(x)
    node.stand(found, place, alive)
    _held.setdefault((id(found), place, node.spec), node)


def _told(x: ShardTensor) -> Spec | None:
    """How a gradient of x lies; None where gradients go past it."""
    return None if x._bypassed else x._spec


def accumulator(x: Tensor) -> Any:
    """The node that accumulates the gradient of a leaf."""
    if not isinstance(x, ShardTensor):
        return _torch.accumulator(x)
    found = _stands(_torch.accumulator(x._local), 0, x._spec, None)
    found._leaf = named(x)
    return found


def raw(x: Any) -> Any:
    """The node of C++ behind one of ours."""
    return x.node if isinstance(x, ShardNode) else x


def spec_of(x: Any) -> Spec | None:
    """The spec of a ShardTensor, or of what an edge into its graph stands for; None: plain."""
    if isinstance(x, ShardTensor):
        return x._spec
    if not (isinstance(x, GradientEdge) and isinstance(x.node, ShardNode)):
        return None
    spec = x.node.known("a GradientEdge")
    return spec if x.output_nr == x.node.place else x.node._refuse("another result")


def edge_of(x: Any) -> Any:
    """What the engine takes for a GradientEdge; anything else as it is."""
    if isinstance(x, GradientEdge) and isinstance(x.node, ShardNode):
        spec_of(x)
        return x._replace(node=x.node.node)
    return x
