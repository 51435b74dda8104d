"""An error that depends on values, raised on every rank, whichever has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import _torch, comm
from ..spec import Spec


def agreed(
    run: Callable[[], Any],
    spec: Spec,
    varying: tuple[int, ...],
    error_type: type[RuntimeError] = torch.linalg.LinAlgError,
    what: str = "the matrices of {0} other ranks, the first of them number {1}, cannot be factored",
) -> Any:
    """run(), where an error of one rank is raised on all: a matrix may be singular on one only.

    The ranks tell each other in one small all-gather; not in traced graphs.
    """
    if not varying or _torch.is_tracing():
        return run()
    error, found = None, None
    try:
        found = run()
    except error_type as e:
        error = e
    like = torch.empty(0, device=spec.mesh.device_type)
    failed = comm.counts(int(error is not None), like, comm.group(spec.mesh, varying))
    if error is not None:
        raise error
    if any(failed):
        first = next(i for i, f in enumerate(failed) if f)
        raise error_type(what.format(sum(failed), first))
    return found
