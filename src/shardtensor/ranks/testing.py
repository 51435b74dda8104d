"""Hold an op or a model against its single-device run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils import _pytree as pytree

from .._torch.world import is_silent
from ..comm.observers import simulated_rank
from ..dispatch.fallback import fallback
from ..later import dt
from ..spec import Spec
from ..tensor import ShardTensor
from ..tensor.construct import distribute_tensor
from ..tensor.redistribute import reduced
from .simulate import simulate
from .tolerance import ROUNDING, differentiable, gap, shaken
from .workers import run_workers

__all__ = [
    "On", "cuts", "hold", "hold_all", "make_mesh", "replicated", "run_workers", "same", "shard",
    "simulate",
]  # fmt: skip
NAMES = ("a", "b", "c")
_meshes: dict[tuple[str, tuple[int, ...], tuple[str, ...]], DeviceMesh] = {}


@dataclass(frozen=True)
class On:
    """How an argument lies on the mesh: placements, and sizes of uneven shards by dim."""

    placements: Sequence[dt.Placement]
    sizes: Mapping[int, Sequence[int]] | None = None

    def __str__(self) -> str:
        placements = ", ".join(map(str, self.placements))
        return f"[{placements}]" + (f" in {self.sizes}" if self.sizes else "")


def shard(dim: int, sizes: Sequence[int] | None = None) -> On:
    """Sharded along one dim of a one-axis mesh."""
    return On([dt.Shard(dim)], None if sizes is None else {dim: sizes})


def cuts(size: int) -> list[tuple[int, ...]]:
    """The hard list of shard sizes for a dim: even, uneven, empty, tiny, on 1 to 4 ranks."""
    found: list[tuple[int, ...]] = [(size,), (size - size // 2, size // 2)]
    if size >= 3:
        found += [(size - size // 3, size // 3), (size - size // 4, 0, size // 4)]
    if size >= 4:
        quarter = size // 4
        found += [(1, size - 2, 0, 1), (size - 3 * quarter, quarter, quarter, quarter)]
    return found


def hold(
    fn: Callable[..., Any],
    args: Sequence[Any],
    places: Sequence[On | None],
    mesh_shape: Sequence[int],
    *,
    kwargs: dict[str, Any] | None = None,
    grad: bool = True,
    rtol: float | None = None,
    atol: float = 0.0,
    gather: bool = False,
    run: Callable[..., list[Any]] = simulate,
) -> list[Spec | None]:
    """Raise AssertionError unless fn of sharded args equals fn of plain args, on their device.

    args: tensors and other values; places: for each argument how it is sharded, or added up along
    axes that are Partial; None: given plain.
    fn may be a module: its parameters' gradients and its buffers are compared too. Compared on
    every rank: value, dtype and global shape of each output tensor; gradients of all floating-point
    arguments and parameters for a fixed random cotangent. rtol: of the largest absolute value;
    default 1e-12 in fp64, 1e-5 in fp32. atol: added to that. What is nothing but
    rounding (the gradient of a bias in front of a norm) may differ as `check` allows, by what a
    change in the last digits of the arguments does, but by no more than rtol of the largest value
    of the whole run.
    gather: whether an op without a rule may run by gathering.
    Returns the spec of each output tensor. An error names fn, the mesh and the cuts.
    """
    options = dict(kwargs=kwargs, grad=grad, rtol=rtol, atol=atol, gather=gather, run=run)
    try:
        return hold_all(fn, args, [places], mesh_shape, **options)[0]  # type: ignore[arg-type]
    except Exception as e:
        e.add_note(_described(fn, args, places, mesh_shape))
        raise


def hold_all(
    fn: Callable[..., Any],
    args: Sequence[Any],
    layouts: Sequence[Sequence[On | None]],
    mesh_shape: Sequence[int],
    *,
    kwargs: dict[str, Any] | None = None,
    grad: bool = True,
    rtol: float | None = None,
    atol: float = 0.0,
    gather: bool = False,
    run: Callable[..., list[Any]] = simulate,
) -> list[list[Spec | None]]:
    """`hold` on several layouts, one after the other on the same ranks; the specs of each.

    What one device gives and the ranks are made once, so a layout costs less than half.
    """
    kwargs = kwargs or {}
    want = _serial(fn, args, kwargs, grad)
    checked = run(
        prod(mesh_shape), _on_rank, fn, args, layouts, mesh_shape, kwargs, want,
        (rtol, atol), gather,
    )  # fmt: skip
    return checked[0]


def _described(
    fn: Any, args: Sequence[Any], places: Sequence[On | None], mesh_shape: Sequence[int]
) -> str:
    name = type(fn).__name__ if isinstance(fn, nn.Module) else getattr(fn, "__name__", repr(fn))
    given = [
        f"{str(a.dtype)[6:]}{list(a.shape)}{f' on {p}' if p else ''}"
        if isinstance(a, Tensor)
        else repr(a)
        for a, p in zip(args, places, strict=True)
    ]
    return f"{name}({', '.join(given)}) on mesh {tuple(mesh_shape)}"


def _leaves(args: Sequence[Any]) -> list[Any]:
    return [
        a.detach().clone().requires_grad_(a.requires_grad or differentiable(a))
        if isinstance(a, Tensor)
        else a
        for a in args
    ]


def tensors(out: Any) -> list[Tensor]:
    """The tensors in an output, sharded ones whole wrappers."""
    found = pytree.tree_leaves(out, is_leaf=lambda x: isinstance(x, ShardTensor))
    return [x for x in found if isinstance(x, Tensor)]


def _cotangents(outs: list[Tensor]) -> list[Tensor]:
    g = torch.Generator().manual_seed(17)
    made, on = [], torch.device("cpu")
    for o in outs:
        wide = torch.complex128 if o.is_complex() else torch.float64
        made.append(torch.randn(o.shape, generator=g, dtype=wide, device=on).to(o.device, o.dtype))
    return made


# outputs, gradients of arguments and parameters, buffers
Run = tuple[list[Tensor], list[Tensor | None], dict[str, Tensor]]


def _run(fn: Any, args: list[Any], kwargs: dict[str, Any], grad: bool, leaves: list[Any]) -> Run:
    outs = tensors(fn(*args, **kwargs))
    grads: list[Tensor | None] = []
    if grad:
        pairs = [
            _root(o, c)
            for o, c in zip(outs, _cotangents(outs), strict=True)
            if differentiable(o) and o.requires_grad
        ]
        if pairs:
            torch.autograd.backward([o for o, _ in pairs], [c for _, c in pairs])
        wrt = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
        if isinstance(fn, nn.Module):
            wrt += [p for p in fn.parameters() if p.requires_grad]
        grads = [x.grad for x in wrt]
    state = dict(fn.named_buffers()) if isinstance(fn, nn.Module) else {}
    return outs, grads, state


def _serial(fn: Any, args: Sequence[Any], kwargs: dict[str, Any], grad: bool) -> Run:
    fn = copy.deepcopy(fn) if isinstance(fn, nn.Module) else fn
    leaves = _leaves(args)
    outs, grads, state = _run(fn, leaves, kwargs, grad, leaves)
    return [o.detach() for o in outs], [None if g is None else g.detach() for g in grads], state


def make_mesh(
    mesh_shape: Sequence[int], device: str = "cpu", names: Sequence[str] = NAMES
) -> DeviceMesh:
    """A mesh over all ranks, its axes named a, b, c or as given.

    A process keeps its meshes, but for those of simulated and of silent worlds, which end before.
    """
    shape = tuple(mesh_shape)
    key = device, shape, tuple(names[: len(shape)])
    ends = dist.is_initialized() and is_silent(dist.group.WORLD)
    kept = _meshes if simulated_rank() is None and not ends else {}
    if key not in kept:
        kept[key] = init_device_mesh(device, shape, mesh_dim_names=key[2])
    return kept[key]


def _device(args: Sequence[Any]) -> str:
    """Where the first tensor lies."""
    return next((a.device.type for a in args if isinstance(a, Tensor)), "cpu")


def _root(out: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
    """The local tensor of an output, and this rank's part of the cotangent of the whole."""
    if not isinstance(out, ShardTensor):
        return out, cotangent
    out = reduced(out)
    return out._local, cotangent[out._spec.block]


def _on_rank(
    fn: Any,
    args: Sequence[Any],
    layouts: Sequence[Sequence[On | None]],
    mesh_shape: Sequence[int],
    kwargs: dict[str, Any],
    want: Run,
    within: tuple[float | None, float],
    gather: bool,
) -> list[list[Spec | None]]:
    """Hold fn on this rank's shards to what one device gave; the specs of its results."""
    mesh = make_mesh(mesh_shape, _device(args))
    grad = bool(want[1])
    found = []
    for places in layouts:
        module = copy.deepcopy(fn) if isinstance(fn, nn.Module) else fn
        leaves, given = _placed(args, places, mesh)
        # a rule that is missing must not pass by gathering
        with fallback("replicate" if gather else "error"):
            got = _run(module, given, kwargs, grad, leaves)
        try:
            _compare(got, want, within, lambda: _serial(fn, _shaken(args), kwargs, grad))
        except AssertionError as e:
            where = _described(fn, args, places, mesh_shape)
            raise AssertionError(f"{where}: {e}") from None
        found.append([o._spec if isinstance(o, ShardTensor) else None for o in got[0]])
    return found


def _placed(
    args: Sequence[Any], places: Sequence[On | None], mesh: DeviceMesh
) -> tuple[list[Any], list[Any]]:
    """(leaves, what is given to fn: these or, where addends were asked for, made of them)."""
    leaves = _leaves(args)
    given = []
    for i, (a, place) in enumerate(zip(leaves, places, strict=True)):
        if place is not None:
            kept = [dt.Replicate() if p.is_partial() else p for p in place.placements]
            a = distribute_tensor(a, mesh, kept, src_data_rank=None, sizes=place.sizes)
            leaves[i] = a
            a = a.redistribute(mesh, place.placements) if kept != list(place.placements) else a
        given.append(a)
    return leaves, given


def _shaken(args: Sequence[Any]) -> list[Any]:
    return [shaken(a) if isinstance(a, Tensor) else a for a in args]


def _named(run: Run) -> dict[str, Tensor | None]:
    outs, grads, buffers = run
    found: dict[str, Tensor | None] = {f"output {i}": o for i, o in enumerate(outs)}
    found |= {f"gradient {i}": g for i, g in enumerate(grads)}
    return found | {f"buffer {k}": b for k, b in buffers.items()}


def _compare(
    got: Run, want: Run, within: tuple[float | None, float], other: Callable[[], Run]
) -> None:
    """Raise AssertionError unless got is want, or what rounding may make of it.

    other: the same run with arguments that differ in the last digits.
    """
    assert len(got[0]) == len(want[0]), f"{len(got[0])} outputs, expected {len(want[0])}"
    wanted, third = _named(want), None
    for what, x in _named(got).items():
        w = wanted[what]
        if w is None:
            assert x is None, f"{what}: expected none"
            continue
        assert x is not None, f"{what} is missing"
        try:
            same(x, w, what, *within)
        except AssertionError:
            third = third or _named(other())
            moved, (mine, want_of_mine) = third[what], _on_this_rank(x, w)
            most = max(gap(None, v)[0] for v in wanted.values() if v is not None and v.numel())
            allowed = (within[0] or rtol_of(w.dtype)) * most
            if moved is None or gap(mine, want_of_mine)[0] > min(
                ROUNDING * gap(moved, w)[0], allowed
            ):
                raise


def full(x: Tensor) -> Tensor:
    """The whole tensor as a plain one."""
    return x.full_tensor().detach() if isinstance(x, ShardTensor) else x.detach()


def _on_this_rank(got: Tensor, want: Tensor) -> tuple[Tensor, Tensor]:
    """What this rank has of got, and what that should be; only addends are added up."""
    if not isinstance(got, ShardTensor) or got._spec.partial or got.shape != want.shape:
        return full(got), want
    return got.to_local().detach(), want[got._spec.block]


def same(
    got: Tensor, want: Tensor, what: str, rtol: float | None = None, atol: float = 0.0
) -> None:
    """Raise AssertionError unless got (sharded or plain) is want, within rtol of its largest."""
    if isinstance(got, ShardTensor):
        spec = got._spec
        assert got._local.shape == spec.local_shape, (
            f"{what}: local shape {tuple(got._local.shape)} for {spec}"
        )
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, not {want.dtype}"
    mine, wanted = _on_this_rank(got, want)
    if not wanted.numel():
        return
    if not differentiable(want):
        assert torch.equal(mine, wanted), f"{what}: values differ"
        return
    rtol = rtol or rtol_of(want.dtype)
    most = float(want.abs().max())
    scale = most if most < float("inf") else _largest_finite(want)
    bound = rtol * scale + atol + torch.finfo(want.dtype).tiny
    if float((mine - wanted).abs().max()) <= bound:
        return
    near = (mine == wanted) | ((mine - wanted).abs() <= bound) | (mine.isnan() & wanted.isnan())
    if not bool(near.all()):
        worst = (mine - wanted).abs().nan_to_num(float("inf")).max() / scale
        raise AssertionError(f"{what}: relative error {float(worst):.1e}")


def _largest_finite(x: Tensor) -> float:
    known = x[torch.isfinite(x)]
    return float(known.abs().max()) if known.numel() else 1.0


def rtol_of(dtype: torch.dtype) -> float:
    """What a reordered sum may change, of the largest value."""
    return 1e-12 if dtype in (torch.float64, torch.complex128) else 1e-5


def replicated(ndim: int = 1) -> On:
    """Whole on every rank of a mesh with `ndim` axes."""
    return On([dt.Replicate()] * ndim)
