"""Spectra of which nothing is sent before it is read, and of slices the kept modes only.

The transform of a sharded dim is a sum over all ranks' rows. Until something reads it, it is left
out: its slices stay slices to be, and one that is used is summed up alone. Every rank makes its own
rows' part of the kept modes, and one reduce-scatter deals these to all ranks. Whatever else reads
the spectrum finishes it as it would have been (`transforms`).
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch import Tensor

from ... import comm, settings
from ...spec import Dim, axes_in
from ...tensor import ShardTensor, wrap
from ...tensor.aliases import relate
from ...tensor.lazy import Lazy, Recipe, lazy, takes_lazy
from ...tensor.offset import take_rows
from ...tensor.random import matching
from ...tensor.redistribute import to_dims
from ..gather.index_dim import index_select
from ..operands import many
from ..ranges import Box, Rows, box_of, every, numbers_on, picked
from ..views.join import roll
from ..views.slices import picks, sliced
from .transforms import KINDS, Kind, Transform, on_some, steps, transformed
from .waves import modes_of

# the sign of the exponent
_SIGNS = {KINDS["fft"]: -1, KINDS["rfft"]: -1, KINDS["ifft"]: 1}
_FLOATS = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class _Home(threading.local):
    """How dims lay before they were transformed, which their inverse gives again."""

    def __init__(self) -> None:
        self.dims: dict[Any, tuple[Dim, ...]] = {}


_home = _Home()


def home() -> dict[Any, tuple[Dim, ...]]:
    """How dims lay, by mesh, dims and lengths of their transform."""
    return settings.current("home", _home.dims)


settings.remembered["home"] = home


def begun(x: ShardTensor, job: Transform, strides: tuple[int, ...]) -> Lazy | None:
    """A transform of which the local steps are done; None where it must be finished at once."""
    spec = x._spec
    lengths = dict(zip(job.dims, job.lengths, strict=True))
    known = job.kind in _SIGNS and x.dtype in _FLOATS and x.numel() and not matching()
    if not known or (x._strides is not None and x._strides.turned):
        return None
    if any((n or spec.shape[d]) < spec.shape[d] for d, n in lengths.items() if spec.dims[d].axes):
        return None
    if not any(spec.dims[d].is_cut for d in job.dims) or _is_coarse(x):
        return None
    sizes = tuple(lengths[d] or spec.shape[d] for d in job.dims)
    for lay in (_home.dims, home()):
        if len(lay) > 256:
            lay.clear()
        lay[spec.mesh, job.dims, sizes] = tuple(spec.dims[d] for d in job.dims)
    return _whole(_Root(x, job), strides)


def _whole(root: _Root, strides: tuple[int, ...] | None = None) -> Lazy:
    made = lazy(Spectrum(root, every(root.spec.shape)), root.spec, strides)
    root.of = weakref.ref(made)
    return made


def _nothing() -> None:
    return None


def _is_coarse(x: ShardTensor) -> bool:
    """Whether products may have fewer digits than transforms."""
    single = x.dtype in (torch.float32, torch.complex64)
    return single and x.device.type != "cpu" and torch.get_float32_matmul_precision() != "highest"


class _Root:
    """A transform whose local steps are done.

    part: their result, which nobody else has. rest: the steps that are left, for dims `left`.
    shifts: by how far the rows of the whole are rolled. whole: it, once it was read. columns: parts
    of the whole, all rows of dims `left`, by the rows of other dims. taken: whether modes were.
    """

    def __init__(self, x: ShardTensor, job: Transform) -> None:
        planned = steps(x._spec, job)
        own = next(i for i, step in enumerate(planned) if step.function is None)
        # of memory that nobody writes to
        self.part = x if own else wrap(x._local.clone(), x._spec)
        for step in planned[:own]:
            self.part = step.run(self.part)
        done = {d for step in planned[:own] for d in step.dims}
        self.left = tuple(d for d in job.dims if d not in done)
        self.job, self.rest, self.spec = job, planned[own:], planned[-1].spec
        self.shifts: dict[int, int] = {}
        self.whole: ShardTensor | None = None
        self.columns: dict[Box, ShardTensor] = {}
        self.taken = False
        # the object of the whole
        self.of: Callable[[], Any] = _nothing

    def finish(self, token: Tensor) -> ShardTensor:
        """The whole spectrum."""
        if self.whole is None:
            done = tuple(Rows(0, self.part.shape[d]) for d in self.job.dims if d not in self.left)
            # what users may write to is not kept for others
            y = self._column(done)
            self.columns.pop(done)
            if self.shifts:
                y = _shards(roll(y, tuple(self.shifts.values()), tuple(self.shifts)))
            y = wrap(y._local.contiguous(), y._spec)
            if self.taken:
                relate(y._local, token, "a transform")
            self.whole = y
        return self.whole

    def modes(self, at: Box) -> ShardTensor:
        """Some modes, in memory of their own, dealt to all ranks."""
        sizes, dims = self.spec.shape, self.part._spec.dims
        kept = {d: at[d].moved(-self.shifts.get(d, 0), sizes[d]) for d in self.job.dims}
        cut = [d for d in self.left if dims[d].is_cut]
        self.taken = True
        few = all(self._few(d, kept[d]) for d in cut)
        y = self._summed(kept, cut) if few else self._sliced(kept)
        # autograd lets nobody write to a view of what was sent
        return wrap(y._local.clone(), y._spec) if y._local._is_view() else y

    def _length(self, d: int) -> int:
        return self.job.lengths[self.job.dims.index(d)] or self.part.shape[d]

    def _few(self, d: int, rows: Rows) -> bool:
        """Whether sums of modes send less than all rows: those of one sign come with the others."""
        n = self.spec.shape[d]
        half = self.job.kind.first and d == self.job.dims[-1]
        both = half or {0, n - 1} <= set(rows.numbers(n))
        count = rows.number if both else 2 * rows.number
        return count * len(self.part._spec.dims[d].sizes) < self._length(d)

    def _summed(self, kept: dict[int, Rows], cut: list[int]) -> ShardTensor:
        job, spec, local = self.job, self.part._spec, self.part._local
        for d in job.dims:
            if d not in self.left:
                local = picked(local, d, kept[d], spec.shape[d])
        # complex numbers are made of real ones first
        for d in sorted(cut, key=lambda d: d != job.dims[-1]):
            n = self._length(d)
            numbers = kept[d].numbers(self.spec.shape[d])
            sign = _SIGNS[job.kind]
            local = modes_of(local, d, numbers, spec.offset[d], n, job.norm, sign)
        for d in self.left:
            if d not in cut:
                n = self._length(d)
                local = on_some(job.kind.others, local, (d,), (n,), (d,), job.norm)
                local = picked(local, d, kept[d], n)
        to, dims = self._dealt(kept)
        axes = dims[to].axes
        group = comm.group(spec.mesh, axes)
        local = comm.reduce_scatter(local.contiguous(), to, dims[to].sizes, group)
        return wrap(local, spec.with_dims(dims))

    def _dealt(self, kept: dict[int, Rows]) -> tuple[int, list[Dim]]:
        """(a dim whose cut gives the busiest rank least modes, the dims of them all).

        Ranks that have one more of the positive frequencies have one less of the negative ones.
        """
        spec = self.part._spec
        axes = axes_in(spec.dims[d] for d in self.left)
        parts = prod(spec.mesh.size(a) for a in axes)
        counts = {d: rows.number for d, rows in kept.items()}
        to = min(reversed(self.job.dims), key=lambda d: Fraction(-(-counts[d] // parts), counts[d]))
        dims = [Dim(counts[d]) if d in counts else dim for d, dim in enumerate(spec.dims)]
        share, more = divmod(counts[to], parts)
        sizes = [share + 1] * more + [share] * (parts - more)
        negative = sum(2 * kept[d].first >= self.spec.shape[d] for d in kept)
        dims[to] = Dim(counts[to], axes, sizes[::-1] if negative % 2 else sizes)
        return to, dims

    def _column(self, done: Box) -> ShardTensor:
        """All rows of dims `left`, of some rows of the other dims of the transform."""
        y = self.columns.get(done)
        if y is not None:
            return y
        job, spec, local = self.job, self.part._spec, self.part._local
        others = [d for d in job.dims if d not in self.left]
        if all(rows == (0, spec.shape[d], 1) for d, rows in zip(others, done, strict=True)):
            y = self.part
            for step in self.rest:
                y = step.run(y)
        else:
            for d, rows in zip(others, done, strict=True):
                local = picked(local, d, rows, spec.shape[d])
                spec = spec.replace({d: Dim(rows.number)})
            kind = job.kind if job.dims[-1] in self.left else Kind(job.kind.others)
            lengths = tuple(job.lengths[job.dims.index(d)] for d in self.left)
            rest = Transform(kind, self.left, lengths, job.norm)
            y = transformed(wrap(local, spec), rest, tuple(others))
        self.columns[done] = y
        return y

    def _sliced(self, kept: dict[int, Rows]) -> ShardTensor:
        """Where sums would send more: all rows of few columns, cut at once, sliced."""
        job = self.job
        y = self._column(tuple(kept[d] for d in job.dims if d not in self.left))
        for d in self.left:
            rows, n = kept[d], self.spec.shape[d]
            if rows.stop <= n:
                y = sliced(y, d, rows.first, rows.first + rows.number * rows.step, rows.step)
            else:
                y = _shards(index_select(y, d, numbers_on(y.device, rows.numbers(n))))
        _, dims = self._dealt(kept)
        out = to_dims(y, dims)
        return out if out is not y else wrap(y._local.clone(), y._spec)


def _shards(x: Tensor) -> ShardTensor:
    assert isinstance(x, ShardTensor)
    return x


class Spectrum(Recipe):
    """Rows `at` of a spectrum. base: whether it is what the transform gave."""

    name = "fft"

    def __init__(self, root: _Root, at: Box) -> None:
        dtype = root.part.dtype
        super().__init__(dtype if dtype.is_complex else dtype.to_complex(), root.part.device)
        self.root, self.at, self.base = root, at, True

    @property
    def grad_fn(self) -> Any:
        return self.root.part._local.grad_fn

    @property
    def memory(self) -> Tensor:
        whole = self.root.whole
        return self.token if whole is None else whole._local

    @property
    def facts(self) -> Tensor:
        return super().facts if self.base else super().facts[:0]

    @property
    def bypassed(self) -> bool:  # type: ignore[override]
        return self.base and self.root.taken

    @property
    def is_begun(self) -> bool:
        """Whether nothing has read the whole, and this is all of it."""
        return self.root.whole is None and self.at == every(self.root.spec.shape)

    def is_now(self) -> bool:
        """Whether autograd records as it did then."""
        if torch.is_inference_mode_enabled() != self.inference:
            return False
        return self.grad_fn is None or torch.is_grad_enabled() == self.grad

    def local(self, x: Lazy, view: bool) -> Tensor:
        root = self.root
        if root.whole is None and not view and not self.is_begun:
            y = root.modes(self.at)
            piece = relate(y._local, self.token, "a slice")
            if piece is not None and all(rows.step == 1 for rows in self.at):
                spans = {d: (rows.first, rows.stop) for d, rows in enumerate(self.at)}
                piece.part = ("rows of a spectrum", spans)
        else:
            whole = y = root.finish(self.token)
            for d, rows in enumerate(self.at):
                if rows != (0, root.spec.shape[d], 1):
                    stop = rows.first + rows.number * rows.step
                    y = sliced(y, d, rows.first, stop, rows.step)
            if y._slice is not None:
                take_rows(whole)
                # slices of one object are known to be apart
                base = root.of()
                x._slice = (y._slice[0] if base is None else base, *y._slice[1:])
        x._spec = y._spec
        return y._local if self.base or y is not root.whole else y._local[...]


def _spectrum(x: Any) -> Spectrum | None:
    return x._recipe if isinstance(x, Lazy) and isinstance(x._recipe, Spectrum) else None


@takes_lazy(Tensor.__getitem__)
def getitem(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Slices of slices of modes."""
    x, index = args
    box = box_of(index, x.shape) if _spectrum(x) else None
    return NotImplemented if box is None else _slice(x, box)


def _slice(x: Lazy, box: Box) -> Any:
    recipe, spec = _spectrum(x), x._spec
    assert recipe is not None and x._strides is not None
    others = [d for d in range(x.ndim) if d not in recipe.root.job.dims]
    if any(box[d] != (0, x.shape[d], 1) for d in others) or not recipe.is_now():
        return NotImplemented
    new = copy.copy(recipe)
    new.base, new.at = False, tuple(a.taken(b) for a, b in zip(recipe.at, box, strict=True))
    kept = {
        d: picks(spec.dims[d], spec.index[d], r.first, r.first + r.number * r.step, r.step)[0]
        for d, r in enumerate(box)
    }
    strides = zip(x._strides.strides, box, strict=True)
    return lazy(new, spec.replace(kept), tuple(s * r.step for s, r in strides))


@takes_lazy(torch.narrow, Tensor.narrow)
def narrow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, d, start, length = _narrowed(*args, **kwargs)
    if not _spectrum(x) or any(type(n) is not int for n in (d, start, length)):
        return NotImplemented
    if not -x.ndim <= d < x.ndim or start < 0 or length < 1 or start + length > x.shape[d]:
        return NotImplemented
    rows = list(every(x.shape))
    rows[d] = Rows(start, length)
    return _slice(x, tuple(rows))


def _narrowed(input: Any, dim: Any, start: Any, length: Any) -> tuple[Any, ...]:
    return input, dim, start, length


def _shifted(input: Any, dim: Any = None) -> tuple[Any, Any]:
    return input, dim


@takes_lazy(torch.fft.fftshift, torch.fft.ifftshift)
def shift(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows that wrap around: nothing moves."""
    x, dim = _shifted(*args, **kwargs)
    recipe = _spectrum(x)
    if recipe is None or not recipe.is_begun or not recipe.is_now():
        return NotImplemented
    root = copy.copy(recipe.root)
    by = shifts(func, dim, x.shape)
    if by is None or not by.keys() <= set(root.job.dims):
        return NotImplemented
    recipe.root.taken = True
    root.taken = False
    root.shifts = {d: (root.shifts.get(d, 0) + n) % x.shape[d] for d, n in by.items()} | {
        d: n for d, n in root.shifts.items() if d not in by
    }
    return _whole(root)


def shifts(func: Any, dim: Any, shape: torch.Size) -> dict[int, int] | None:
    """By how far fftshift or ifftshift moves the rows of each dim; None where torch raises."""
    dims = tuple(range(len(shape))) if dim is None else many(dim)
    if any(type(d) is not int or not -len(shape) <= d < len(shape) for d in dims):
        return None
    back = func is torch.fft.ifftshift
    named = {d % len(shape) for d in dims}
    return {d: (shape[d] + back) // 2 for d in named} if len(named) == len(dims) else None
