"""RNN, GRU and LSTM over shards of the batch; each sequence lies whole on one rank.

A sharded time or feature dim moves to the batch by one all-to-all; where the batch is sharded
already, or is one sequence, it is gathered. Nothing else is sent, but for the gradients of the
weights: one all-reduce for each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...dispatch.fallback import fall_back
from ...spec import Dim, Spec
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import fit, like
from .. import labels
from ..empty import with_one
from ..operands import lifted
from ..pointwise import function_rule
from .packed import packed


@function_rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """f(input, hx, weights, has_biases, layers, dropout, train, bidirectional, batch_first)."""
    names = ["input", "hx", "params", "has_biases", "num_layers", "dropout", "train"]
    names += ["bidirectional", "batch_first"]
    if "batch_sizes" in kwargs or (len(args) > 3 and isinstance(args[3], list | tuple)):
        return packed(func, args, kwargs)
    given = dict(zip(names, args, strict=False)) | kwargs
    x, hx, weights = given["input"], given["hx"], list(given["params"])
    states = list(hx) if isinstance(hx, list | tuple) else [hx]
    x = lifted(x, *states, *weights)
    batch = 0 if given["batch_first"] else 1
    lead = ("n", "T") if batch == 0 else ("T", "n")
    # the state of an LSTM may be narrower than its cells
    ends = [("L", "n", f"H{i}") for i in range(len(states))]
    terms = ((*lead, "F"), *ends, (*lead, "O"), *ends)
    p = labels.plan(terms, x, *states, order=tuple(range(1 + len(states))))
    local, *rest = fit(
        p.mesh, p.varying,
        *zip((x, *states), p.wanted, strict=True), *((w, None) for w in weights),
    )  # fmt: skip
    states, weights = rest[: len(states)], rest[len(states) :]
    n = p.spec(("n",)).local_shape[0]
    # torch refuses an empty batch
    local = with_one(local, [batch], 0.0)
    states = [with_one(s, [1], 0.0) for s in states]
    settings = (given["has_biases"], given["bidirectional"], given["batch_first"])
    drops = bool(given["train"] and given["dropout"] and given["num_layers"] > 1)
    if drops:
        spec = p.spec((*lead, "O"), (0, 0, 0))
        out, last = _by_layer(func, local, states, weights, given, settings, spec)
    else:
        out, *last = func(local, _states(func, states), weights, settings[0], given["num_layers"],
                          0.0, given["train"], *settings[1:])  # fmt: skip
    return p.result(out.narrow(batch, 0, n)), *(
        p.result(s.narrow(1, 0, n), 1 + i) for i, s in enumerate(last)
    )


def _states(func: Any, states: list[Tensor]) -> Any:
    return states if func.__name__.startswith("lstm") else states[0]


def _by_layer(
    func: Any,
    local: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    given: dict[str, Any],
    settings: tuple[bool, bool, bool],
    spec: Spec,
) -> tuple[Tensor, list[Tensor]]:
    """Layer after layer, with this library's dropout between: independent from shard to shard."""
    layers, ways = given["num_layers"], 1 + settings[1]
    each = len(weights) // layers
    last: list[list[Tensor]] = [[] for _ in states]
    batch = 0 if settings[2] else 1
    for i in range(layers):
        if i:
            n = spec.local_shape[batch]
            wide = spec.replace({2: Dim(local.shape[2])})
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
    if not any(isinstance(s, ShardTensor) for s in (x, *states)):
        return fall_back(func, args, kwargs)
    ends = [("n", f"H{i}") for i in range(len(states))]
    p = labels.plan((("n", "F"), *ends, *ends), x, *states)
    local, *rest = fit(
        p.mesh, p.varying,
        *zip((x, *states), p.wanted, strict=True), *((w, None) for w in weights),
    )  # fmt: skip
    out = func(local, _states(func, rest[: len(states)]), *rest[len(states) :], **kwargs)
    if isinstance(out, Tensor):
        return p.result(out)
    return tuple(p.result(o, i) for i, o in enumerate(out))
