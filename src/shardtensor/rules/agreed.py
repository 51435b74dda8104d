"""An error that depends on values, raised on every rank, whichever has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _torch, comm
from ..spec import Spec
from ..tensor.apart import told
from .reduce import axes_of, finish


def agreed(
    run: Callable[[], Any],
    spec: Spec,
    varying: tuple[int, ...],
    error_type: type[RuntimeError] = torch.linalg.LinAlgError,
    what: str = "the matrices of {0} other ranks, the first of them number {1}, cannot be factored",
) -> Any:
    """run(), where an error of one rank is raised on all: a matrix may be singular on one only.

    As error_type, or as the RuntimeError that some factorizations raise.
    The ranks tell each other in one small all-gather; not in traced graphs.
    """
    if not varying or _torch.is_tracing():
        return run()
    error, found = None, None
    try:
        found = run()
    except RuntimeError as e:
        error = e
    like = torch.empty(0, device=spec.mesh.device_type)
    code = 0 if error is None else 1 if isinstance(error, error_type) else 2
    failed = comm.faults(code, like, comm.group(spec.mesh, varying))
    if error is not None:
        raise told(error)
    if any(failed):
        first = next(i for i, f in enumerate(failed) if f)
        kind = error_type if failed[first] == 1 else RuntimeError
        raise kind(what.format(sum(map(bool, failed)), first))
    return found


def agreed_sums(
    run: Callable[[], Sequence[Tensor]],
    n: int,
    spec: Spec,
    dtype: torch.dtype,
    kind: type[Exception] = RuntimeError,
) -> list[Tensor]:
    """The n sums of run() over all parts of spec; an error of one rank is raised on all, as kind.

    Whether a rank failed travels with its sums. Kernels of other devices than CPUs do not raise.
    """
    dims = range(len(spec.dims))
    axes = axes_of(spec, dims)
    error, sums = None, [torch.zeros((), dtype=dtype)] * n
    try:
        sums = list(run())
    except (RuntimeError, IndexError) as e:
        if spec.mesh.device_type != "cpu":
            # of memory, say
            raise
        error = kind(str(e))
    if spec.mesh.device_type == "cpu" and axes and not _torch.is_tracing():
        failed = torch.full((), float(error is not None), dtype=dtype)
        *sums, failures = finish(torch.stack([*sums, failed]), spec, dims).unbind()
        others = int(failures) if comm.knows_values(comm.group(spec.mesh, axes)) else 0
        if others and error is None:
            error = kind(f"a loss of classes or inputs out of range, on {others} other ranks")
    elif axes and error is None:
        sums = list(finish(torch.stack(sums), spec, dims).unbind())
    if error is not None:
        raise told(error)
    return sums
