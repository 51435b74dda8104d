"""`check`: is my model right when it is sharded? And if not, which module, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...containers import leaves, tensors
from ...later import dt
from ..trees import called, dims_like
from .judge import Case
from .layouts import Layout
from .report import Finding, Report

__all__ = ["Finding", "Report", "assert_parallel", "check"]


def check(
    model: nn.Module,
    inputs: Any,
    placements: Sequence[dt.Placement] | None = None,
    mesh_shapes: Sequence[Sequence[int]] | None = None,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    double: bool = True,
    rtol: float | None = None,
    at: Sequence[int] | None = None,
) -> Report:
    """Hold a model, sharded, against itself on one device: outputs, gradients, buffers.

    inputs: what forward takes: a tensor, a tuple or list of arguments, a dict of them by name, or
    the one dict that it takes; tensors in dicts, tuples and dataclasses are found. Small ones will
    do. placements: one for each mesh axis, `Shard(dim)` of the first tensor, and of every other
    that has this dim in the same size, counted from the front or else from the back; others stay
    plain, and the report names those that are as large as the first. Default: the first dim after
    batch and channels, or tokens, or points.
    mesh_shapes: default (2,) and (3,) for one axis, (2, 2) for two. Each is tried with even shards
    and with uneven ones, of which one is empty where there are three. loss: of the output; default:
    a fixed random combination of it.
    double: compare in float64, so that rounding does not count; casts inside the model are made
    wider, too (where the model takes it). rtol: of the largest value, default 1e-8 in float64, 1e-3
    in float32. at: the first tensor's shape in your runs, for which the bytes of gathers are told.
    Ranks are simulated in this process; in a job of several, they are its ranks, mesh_shapes must
    be of so many, and all call this. The model, its gradients and random states stay as they were.
    Raises ValueError for inputs without a tensor, placements and shapes that do not go together,
    and an output without a gradient; what the sharded model raises is in the report.
    """
    args, kwargs = called(model, inputs)
    found = tensors((args, kwargs))
    if not found:
        raise ValueError("check: inputs has no tensor")
    first = found[0]
    placements = tuple([dt.Shard(_usual(first))] if placements is None else placements)
    if not placements or not all(
        isinstance(p, dt.Shard) and -first.ndim <= p.dim < first.ndim for p in placements
    ):
        raise ValueError(
            f"placements {list(placements)}: one Shard(dim of the first tensor) an axis"
        )
    shapes = mesh_shapes or Layout.usual(len(placements))
    if any(len(s) != len(placements) or min(s) < 1 for s in shapes):
        raise ValueError(
            f"mesh shapes {list(shapes)} for {len(placements)} placements: one size from 1 each"
        )
    scale = 1.0
    if at is not None:
        if len(at) != first.ndim:
            raise ValueError(f"at={tuple(at)} for a first tensor of shape {tuple(first.shape)}")
        scale = torch.Size(at).numel() / max(1, first.numel())
    layouts = [
        layout
        for shape in shapes
        for uneven in (False, True)
        if (layout := Layout.of(first, placements, shape, uneven)) is not None
    ]
    case = Case(model, args, kwargs, loss or combination, rtol, double)
    case.notes += _plain(inputs, first, layouts[0].dims)
    findings = case.findings(layouts)
    return Report(findings, case.notes, tuple(at or ()), scale, case.rtol or 0.0)


def assert_parallel(
    model: nn.Module,
    inputs: Any,
    placements: Sequence[dt.Placement] | None = None,
    mesh_shapes: Sequence[Sequence[int]] | None = None,
    *,
    gathers: bool = True,
    **options: Any,
) -> None:
    """Raise AssertionError with the report of `check`, unless the model is right when sharded.

    For tests of models; arguments as of `shardtensor.check`. gathers: whether ops without a rule
    may gather their operands, which is right, but grows with the global size. Raises ValueError for
    arguments that `check` does not take.
    """
    report = check(model, inputs, placements, mesh_shapes, **options)
    if not report.ok or (not gathers and any(f.gathered for f in report.findings)):
        raise AssertionError(str(report))


def _plain(inputs: Any, first: Tensor, dims: tuple[int, ...]) -> list[str]:
    """Notes of large inputs that no rank has a part of."""
    return [
        f"inputs{path} {tuple(x.shape)} is whole on every rank: it has no dim like "
        f"{' and '.join(f'dim {d} of size {first.shape[d]}' for d in dims)} of the first tensor"
        for path, x in leaves(inputs)
        if isinstance(x, Tensor)
        and x.is_floating_point()
        and x.numel() >= first.numel()
        and dims_like(x.shape, first.shape, dims) is None
    ]


def _usual(x: Tensor) -> int:
    """The dim that is sharded unless told otherwise."""
    return 2 if x.ndim > 3 else max(0, x.ndim - 2)


def combination(out: Any) -> Tensor:
    """A fixed random combination of all tensors of an output."""
    g = torch.Generator().manual_seed(17)
    found = [x for x in tensors(out) if x.is_floating_point() or x.is_complex()]
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in found]
    parts = [
        (x * w.to(x.device, x.dtype)).real if x.is_complex() else x * w.to(x.device, x.dtype)
        for x, w in zip(found, weights, strict=True)
    ]
    if not parts:
        raise ValueError("the model's output has no floating-point tensor: give a loss")
    total = parts[0].sum()
    for p in parts[1:]:
        total = total + p.sum()
    return total
