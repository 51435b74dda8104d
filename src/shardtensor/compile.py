"""Compile the local program: trace what the rules do on local tensors, then torch.compile it.

Dynamo cannot see through the wrapper. So the program is traced here, before autograd, over
the flattened local tensors: a graph of plain ops and collectives, without ShardTensors, that
`torch.compile` takes like any other, forward and backward.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from . import attention

log = logging.getLogger(__name__)
# what a graph is for
_PARTS = (
    "specs", "tensors", "parameters", "arguments", "gradients", "training", "autocast",
    "attention strategy",
)  # fmt: skip

# Shard sizes differ from rank to rank; an order of collectives that depends on them would hang
_SAME_ORDER = {"reorder_for_peak_memory": False, "reorder_for_locality": False}


def compile(fn: Callable[..., Any], **options: Any) -> Compiled:
    """fn (a module or a function of tensors) with its local program compiled by torch.compile.

    options: those of torch.compile (backend, mode, ...). Traced once for each combination of specs,
    shapes, dtypes, grad mode and train/eval. A module's parameters and buffers are inputs of the
    graph, so they may change; tensors that a function closes over are read anew at each call, but
    must keep their shapes. Random ops raise UnsupportedOpError.

    At most `Compiled.most` graphs are kept, those used last. The logger "shardtensor.compile" says
    at level INFO what each graph is for and how that differs from the graph before it; at WARNING,
    once, that graphs are dropped.
    """
    return Compiled(fn, options)


class Compiled:
    """What `compile` returns. `traces` counts the graphs made so far."""

    most = 32

    def __init__(
        self,
        fn: Callable[..., Any],
        options: dict[str, Any],
        call: Callable[..., Any] | None = None,
    ) -> None:
        # call: how fn is called, where fn itself calls this
        self.fn, self.call = fn, call or fn
        self.options = dict(options)
        if self.options.get("backend", "inductor") == "inductor" and "mode" not in self.options:
            self.options["options"] = {**_SAME_ORDER, **self.options.get("options", {})}
        self.traced: OrderedDict[Any, tuple[Callable[..., Any], pytree.TreeSpec]] = OrderedDict()
        self.traces = 0
        self.last: dict[str, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        state = _state(self.fn)
        key = (
            tuple(_specs((args, kwargs))), _key(leaves), _key(list(state.values())), str(tree),
            *_modes(self.fn),
        )  # fmt: skip
        found = self.traced.get(key)
        if found is None:
            self._note(key)
            found = self.traced[key] = self._trace(leaves, tree, state)
            self.traces += 1
        self.traced.move_to_end(key)
        run, out_tree = found
        flat = run(*state.values(), *(x for x in leaves if isinstance(x, Tensor)))
        return pytree.tree_unflatten(flat, out_tree)

    def _note(self, key: tuple[Any, ...]) -> None:
        """Log what a new graph is for; drop the one that was not used for longest, if too many."""
        now = dict(zip(_PARTS, key, strict=True))
        changed = [
            f"{k}: {self.last[k]} -> {v}" for k, v in now.items() if self.last.get(k, v) != v
        ]
        what = "; ".join(changed) or f"specs: {now['specs']}"
        log.info("graph %d of %s: %s", self.traces + 1, _name(self.fn), what)
        self.last = now
        if len(self.traced) < self.most:
            return
        if self.traces == self.most:
            log.warning(
                "%s has more than %d graphs: those not used for long are dropped and will be "
                "compiled again. The newest differs in %s",
                _name(self.fn), self.most, what,
            )  # fmt: skip
        self.traced.popitem(last=False)

    def _trace(
        self, leaves: list[Any], tree: pytree.TreeSpec, state: dict[str, Tensor]
    ) -> tuple[Callable[..., Any], pytree.TreeSpec]:
        out_tree: list[pytree.TreeSpec] = []

        def local(*tensors: Tensor) -> list[Any]:
            inside = iter(tensors)
            own = {name: next(inside) for name in state}
            args, kwargs = pytree.tree_unflatten(
                [next(inside) if isinstance(x, Tensor) else x for x in leaves], tree
            )
            with _using(self.fn, own):
                out = self.call(*args, **kwargs)
            flat, spec = pytree.tree_flatten(out)
            out_tree.append(spec)
            return flat

        tensors = [*state.values(), *(x for x in leaves if isinstance(x, Tensor))]
        graph = make_fx(local, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(
            *tensors
        )
        # questions about dtypes are traced too, and Dynamo does not take them
        graph.graph.eliminate_dead_code()
        graph.recompile()
        return torch.compile(graph, **self.options), out_tree[0]


def _name(fn: Any) -> str:
    return type(fn).__name__ if isinstance(fn, nn.Module) else getattr(fn, "__name__", str(fn))


def _state(fn: Any) -> dict[str, Tensor]:
    if not isinstance(fn, nn.Module):
        return {}
    return {**dict(fn.named_parameters()), **dict(fn.named_buffers())}


def _using(fn: Any, own: dict[str, Tensor]) -> Any:
    return torch.nn.utils.stateless._reparametrize_module(fn, own) if own else nullcontext()


def _specs(tree: Any) -> list[Any]:
    from .tensor import ShardTensor

    leaves = pytree.tree_leaves(tree, is_leaf=lambda x: isinstance(x, ShardTensor))
    return [x._spec if isinstance(x, ShardTensor) else None for x in leaves]


def _key(leaves: list[Any]) -> tuple[Any, ...]:
    return tuple(
        (x.shape, x.stride(), x.dtype, x.device, x.requires_grad) if isinstance(x, Tensor) else x
        for x in leaves
    )


def _modes(fn: Any) -> tuple[Any, ...]:
    training = tuple(m.training for m in fn.modules()) if isinstance(fn, nn.Module) else ()
    casts = tuple(
        (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")
    )
    return torch.is_grad_enabled(), training, casts, attention.chosen()
