"""torch_scatter's kernels on sharded rows: extrema and their places, runs of rows, sorted indices.

They take effect when the program imports torch_scatter; nothing here does. Its `scatter`, `sum` and
`mean` are torch functions and need no rule, nor do softmax, logsumexp and std, which call these.
With `out=` the package's own kernel runs, which gathers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..dispatch.rule import rule
from ..rules.operands import cut_axes, dims_of
from ..spec import Spec
from ..tensor import ShardTensor, wrap

_SCATTER = "torch_scatter.scatter.scatter_"
_CSR = "torch_scatter.segment_csr."
_COO = "torch_scatter.segment_coo."


def _kernel(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A rule for kernels of these names: what is decorated is called as they are, without `out`."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(fn)

        def run(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = signature.bind(function, *args, **kwargs).arguments
            if given.get("out") is not None:
                return function.__wrapped__(*args, **kwargs)
            return fn(function, *args, **kwargs)

        run.takes_function = True  # type: ignore[attr-defined]
        return rule(*names)(run)

    return register


@_kernel(_CSR + "segment_sum_csr", _CSR + "segment_add_csr")
def segment_sum(function: Any, src: Tensor, indptr: Tensor, out: Any = None) -> Any:
    return _reduced("sum", function, src, indptr)


@_kernel(_CSR + "segment_mean_csr")
def segment_mean(function: Any, src: Tensor, indptr: Tensor, out: Any = None) -> Any:
    return _reduced("mean", function, src, indptr)


def _reduced(reduce: str, function: Any, src: Tensor, indptr: Tensor) -> Any:
    """Rows indptr[..., i] to indptr[..., i + 1] as one; of no rows zeros."""
    lead = indptr.ndim - 1
    served = lead in (0, 1) and src.is_floating_point()
    if not served or not cut_axes(dims_of(src)[lead]):
        return function.__wrapped__(src, indptr)
    if not lead:
        return torch.segment_reduce(src, reduce, offsets=indptr, initial=0)
    samples = zip(src.unbind(0), indptr.expand(len(src), -1).unbind(0), strict=True)
    return torch.stack(
        [torch.segment_reduce(x, reduce, offsets=ends, initial=0) for x, ends in samples]
    )


# extrema ------------------------------------------------------------------------------------------


@_kernel(_SCATTER + "max", _SCATTER + "min")
def scatter_extremum(
    function: Any,
    src: Tensor,
    index: Tensor,
    dim: int = -1,
    out: Tensor | None = None,
    dim_size: int | None = None,
) -> Any:
    """(extrema, where the first of them is along dim; the size of dim for what has none)."""
    d = dim % src.ndim
    return _extremum(function.__name__, src, _along(index, src, d), d, dim_size)


@_kernel(_COO + "segment_max_coo", _COO + "segment_min_coo")
def segment_extremum_coo(
    function: Any, src: Tensor, index: Tensor, out: Any = None, dim_size: int | None = None
) -> Any:
    d = index.ndim - 1
    return _extremum(function.__name__, src, _along(index, src, d), d, dim_size)


@_kernel(_CSR + "segment_max_csr", _CSR + "segment_min_csr")
def segment_extremum_csr(function: Any, src: Tensor, indptr: Tensor, out: Any = None) -> Any:
    d, n = indptr.ndim - 1, indptr.shape[-1] - 1
    # rows before the first run and after the last are in one more
    number = _numbers(src, indptr)
    number = torch.where((number >= 0) & (number < n), number, n)
    found = _extremum(function.__name__, src, _along(number, src, d), d, n + 1)
    return tuple(x.narrow(d, 0, n) for x in found)


def _extremum(
    name: str, src: Tensor, index: Tensor, d: int, size: int | None
) -> tuple[Tensor, Tensor]:
    """(extrema of the rows with one number, the first place of each), of a differentiable src."""
    largest, n = "max" in name, src.shape[d]
    shape = list(src.shape)
    shape[d] = _count(index) if size is None else size
    places = src.new_zeros(shape, dtype=torch.int64) + n
    if not n or not shape[d]:
        return src.new_zeros(shape), places
    x = src.detach()
    info: Any = torch.finfo if src.is_floating_point() else torch.iinfo
    worst = info(src.dtype).min if largest else info(src.dtype).max
    # the kernel begins with the worst finite number: neither that nor a NaN is found
    counts = x > worst if largest else x < worst
    x = torch.where(counts, x, worst)
    best = src.new_zeros(shape).detach()
    best = best.scatter_reduce(d, index, x, "amax" if largest else "amin", include_self=False)
    along = torch.arange(n, device=src.device).view(-1, *[1] * (src.ndim - 1 - d))
    place = torch.where(counts & (x == best.gather(d, index)), along, n)
    places = places.scatter_reduce(d, index, place, "amin")
    # lies as sums do; of each number one row is added, and has its gradient
    first = (place < n) & (place == places.gather(d, index))
    return src.new_zeros(shape).scatter_add(d, index, torch.where(first, src, 0)), places


# sorted indices -----------------------------------------------------------------------------------


@_kernel(_COO + "segment_sum_coo", _COO + "segment_add_coo", _COO + "segment_mean_coo")
def segment_coo(
    function: Any, src: Tensor, index: Tensor, out: Any = None, dim_size: int | None = None
) -> Any:
    d, shape = index.ndim - 1, list(src.shape)
    shape[d] = _count(index) if dim_size is None else dim_size
    at = _along(index, src, d)
    sums = src.new_zeros(shape).scatter_add(d, at, src)
    if "mean" not in function.__name__:
        return sums
    ones = torch.ones_like(src)
    count = src.new_zeros(shape).scatter_add(d, at, ones).clamp(min=1)
    return sums / count if src.is_floating_point() else sums.div(count, rounding_mode="floor")


@_kernel(_CSR + "gather_csr")
def gather_csr(function: Any, src: Tensor, indptr: Tensor, out: Any = None) -> Any:
    """Row i as often as its run is long."""
    ends = _whole(indptr)
    last = ends[..., -1:]
    places = torch.arange(int(last.flatten()[0]), device=ends.device).expand(*last.shape[:-1], -1)
    number = torch.searchsorted(ends.contiguous(), places.contiguous(), right=True) - 1
    return _taken(src, number)


@_kernel(_COO + "gather_coo")
def gather_coo(function: Any, src: Tensor, index: Tensor, out: Any = None) -> Any:
    return _taken(src, index)


def _taken(src: Tensor, index: Tensor) -> Tensor:
    """Rows by the last dim of an index, whose other dims are those of src."""
    d = index.ndim - 1
    if not d:
        return src.index_select(0, index)
    rest = src.shape[d + 1 :]
    index = index.expand(*src.shape[:d], -1).reshape(*src.shape[:d], -1, *[1] * len(rest))
    return src.gather(d, index.expand(*index.shape[: d + 1], *rest))


# indices ------------------------------------------------------------------------------------------


def _whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, ShardTensor) else x


def _count(index: Tensor) -> int:
    """How many numbers an index has."""
    return int(index.max()) + 1 if index.numel() else 0


def _along(index: Tensor, src: Tensor, d: int) -> Tensor:
    """An index as the package expands it: a vector along dim d, others from the front."""
    if index.ndim == 1:
        index = index.view(-1, *[1] * (src.ndim - 1 - d))
    else:
        index = index.reshape(*index.shape, *[1] * (src.ndim - index.ndim))
    return index.expand(src.shape)


def _numbers(src: Tensor, indptr: Tensor) -> Tensor:
    """The run of each row of src along the last dim of indptr, cut as src is."""
    ends, d = _whole(indptr).contiguous(), indptr.ndim - 1
    lead = ends.shape[:-1]
    if not isinstance(src, ShardTensor):
        rows = torch.arange(src.shape[d], device=ends.device).expand(*lead, -1)
        return torch.searchsorted(ends, rows.contiguous(), right=True) - 1
    spec = Spec(src._spec.mesh, (*Spec.whole(src._spec.mesh, lead).dims, src._spec.dims[d]))
    rows = torch.arange(*spec.spans[-1], device=ends.device).expand(*lead, -1)
    return wrap(torch.searchsorted(ends, rows.contiguous(), right=True) - 1, spec)
