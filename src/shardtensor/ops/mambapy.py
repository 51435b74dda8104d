"""mambapy's parallel scan on a sharded sequence: channels are dealt out instead while it runs.

It takes effect when the program imports mambapy; nothing here does. The scan writes strided rows of
a sequence into others of it, which would move in each of its steps; channels have scans of their
own. One all-to-all for each operand, one for the result.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..dispatch.rule import rule
from ..rules.operands import cut_axes, lifted
from ..spec import Dim
from ..tensor.redistribute import to_dims

SEQUENCE = 1
# channels, states, samples: what a scan goes through side by side
BESIDE = (2, 3, 0)


@rule("mambapy.pscan.pscan")
def pscan(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The states (B, L, D, N) of gates and inputs of that shape, sharded as the inputs."""
    return _scanned(function.__wrapped__, *args, **kwargs)


pscan.takes_function = True  # type: ignore[attr-defined]


def _scanned(original: Any, A_in: Tensor, X_in: Tensor) -> Any:
    gates, inputs = (lifted(x, A_in, X_in) for x in (A_in, X_in))
    if gates.shape != inputs.shape or inputs.ndim != 4:
        return original(A_in, X_in)
    dims = inputs._spec.dims if inputs._spec.varying else gates._spec.dims
    if not any(cut_axes(x._spec.dims[SEQUENCE]) for x in (gates, inputs)):
        return original(A_in, X_in)
    axes, inside = dims[SEQUENCE].axes, list(dims)
    inside[SEQUENCE] = dims[SEQUENCE].whole
    free = [d for d in BESIDE if not dims[d].axes]
    if axes and free:
        to = max(free, key=lambda d: dims[d].size)
        inside[to] = Dim.chunked(dims[to].size, axes, inputs._spec.mesh)
    states = original(to_dims(gates, inside), to_dims(inputs, inside))
    return to_dims(states, dims)
