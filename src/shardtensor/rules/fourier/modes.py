"""Zeros into which modes are written, and their inverse transforms, which send the modes only.

What is written stays beside the zeros as it is, until something reads them. An inverse transform
needs no more than the modes: every rank gets all of them and makes its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import comm
from ...comm.exchanges import whole
from ...cuts import cut
from ...spec import Dim, Spec, axes_in
from ...tensor import ShardTensor, wrap
from ...tensor.aliases import refuse_stale
from ...tensor.lazy import Lazy, Recipe, evaluate, lazy, takes_lazy
from ...tensor.redistribute import fit, reduced, to_dims
from ..operands import many
from ..ranges import Box, box_of
from .fft import arguments, check, job_of
from .spectrum import home, shifts
from .transforms import KINDS, Transform, on_some, steps, transformed
from .waves import real_rows_of, rows_of


class Piece(NamedTuple):
    """What was written to a box; nobody else can write to it."""

    box: Box
    value: ShardTensor


class Zeros(Recipe):
    """Zeros, and the modes that were written to them."""

    name = "zeros"

    def __init__(self, spec: Spec, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(dtype, device)
        self.spec = spec
        self.pieces: list[Piece] = []

    @property
    def grad_fn(self) -> Any:
        nodes = (p.value._local.grad_fn for p in self.pieces)
        return next((n for n in nodes if n is not None), None)

    @property
    def facts(self) -> Tensor:
        made = super().facts
        for _ in self.pieces:
            made.zero_()
        return made

    def local(self, x: Lazy, view: bool) -> Tensor:
        """All of it: the modes go to the ranks that hold their rows."""
        shape = tuple(self.spec.local_shape)
        out = wrap(torch.zeros(shape, dtype=self.dtype, device=self.device), self.spec)
        with torch.set_grad_enabled(self.grad_fn is not None or torch.is_grad_enabled()):
            for box, value in self.pieces:
                for at, part in _runs(box, self.spec.shape):
                    index = tuple(slice(r.first, r.stop) for r in at)
                    mine = tuple(slice(r.first, r.stop) for r in part)
                    out[index] = value[mine]
        return out._local


def zeros(spec: Spec, dtype: torch.dtype, device: torch.device) -> Lazy:
    """A tensor of zeros that waits for modes."""
    return lazy(Zeros(spec, dtype, device), spec)


def _runs(box: Box, shape: Sequence[int]) -> list[tuple[Box, Box]]:
    """Boxes that do not wrap around: (of the whole, of the box)."""
    found: list[tuple[Box, Box]] = [((), ())]
    for rows, n in zip(box, shape, strict=True):
        found = [((*a, r), (*b, part)) for a, b in found for r, part in rows.runs(n)]
    return found


def _zeros(x: Any) -> Zeros | None:
    return x._recipe if isinstance(x, Lazy) and isinstance(x._recipe, Zeros) else None


@takes_lazy(torch.zeros_like)
def zeros_like(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Zeros like what is not made yet."""
    x = args[0] if args else kwargs.get("input")
    options = {k: v for k, v in kwargs.items() if k != "input" and v is not None}
    if not isinstance(x, Lazy) or options.pop("dtype", x.dtype) != x.dtype or any(options.values()):
        return NotImplemented
    return zeros(x._spec, x.dtype, x.device)


@takes_lazy(Tensor.new_zeros)
def new_zeros(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As `zeros_like`, also of another number of channels."""
    x, *size = args
    if not isinstance(x, Lazy) or any(v is not None for k, v in kwargs.items() if k != "dtype"):
        return NotImplemented
    shape = many(size[0], tuple(size[1:])) if size else ()
    if len(shape) != x.ndim or kwargs.get("dtype", x.dtype) not in (None, x.dtype):
        return NotImplemented
    same = [d for d, n in enumerate(shape) if x.shape[d] == n]
    dims = [x._spec.dims[d] if d in same else Dim(n) for d, n in enumerate(shape)]
    if axes_in(dims) != x._spec.varying:
        # another number of what it was cut along
        free = [d for d in same if not dims[d].axes]
        left = tuple(a for a in x._spec.varying if a not in axes_in(dims))
        if not free:
            return NotImplemented
        to = max(free, key=lambda d: shape[d])
        dims[to] = Dim.chunked(shape[to], left, x._spec.mesh)
    return zeros(x._spec.with_dims(dims), x.dtype, x.device)


@takes_lazy(Tensor.__setitem__)
def setitem(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, index, value = args
    return None if written(x, index, value) else NotImplemented


def written(x: Any, index: Any, value: Any) -> bool:
    """Whether x[index] = value was noted; if not, x must be made first."""
    recipe = _zeros(x)
    box = box_of(index, x.shape) if recipe is not None else None
    if recipe is None or box is None or not isinstance(value, ShardTensor):
        return False
    spec = value._spec
    fits = value.dtype == recipe.dtype and spec.shape == tuple(r.number for r in box)
    if not fits or spec.partial or spec.mesh != x._spec.mesh or torch.is_inference_mode_enabled():
        return False
    if any(r.step != 1 for r in box) or recipe.inference:
        return False
    if any(_meet(p.box, box, x.shape) for p in recipe.pieces):
        return False
    if isinstance(value, Lazy):
        evaluate(value, view=False)
    refuse_stale(value._local)
    recipe.pieces.append(Piece(box, wrap(value._local.clone(), value._spec)))
    return True


def _meet(a: Box, b: Box, shape: Sequence[int]) -> bool:
    return all(r.meets(s, n) for r, s, n in zip(a, b, shape, strict=True))


@takes_lazy(torch.fft.fftshift, torch.fft.ifftshift)
def shift(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Modes that wrap around."""
    x: Any = args[0] if args else kwargs.get("input")
    recipe = _zeros(x)
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    by = shifts(func, dim, x.shape) if recipe is not None else None
    if recipe is None or by is None or torch.is_inference_mode_enabled():
        return NotImplemented
    recipe.bypassed = True
    new = Zeros(x._spec, recipe.dtype, recipe.device)
    for box, value in recipe.pieces:
        rows = enumerate(zip(box, x.shape, strict=True))
        moved = tuple(r.moved(by.get(d, 0), n) for d, (r, n) in rows)
        new.pieces.append(Piece(moved, value))
    return lazy(new, x._spec)


# inverse transforms ------------------------------------------------------------------------------

_INVERSES = (
    torch.fft.irfft, torch.fft.irfft2, torch.fft.irfftn,
    torch.fft.ifft, torch.fft.ifft2, torch.fft.ifftn,
)  # fmt: skip


@takes_lazy(*_INVERSES)
def inverse(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of zeros and modes, without the zeros."""
    if _zeros(args[0] if args else kwargs.get("input")) is None or "axis" in kwargs:
        return NotImplemented
    name, x, dims, given, norm = arguments(func, args, kwargs)
    recipe = _zeros(x)
    assert recipe is not None
    if not recipe.pieces or not dims or torch.is_inference_mode_enabled():
        return NotImplemented
    check(func, x, args[1:], kwargs)
    found = _Inverse(recipe, x._spec, job_of(name, dims, given, norm)).run()
    if found is None:
        return NotImplemented
    recipe.bypassed = True
    return found


class _Inverse:
    """An inverse transform of zeros and modes. n: its length along each dim; target: of the result.

    half: the last dim, where only its non-negative frequencies are given.
    """

    def __init__(self, recipe: Zeros, spec: Spec, job: Transform) -> None:
        self.recipe, self.spec, self.job = recipe, spec, job
        self.half = job.dims[-1] if job.kind is KINDS["irfft"] else None
        given = zip(job.dims, job.lengths, strict=True)
        self.n = {d: spec.shape[d] if n is None else n for d, n in given}
        if self.half is not None and job.lengths[-1] is None:
            self.n[self.half] = 2 * (spec.shape[self.half] - 1)
        self.waves = [d for d in job.dims if d != self.half]

    def run(self) -> ShardTensor | None:
        """The result; None where all of the zeros are needed."""
        target = self._target() if self._is_plain() else None
        if target is None:
            return None
        cut_dims = [d for d in self.job.dims if target.dims[d].is_cut]
        if not cut_dims:
            return None
        for d in cut_dims:
            kept = {k for p in self.recipe.pieces for k in p.box[d].numbers(self.spec.shape[d])}
            if len(kept) * len(target.dims[d].sizes) >= self.n[d]:
                return self._narrow(target, cut_dims)
        return wrap(self._rows(target, cut_dims), target)

    def _is_plain(self) -> bool:
        """Whether modes are those of the result, and whole in all other dims."""
        if any(self.n[d] != self.spec.shape[d] for d in self.waves):
            return False
        for box, _ in self.recipe.pieces:
            for d, (rows, n) in enumerate(zip(box, self.spec.shape, strict=True)):
                if d == self.half and rows.stop > min(n, self.n[d] // 2 + 1):
                    return False
                if d not in self.n and rows != (0, n, 1):
                    return False
        return True

    def _target(self) -> Spec | None:
        """Cut as before the transform, or as a transform of the whole leaves it."""
        dims = self.job.dims
        outer = {
            tuple(d for i, d in enumerate(p.value._spec.dims) if i not in dims)
            for p in self.recipe.pieces
        }
        if len(outer) != 1:
            return None
        rest = iter(*outer)
        mesh = self.spec.mesh
        inner = home().get((mesh, dims, tuple(self.n[d] for d in dims)))
        if inner is None or set(axes_in(inner)) & set(axes_in(*outer)):
            last = steps(self.spec, self.job)[-1].spec
            inner = tuple(last.dims[d] for d in dims)
        if set(axes_in(inner)) & set(axes_in(*outer)):
            return None
        by = dict(zip(dims, inner, strict=True))
        return Spec(
            mesh, tuple(by[i] if i in by else next(rest) for i in range(len(self.spec.dims)))
        )

    def _narrow(self, target: Spec, cut_dims: list[int]) -> ShardTensor | None:
        """Where modes are many: only the columns that have none are left out."""
        if self.half is None or self.half in cut_dims:
            return None
        width = max(p.box[self.half].stop for p in self.recipe.pieces)
        dims = [Dim(self.spec.shape[i]) if i in self.n else d for i, d in enumerate(target.dims)]
        axes = axes_in(target.dims[d] for d in cut_dims)
        dims[self.half] = Dim.chunked(width, axes, self.spec.mesh)
        few = Zeros(self.spec.with_dims(dims), self.recipe.dtype, self.recipe.device)
        few.pieces = self.recipe.pieces
        x = zeros_of(few)
        lengths = tuple(self.n[d] for d in self.job.dims)
        return to_dims(transformed(x, self.job._replace(lengths=lengths)), target.dims)

    def _rows(self, target: Spec, cut_dims: list[int]) -> Tensor:
        """This rank's rows, from all modes."""
        norm, whole_dims = self.job.norm, [d for d in self.waves if d not in cut_dims]
        parts: dict[Box, Tensor] = {}
        first = next((d for d in cut_dims if d != self.half), None)
        for box, numbers, value in self._joined(first):
            local = everywhere(value, self.job.dims, target)
            for d in cut_dims:
                if d != self.half:
                    k = numbers if d == first else box[d].numbers(self.n[d])
                    local = rows_of(local, d, k, target.spans[d], self.n[d], norm, 1)
            for at, mine in _runs(
                tuple([box[d] for d in whole_dims]), [self.n[d] for d in whole_dims]
            ):
                part = local
                for d, rows in zip(whole_dims, mine, strict=True):
                    part = part.narrow(d, rows.first, rows.number)
                key = at if self.half is None else (*at, box[self.half])
                parts[key] = parts[key] + part if key in parts else part
        full = dict.fromkeys(whole_dims, 0) | {d: self.n[d] for d in whole_dims}
        if self.half is not None:
            full[self.half] = max(p.box[self.half].stop for p in self.recipe.pieces)
        local = sum_of([_padded(x, key, full) for key, x in parts.items()]).contiguous()
        if whole_dims:
            lengths = [self.n[d] for d in whole_dims]
            local = on_some(torch.fft.ifftn, local, whole_dims, lengths, whole_dims, norm)
        last = self.half
        if last is None:
            return local
        n = self.n[last]
        if last not in cut_dims:
            return on_some(torch.fft.irfft, local, (last,), n, last, norm)
        return real_rows_of(local, last, tuple(range(full[last])), target.spans[last], n, norm)

    def _joined(self, d: int | None) -> list[tuple[Box, tuple[int, ...], ShardTensor]]:
        """Modes that differ in their rows of dim d alone, as one: (box, rows of d, modes)."""
        found: dict[Any, list[Piece]] = {}
        for p in self.recipe.pieces:
            spec, key = p.value._spec, p.box
            if d is not None and not spec.dims[d].axes:
                key = (*p.box[:d], *p.box[d + 1 :])
                spec = spec.replace({d: Dim(0)})
            found.setdefault((key, spec), []).append(p)
        joined = []
        for pieces in found.values():
            box, value = pieces[0]
            numbers: tuple[int, ...] = ()
            if d is not None:
                numbers = tuple(k for p in pieces for k in p.box[d].numbers(self.n[d]))
                if len(pieces) > 1:
                    local = torch.cat([p.value._local for p in pieces], d)
                    value = wrap(local, value._spec.replace({d: Dim(len(numbers))}))
            joined.append((box, numbers, value))
        return joined


def zeros_of(recipe: Zeros) -> ShardTensor:
    """Zeros with the modes in their places."""
    x = lazy(recipe, recipe.spec)
    evaluate(x)
    return x


def sum_of(parts: list[Tensor]) -> Tensor:
    out = parts[0]
    for x in parts[1:]:
        out = out + x
    return out


def _padded(x: Tensor, rows: Box, full: dict[int, int]) -> Tensor:
    """x, rows of each dim of `full`, with zeros around."""
    pad = [0] * (2 * x.ndim)
    for (d, n), r in zip(full.items(), rows, strict=True):
        at = 2 * (x.ndim - 1 - d)
        pad[at], pad[at + 1] = r.first, n - r.stop
    return torch.constant_pad_nd(x, pad) if any(pad) else x


def everywhere(y: Tensor, dims: Sequence[int], target: Spec) -> Tensor:
    """All modes of `dims` on every rank that needs them, for use that differs from rank to rank."""
    wanted = [Dim(y.shape[i]) if i in dims else e for i, e in enumerate(target.dims)]
    y = reduced(y)
    if not isinstance(y, ShardTensor) or not _is_ready(y._spec, wanted, dims, target):
        (found,) = fit(target.mesh, target.varying, (y, wanted))
        return found
    local = y._local
    for d in dims:
        e = y._spec.dims[d]
        if e.axes:
            # not a gather: the adjoint adds up what every rank made of the modes
            group = comm.group(target.mesh, e.axes)
            local = comm.window(local, d, e.sizes, whole(cut(e.sizes)), group)
    return local


def _is_ready(have: Spec, wanted: Sequence[Dim], dims: Sequence[int], target: Spec) -> bool:
    """Whether modes only need to be spread over the axes that shard them already."""
    rest = all(i in dims or e == w for i, (e, w) in enumerate(zip(have.dims, wanted, strict=True)))
    return rest and have.mesh == target.mesh and have.varying == target.varying
