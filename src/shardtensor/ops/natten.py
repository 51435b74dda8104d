"""Models that call NATTEN run on ShardTensors unmodified: rules for natten.functional.

They take effect when the program imports NATTEN; nothing here does. The windows are the same, see
`shardtensor.neighborhood_attention`. On CUDA devices NATTEN itself computes, with the backend and
the tile shapes that the call asks for; where a rank's problem cannot be said in its terms, and on
other devices, torch does.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch

from ..attention import neighborhood
from ..dispatch.rule import rule
from ..errors import UnsupportedOpError
from ..rules.attention.neighborhood import run
from ..tensor import ShardTensor

MEANT = ("kernel_size", "stride", "dilation", "is_causal", "scale")
# what only a call that sees all keys could have, in several versions
REFUSED = ("rpb", "additional_keys", "additional_values", "return_lse")


@rule(
    "natten.functional.na1d",
    "natten.functional.na2d",
    "natten.functional.na3d",
    "natten.functional.neighborhood_attention_generic",
)
def attention(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ShardTensor:
    original = function.__wrapped__
    # versions have their arguments in different orders
    given = inspect.signature(original).bind(*args, **kwargs).arguments
    query, key, value = (given.pop(name) for name in ("query", "key", "value"))
    for name in REFUSED:
        if isinstance(given.get(name), torch.Tensor) or given.pop(name, None):
            raise UnsupportedOpError(
                f"{original.__name__} of ShardTensors with {name}: leave it out, or redistribute "
                "query, key and value to Replicate and pass their local tensors"
            )
    kernel, stride, dilation, causal, scale = (given.pop(name, None) for name in MEANT)
    lines = neighborhood.windows(query, key, value, kernel, stride or 1, dilation or 1, causal)
    on_it = query.device.type in neighborhood.NATTEN_DEVICES
    return run(query, key, value, lines, scale, partial(original, **given) if on_it else None)


attention.takes_function = True  # type: ignore[attr-defined]
