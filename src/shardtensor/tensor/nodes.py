"""`grad_fn` of a ShardTensor: the node of its local graph, whose hooks see global gradients.

What autograd keeps are local tensors. A hook before the node gets the gradient of the ShardTensor
that the node made; what only knows local tensors (hooks after it, what it saved, nodes below) is
refused. Walking the graph works as on any node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from .. import _torch
from ..errors import UnsupportedOpError
from ..registry import method, methods
from ..spec import Spec
from .shard_tensor import ShardTensor


class ShardNode(Node):
    """A node of a local graph.

    of: the local tensor that it made, which keeps a graph of Python's nodes alive, or the node; or
    a ShardTensor whose local tensor nobody has made yet. spec: how what it made lies, None if that
    is unknown. place: which of its results that is.
    """

    def __init__(self, of: Any, spec: Spec | None, place: int = 0) -> None:
        self._of, self.spec, self._place = of, spec, place
        self._node: Any = None
        if isinstance(of, ShardTensor):
            self._kind = type(of)
        else:
            # a write in place gives the tensor another node
            self._node = of.grad_fn if isinstance(of, Tensor) else of
            self._place = of.output_nr if isinstance(of, Tensor) else place

    @property
    def node(self) -> Any:
        """The node itself."""
        # no cached_property: until Python 3.12 it locks, while this may wait for other ranks
        if self._node is not None:
            return self._node
        if type(self._of) is not self._kind:
            raise UnsupportedOpError(
                f"grad_fn of a tensor of {self.spec} that was read since, and may have been "
                "written to: take grad_fn anew"
            )
        self._node = self._of._local.grad_fn
        return self._node

    @property
    def place(self) -> int:
        self.node  # noqa: B018
        return self._of.output_nr if isinstance(self._of, ShardTensor) else self._place

    def name(self) -> str:
        return str(self.node.name())

    @property
    def next_functions(self) -> tuple[tuple[Any, int], ...]:
        return tuple((_below(node), place) for node, place in self.node.next_functions)

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

        def run(grads: Sequence[Tensor | None]) -> Any:
            new = fn(tuple(None if g is None else methods["gradient"](g, spec) for g in grads))
            if new is None:
                return None
            found = (new,) if isinstance(new, Tensor) else tuple(new)
            return tuple(None if g is None else methods["cotangent"](g, spec) for g in found)

        return self.node.register_prehook(run)

    def register_hook(self, fn: Callable[..., Any]) -> NoReturn:
        """Refused: what the node passes on are gradients of local tensors of unknown specs."""
        self._refuse("register_hook")

    def _register_hook_dict(self, tensor: Tensor) -> NoReturn:
        self._refuse("_register_hook_dict")

    def known(self, what: str) -> Spec:
        """How what the node made lies; raises UnsupportedOpError where that is unknown."""
        return self._refuse(what) if self.spec is None else self.spec

    def _refuse(self, what: str) -> NoReturn:
        raise UnsupportedOpError(
            f"{what} of {self.name()}, an autograd node of local tensors"
            f"{'' if self.spec is None else f' of {self.spec}'}: use tensor.register_hook, "
            "tensor.grad_fn.register_prehook or a module's register_full_backward_hook, and keep "
            "tensors that are read later"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("_saved_", "_raw_saved_")):
            getattr(self.node, name)
            self._refuse(name)
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
        self.shape, self._facts = spec.shape, local

    def __getattr__(self, name: str) -> Any:
        return getattr(self._facts, name)


def _below(node: Any) -> Any:
    """A node further down: its tensors are local, but for parameters, which are whole."""
    if node is None or isinstance(getattr(node, "variable", None), nn.Parameter):
        return node
    return ShardNode(node, None, 0)


@method
def node_of(x: ShardTensor) -> Any:
    """The node that made x, None of a leaf."""
    own = _torch.c_grad_fn(x)
    if own is not None:
        return own
    local = x._local
    if local.grad_fn is None or not (x._spec.varying or x._spec.partial):
        return local.grad_fn
    return ShardNode(local, x._spec)


def accumulator(x: Tensor) -> Any:
    """The node that accumulates the gradient of a leaf."""
    node = _torch.accumulator(x._local if isinstance(x, ShardTensor) else x)
    return ShardNode(node, x._spec, 0) if isinstance(x, ShardTensor) else node


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
        return x._replace(node=x.node.node)
    return x
