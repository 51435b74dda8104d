"""RNN, GRU and LSTM over shards of the batch; each sequence lies whole on one rank.

A sharded time or feature dim moves to the batch by one all-to-all. Nothing else is sent, but for
the gradients of the weights: one all-reduce for each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch.fallback import fall_back
from ..spec import Dim, Spec
from ..tensor import ShardTensor, wrap
from ..tensor.redistribute import aside, fit, like, reduced
from .empty import with_one
from .pointwise import function_rule


@function_rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """f(input, hx, weights, has_biases, layers, dropout, train, bidirectional, batch_first)."""
    names = ["input", "hx", "params", "has_biases", "num_layers", "dropout", "train"]
    names += ["bidirectional", "batch_first"]
    if "batch_sizes" in kwargs or (len(args) > 3 and isinstance(args[3], list | tuple)):
        # packed sequences: rows of one tensor belong to many sequences
        return fall_back(func, args, kwargs)
    given = dict(zip(names, args, strict=False)) | kwargs
    x, hx, weights = given["input"], given["hx"], list(given["params"])
    states = list(hx) if isinstance(hx, list | tuple) else [hx]
    mesh = next(s._spec.mesh for s in (x, *states, *weights) if isinstance(s, ShardTensor))
    batch = 0 if given["batch_first"] else 1
    x = reduced(like(x, Spec(mesh, tuple(Dim(n) for n in x.shape)))) if _plain(x) else reduced(x)
    y = aside(x, [1 - batch, 2])
    if y is None:
        return fall_back(func, args, kwargs)
    cut = next(
        (s._spec.dims[1] for s in states if not _plain(s) and s._spec.dims[1].axes),
        Dim(x.shape[batch]),
    )
    if not y._spec.dims[batch].axes:
        y = like(
            y, y._spec.with_dims([cut if d == batch else n for d, n in enumerate(y._spec.dims)])
        )
    cut = y._spec.dims[batch]
    wanted = [(s, (Dim(s.shape[0]), cut, Dim(s.shape[2]))) for s in states]
    operands = fit(mesh, cut.axes, (y, y._spec.dims), *wanted, *((w, None) for w in weights))
    local, *rest = (o for o in operands if o is not None)
    states, weights = rest[: len(states)], rest[len(states) :]
    # torch refuses an empty batch
    local = with_one(local, [batch], 0.0)
    states = [with_one(s, [1], 0.0) for s in states]
    settings = (given["has_biases"], given["bidirectional"], given["batch_first"])
    drops = bool(given["train"] and given["dropout"] and given["num_layers"] > 1)
    if drops:
        spec = y._spec.with_dims([*y._spec.dims[:2], Dim(0)])
        out, last = _by_layer(func, local, states, weights, given, settings, spec)
    else:
        out, *last = func(local, _states(func, states), weights, settings[0], given["num_layers"],
                          0.0, given["train"], *settings[1:])  # fmt: skip
    n = y._spec.local_shape[batch]
    spec = y._spec.with_dims([*y._spec.dims[:2], Dim(out.shape[2])])
    ends = [y._spec.with_dims([Dim(s.shape[0]), cut, Dim(s.shape[2])]) for s in last]
    return wrap(out.narrow(batch, 0, n), spec), *(
        wrap(s.narrow(1, 0, n), e) for s, e in zip(last, ends, strict=True)
    )


def _plain(x: Tensor) -> bool:
    return not isinstance(x, ShardTensor)


def _states(func: Any, states: list[Tensor]) -> Any:
    return states if func.__name__ == "lstm" else states[0]


def _by_layer(
    func: Any, local: Tensor, states: list[Tensor], weights: list[Tensor], given: dict[str, Any],
    settings: tuple[bool, bool, bool], spec: Spec,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Layer after layer, with this library's dropout between: independent from shard to shard."""
    layers, ways = given["num_layers"], 1 + settings[1]
    each = len(weights) // layers
    last: list[list[Tensor]] = [[] for _ in states]
    batch = 0 if settings[2] else 1
    for i in range(layers):
        if i:
            n = spec.local_shape[batch]
            wide = spec.with_dims([*spec.dims[:2], Dim(local.shape[2])])
            kept = torch.dropout(wrap(local.narrow(batch, 0, n), wide), given["dropout"], True)
            local = with_one(like(kept, wide)._local, [batch], 0.0)
        own = [s.narrow(0, i * ways, ways) for s in states]
        mine = weights[i * each : (i + 1) * each]
        local, *ends = func(local, _states(func, own), mine, settings[0], 1, 0.0, given["train"],
                            *settings[1:])  # fmt: skip
        for kept_states, end in zip(last, ends, strict=True):
            kept_states.append(end)
    return local, [torch.cat(s) for s in last]


@function_rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """f(input, hx, w_ih, w_hh, b_ih, b_hh): one step."""
    x, hx, *weights = args
    states = list(hx) if isinstance(hx, list | tuple) else [hx]
    first = next((s for s in (x, *states) if not _plain(s)), None)
    if first is None:
        return fall_back(func, args, kwargs)
    y = aside(reduced(first), [1])
    if y is None:
        return fall_back(func, args, kwargs)
    cut = y._spec.dims[0]
    wanted = [(s, (cut, Dim(s.shape[1]))) for s in (x, *states)]
    local, *rest = fit(y._spec.mesh, cut.axes, *wanted, *((w, None) for w in weights))
    states = rest[: len(states)]
    given = states if func.__name__ == "lstm_cell" else states[0]
    out = func(local, given, *rest[len(states) :], **kwargs)
    if isinstance(out, Tensor):
        return wrap(out, y._spec.with_dims([cut, Dim(out.shape[1])]))
    return tuple(wrap(o, y._spec.with_dims([cut, Dim(o.shape[1])])) for o in out)
