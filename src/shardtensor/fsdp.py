"""FSDP2 under domain parallelism: parameters sharded over data, or over data and domain.

Over "data", FSDP2 averages over ranks that hold the same part of different samples, and each op
sums its weights' gradients over the domain. Over "all", ops sum nothing: FSDP2's own mean over all
ranks is the sum over the domain and the mean over data, if what a rank computed from its part of a
sample counts as often as there are parts. Gradients that are whole on every rank count once anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from . import comm
from .options import Options

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Part:
    """The slot of a parameter of FSDP2: a part of the gradient, weighted for a mean over all."""

    def __init__(self, group: str) -> None:
        self.group, self.parts = group, comm.size(group)

    def add(self, part: Tensor) -> Tensor:
        return part * self.parts

    def __reduce__(self) -> Any:
        return type(None), ()


def shard(model: nn.Module, mesh: DeviceMesh, domain: str, options: Options) -> None:
    """Apply `fully_shard` to the blocks of the model and to the model.

    domain: the group of ranks that share samples.
    """
    over = _flat(mesh) if options.fsdp == "all" else mesh[options.data or ""]
    policy = MixedPrecisionPolicy()
    if options.precision is not None:
        policy = MixedPrecisionPolicy(DTYPES[options.precision], torch.float32)
    for block in (*blocks_of(model, options.blocks), model):
        fully_shard(block, mesh=over, mp_policy=policy)
    if options.fsdp == "all":
        slot = Part(domain)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # after FSDP2's own hook, which puts whole parameters in place
                module.register_forward_pre_hook(lambda m, _: _mark(m, slot))


def _mark(module: nn.Module, slot: Part) -> None:
    for p in module.parameters():
        if not isinstance(p, DTensor):
            p._shardtensor_slot = slot  # type: ignore[attr-defined]


def _flat(mesh: DeviceMesh) -> DeviceMesh:
    return mesh if mesh.ndim == 1 else mesh._flatten()


def blocks_of(model: nn.Module, names: tuple[str, ...]) -> list[nn.Module]:
    """The modules of these classes; without names the elements of every outermost ModuleList.

    Raises ValueError where a name is no module's class.
    """
    if not names:
        found, inside = list[nn.Module](), set[nn.Module]()
        for module in model.modules():
            if isinstance(module, nn.ModuleList) and module not in inside:
                found += module
                inside.update(module.modules())
        return found
    found = [m for m in model.modules() if type(m).__name__ in names]
    missing = set(names) - {type(m).__name__ for m in found}
    if missing:
        raise ValueError(f"the model has no module of class {', '.join(sorted(missing))}")
    return found
