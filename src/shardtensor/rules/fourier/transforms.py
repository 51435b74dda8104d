"""The steps of a Fourier transform: on whole dims where they lie, and moves of shards between them.

A transform over several dims does the whole ones first. Then the shards of each sharded one move
aside by one all-to-all, to a dim that is done if there is one, and stay there. What a transform
will do, and how its result will lie, is known from specs before anything is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...cache import cached
from ...spec import Dim, Spec
from ...tensor import ShardTensor, wrap
from ...tensor.redistribute import to_dims
from ..empty import with_one


class Kind(NamedTuple):
    """A family of transforms: `others` of all dims but the last one, `last` of that.

    first: whether `last` comes first. It does where it makes complex numbers of real ones.
    """

    others: Callable[..., Tensor]
    last: Callable[..., Tensor] | None = None
    first: bool = False


_fft = torch.fft
KINDS = {
    "fft": Kind(_fft.fftn),
    "ifft": Kind(_fft.ifftn),
    "rfft": Kind(_fft.fftn, _fft.rfft, True),
    "irfft": Kind(_fft.ifftn, _fft.irfft),
    "hfft": Kind(_fft.fftn, _fft.hfft),
    "ihfft": Kind(_fft.ifftn, _fft.ihfft, True),
}


class Transform(NamedTuple):
    """The arguments of one transform. lengths[i]: the length along dims[i], None the dim's own."""

    kind: Kind
    dims: tuple[int, ...]
    lengths: tuple[int | None, ...]
    norm: str | None


class Step(NamedTuple):
    """What comes next, and how its result lies: a function of whole dims, or a move (no function).

    args: of the function, after the tensor.
    """

    spec: Spec
    dims: tuple[int, ...] = ()
    function: Callable[..., Tensor] | None = None
    args: tuple[Any, ...] = ()

    def run(self, x: ShardTensor) -> ShardTensor:
        if self.function is None:
            return to_dims(x, self.spec.dims)
        return local_call(self.function, x, self.args, {}, self.dims)


def transformed(x: ShardTensor, job: Transform, done: tuple[int, ...] = ()) -> ShardTensor:
    """A transform over dims of which some are sharded; done: dims that need not be whole again."""
    for step in steps(x._spec, job, done):
        x = step.run(x)
    return x


@cached
def steps(spec: Spec, job: Transform, done: tuple[int, ...] = ()) -> tuple[Step, ...]:
    """The steps of a transform of what lies as spec."""
    plan = _Plan(spec, job)
    *rest, last = job.dims
    if job.kind.last is None:
        plan.others(job.dims, done)
    elif job.kind.first:
        plan.last(tuple(rest), done)
        plan.others(tuple(rest), (*done, last))
    else:
        plan.others(tuple(rest), done)
        plan.last((), (*done, *rest))
    return tuple(plan.steps)


class _Plan:
    """Steps so far, and how what they give lies."""

    def __init__(self, spec: Spec, job: Transform) -> None:
        self.spec, self.job = spec, job
        self.steps: list[Step] = []

    def last(self, todo: tuple[int, ...], done: tuple[int, ...]) -> None:
        """The transform of the last dim."""
        kind, n, d = self.job.kind, self.job.lengths[-1], self.job.dims[-1]
        self._move_off(d, todo, done)
        own = self.spec.dims[d].size
        if kind.first:
            size = (own if n is None else n) // 2 + 1
        else:
            size = 2 * (own - 1) if n is None else n
        assert kind.last is not None
        self._call(kind.last, (d,), (size,), (n, d, self.job.norm))

    def others(self, todo: tuple[int, ...], done: tuple[int, ...]) -> None:
        """The complex transforms: the whole dims first, then one sharded dim at a time."""
        job = self.job
        while todo:
            now = tuple(d for d in todo if not self.spec.dims[d].axes)
            if not now:
                # inner mesh axes first, so that they may nest in outer ones
                d = max(todo, key=lambda d: self.spec.dims[d].axes)
                now = (d,)
                self._move_off(d, tuple(e for e in todo if e != d), done)
            lengths = [job.lengths[job.dims.index(d)] for d in now]
            own = tuple(
                self.spec.dims[d].size if n is None else n
                for d, n in zip(now, lengths, strict=True)
            )
            self._call(job.kind.others, now, own, (own, now, job.norm))
            done += now
            todo = tuple(d for d in todo if d not in now)

    def _move_off(self, d: int, todo: tuple[int, ...], done: tuple[int, ...]) -> None:
        for dims in _moves(self.spec, d, todo, done):
            self.spec = self.spec.with_dims(dims)
            self.steps.append(Step(self.spec))

    def _call(self, function: Any, dims: tuple[int, ...], sizes: Any, args: Any) -> None:
        self.spec = _resized(self.spec, dims, sizes)
        self.steps.append(Step(self.spec, dims, function, args))


def local_call(
    func: Any, x: ShardTensor, args: Sequence[Any], kwargs: dict[str, Any], dims: Sequence[int]
) -> ShardTensor:
    """func of the local tensor along whole dims."""
    kwargs = {k: v for k, v in kwargs.items() if k != "input"}
    local = on_some(func, x._local, dims, *args, **kwargs)
    return wrap(local, _sizes(x._spec, local, dims))


def on_some(func: Any, local: Tensor, dims: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
    """func(local, ...) along dims. Torch refuses an empty batch; its rank gets an empty result."""
    if local.numel() or not all(local.shape[d] for d in dims):
        return func(local, *args, **kwargs)
    batch = [d for d in range(local.ndim) if d not in dims]
    out = func(with_one(local, batch, 0), *args, **kwargs)
    kept = [slice(None) if d in dims else slice(n) for d, n in enumerate(local.shape)]
    return out[tuple(kept)]


def _sizes(spec: Spec, local: Tensor, dims: Sequence[int]) -> Spec:
    """The spec of a local result whose whole `dims` may have new sizes."""
    return _resized(spec, tuple(dims), tuple(local.shape[d] for d in dims))


@cached
def _resized(spec: Spec, dims: tuple[int, ...], sizes: tuple[int, ...]) -> Spec:
    return spec.replace({d: Dim(n) for d, n in zip(dims, sizes, strict=True)})


@cached
def _moves(
    spec: Spec, d: int, todo: tuple[int, ...], done: tuple[int, ...]
) -> tuple[tuple[Dim, ...], ...]:
    """The dims to pass through until dim d is whole."""
    dims = spec.dims
    axes = dims[d].axes
    if not axes:
        return ()
    free = [e for e, dim in enumerate(dims) if e != d and dim.size > 1]
    if not free:
        return (spec.whole_in([d]).dims,)

    def rank(e: int) -> tuple[Any, ...]:
        parts = prod(spec.mesh.size(a) for a in (*axes, *dims[e].axes))
        return dims[e].size >= parts, e not in todo, not dims[e].axes, e in done, dims[e].size

    to = max(free, key=rank)
    union = tuple(sorted((*axes, *dims[to].axes)))
    all_on_to = Dim.chunked(dims[to].size, union, spec.mesh)
    last = spec.replace({to: all_on_to, d: dims[d].whole}).dims
    if union[: len(dims[to].axes)] == dims[to].axes:
        return (last,)
    # outer axes cannot move below inner ones: all meet in dim d first
    all_on_d = Dim.chunked(dims[d].size, union, spec.mesh)
    return spec.replace({d: all_on_d, to: dims[to].whole}).dims, last
