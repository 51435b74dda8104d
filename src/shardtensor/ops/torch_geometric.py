"""PyTorch Geometric's sparse matrices of sharded edges: plain ones, whole on every rank.

They take effect when the program imports it; nothing here does. Products of adjacencies (GraphUNet)
and what torch makes of sparse matrices need all entries.
"""

from __future__ import annotations

from typing import Any

from ..dispatch.fallback import into_plain
from ..dispatch.rule import rule

_SPARSE = "torch_geometric.utils.sparse.to_torch_"


@rule(*(f"{_SPARSE}{form}_tensor" for form in ("coo", "csr", "csc")))
def sparse_matrix(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Gathers the edges, with the warning and within the limit of an op without a rule."""
    return into_plain(function.__wrapped__, args, kwargs)


sparse_matrix.takes_function = True  # type: ignore[attr-defined]
