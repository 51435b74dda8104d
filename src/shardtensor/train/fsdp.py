"""FSDP2 under domain parallelism: parameters sharded over data, or over data and domain.

Over "data", FSDP2 averages over ranks that hold the same part of different samples, and each op
sums its weights' gradients over the domain. Over "all", ops sum nothing: FSDP2's own mean over all
ranks is the sum over the domain and the mean over data, if what a rank computed from its part of a
sample counts as often as there are parts. Gradients that are whole on every rank count once anyway.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import comm
from .._torch.dtensor import (
    drop_stale,
    drop_whole,
    hold_for_graphs,
    hooked_fsdp,
    is_broken_fsdp,
    mend_fsdp,
    whole_gradients,
)
from ..comm.deferred import rows
from ..comm.sums import reduce
from ..compile.blocks import blocks_of
from ..cuts import Cut
from ..errors import UnsupportedOpError
from ..later import dt, fsdp2
from ..tensor import ShardTensor
from .options import Options
from .replaced import replacing

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Part:
    """The slot of a parameter of FSDP2: a part of the gradient, weighted for a mean over all."""

    declines = False

    def __init__(self, group: str) -> None:
        self.group = group

    def use(self, x: Tensor) -> Tensor:
        return Weighted.apply(x, self.group)

    def cut(self, x: Tensor, dim: int, sizes: Cut, read: bool) -> Tensor:
        return rows(self.use(x), dim, sizes, self.group, read)

    def __reduce__(self) -> Any:
        return type(None), ()


class Weighted(torch.autograd.Function):
    """The identity; the gradient counts as often as there are parts."""

    @staticmethod
    def forward(x: Tensor, group: str) -> Tensor:
        return x.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.materialize_grads = False
        ctx.group = inputs[1]

    @staticmethod
    def vmap(info: Any, dims: tuple[Any, ...], x: Tensor, group: str) -> tuple[Tensor, Any]:
        return Weighted.apply(x, group), dims[0]

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None]:
        if g is None:
            return None, None
        if torch.is_grad_enabled():
            # a gradient of this gradient is wanted: it must be whole now
            return reduce([g], "sum", ctx.group)[0], None
        return g * comm.size(ctx.group), None


def shard(
    model: nn.Module, mesh: DeviceMesh, axes: tuple[int, ...], domain: str, options: Options
) -> list[nn.Parameter]:
    """Apply `fully_shard` to the blocks of the model and to the model.

    axes: those of the mesh that are not tensor-parallel. domain: the group of ranks that share
    samples. Returns the 0-dim parameters, which FSDP2 does not take: replicated DTensors whose
    gradients are still to be summed.
    """
    _check_dense(model)
    _check_hooks(model)
    over = _flat(mesh, axes) if options.fsdp == "all" else mesh[options.data or ""]
    policy = fsdp2.MixedPrecisionPolicy()
    if options.precision is not None:
        _check_real(model, options.precision)
        policy = fsdp2.MixedPrecisionPolicy(DTYPES[options.precision], torch.float32)
    # coordinates and times keep their digits up to where autocast casts them
    first = replace(policy, cast_forward_inputs=False)
    scalars = {p for p in model.parameters() if p.ndim == 0 and not isinstance(p, ShardTensor)}
    inside = [b for b in blocks_of(model, options.blocks) if b is not model]
    sharded = {p for p in model.parameters() if isinstance(p, ShardTensor)}
    # blocks in blocks first
    for block in (*reversed(inside), model):
        own = first if block is model else policy
        fsdp2.fully_shard(block, mesh=over, mp_policy=own, ignored_params=scalars | sharded)
        hold_for_graphs(block)
    # before FSDP2's own, and after it
    model.register_forward_pre_hook(_mend, prepend=True)
    model.register_forward_hook(_end)
    _watch()
    kept = _replicate(model, scalars, over)
    if options.fsdp == "all":
        slot = Part(domain)
        tensor = {n for a, n in enumerate(mesh.mesh_dim_names or ()) if a not in axes}
        for module in model.modules():
            if isinstance(module, fsdp2.FSDPModule):
                # after FSDP2's own hook, which puts whole parameters in place
                module.register_forward_pre_hook(lambda m, _: _mark(m, tensor, slot))
    return kept


def _check_dense(model: nn.Module) -> None:
    """Raise ValueError for embeddings whose gradients are sparse."""
    for name, module in model.named_modules():
        # not by its name, which a parametrization may make anew
        table = module._parameters.get("weight")
        if getattr(module, "sparse", None) is True and table is not None and table.requires_grad:
            raise ValueError(
                f"parallelize(fsdp=...): {name or 'the model'} ({type(module).__name__}) has "
                "sparse gradients, which FSDP2 does not sum; make it with sparse=False"
            )


def _check_real(model: nn.Module, precision: str) -> None:
    """Raise UnsupportedOpError for weights of which FSDP2 would gather the real part."""
    for name, p in model.named_parameters():
        if p.is_complex() and not isinstance(p, ShardTensor):
            raise UnsupportedOpError(
                f"parallelize(fsdp=..., precision={precision!r}): {name} is complex, and FSDP2 "
                f"gathers weights in {precision}: keep it as real numbers, and call "
                "torch.view_as_complex in forward, or leave precision out"
            )


def _check_hooks(model: nn.Module) -> None:
    """Raise ValueError for hooks on parameters that FSDP2 puts others in the place of."""
    for name, p in model.named_parameters():
        if not isinstance(p, ShardTensor) and (p._backward_hooks or p._post_accumulate_grad_hooks):
            raise ValueError(
                f"parallelize(fsdp=...): FSDP2 puts another parameter in the place of {name}, "
                "whose hooks would be lost: register them after parallelize"
            )


def _mend(model: nn.Module, _: Any) -> None:
    if is_broken_fsdp(model):
        # an optimizer that was made since holds the whole parameters of the pass that broke
        with replacing(model, "the next call of the FSDP2 model whose pass broke off"):
            mend_fsdp(model)
    drop_stale(model)


def _end(model: nn.Module, *_: Any) -> None:
    hooked = hooked_fsdp(model) if torch.is_grad_enabled() else ()
    if hooked:
        raise UnsupportedOpError(
            f"register_hook on {', '.join(hooked[:3])}, to whose shards FSDP2 brings gradients by "
            "itself: use register_post_accumulate_grad_hook, which gets the shard"
        )
    drop_whole(model)


@cache
def _watch() -> None:
    register_optimizer_step_post_hook(_reduced)


def _reduced(optimizer: Optimizer, *_: Any) -> None:
    """Raise ValueError where FSDP2 saw no backward of a parameter, which so was not stepped."""
    left = whole_gradients(p for group in optimizer.param_groups for p in group["params"])
    if left:
        raise ValueError(
            f"{type(optimizer).__name__} could not step {', '.join(left[:3])}: FSDP2 brings "
            "gradients to their shards where the result of a call of the model, or of a unit, "
            "leads to the loss, and a part of the model was called by itself. Call it in forward, "
            "or make it a unit: blocks=('ClassName',)"
        )


def _replicate(
    model: nn.Module, scalars: set[nn.Parameter], over: DeviceMesh
) -> list[nn.Parameter]:
    """Put DTensors on the mesh of FSDP2's parameters in the place of plain 0-dim ones.

    clip_grad_norm_ and fused optimizers take no mixture of the two.
    """
    others = (p for p in model.parameters() if p not in scalars)
    mesh = next((p.device_mesh for p in others if isinstance(p, dt.DTensor)), over)
    made = {}
    for p in scalars:
        whole = dt.DTensor.from_local(local(p.detach()), mesh, [dt.Replicate()] * mesh.ndim)
        made[p] = nn.Parameter(whole, p.requires_grad)
    for module in model.modules():
        for key, own in module._parameters.items():
            if own is not None and own in made:
                module._parameters[key] = made[own]
    return list(made.values())


def local(x: Tensor) -> Tensor:
    """This rank's part of a tensor, in its own memory."""
    return x.to_local() if isinstance(x, dt.DTensor) else x


def _mark(module: nn.Module, tensor: set[str], slot: Part) -> None:
    """Give the slot to the parameters that are gathered now; those of other units are not yet."""
    for p in module.parameters():
        if getattr(p, "_shardtensor_slot", None) is not None:
            # marked, or none of FSDP2's: another head, which `parallelize` has taken in
            continue
        if not isinstance(p, dt.DTensor) or tensor.issuperset(
            p.device_mesh.mesh_dim_names or ("",)
        ):
            p._shardtensor_slot = slot  # type: ignore[attr-defined]


def _flat(mesh: DeviceMesh, axes: tuple[int, ...]) -> DeviceMesh:
    if len(axes) < mesh.ndim:
        names = mesh.mesh_dim_names or ()
        mesh = mesh[tuple(names[a] for a in axes)]
    return mesh if mesh.ndim == 1 else mesh._flatten()
