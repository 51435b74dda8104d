"""Stages of torch.distributed.pipelining that pass each other shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.utils import _pytree as pytree

from ..errors import UnsupportedOpError
from ..later import dt
from ..spec import Spec
from ..tensor import ShardTensor
from ..tensor.redistribute import reduced
from ..tensor.shard_tensor import wrap


class Told(NamedTuple):
    """What a stage tells the next of a tensor that it passes on. placements: None if plain."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    grad: bool
    placements: tuple[dt.Placement, ...] | None
    sizes: dict[int, tuple[int, ...]]


def pipeline_stage(
    module: nn.Module,
    mesh: DeviceMesh,
    example: Tensor | Sequence[Tensor] | None = None,
    *,
    pipe: str = "pipe",
    index: int | None = None,
    num_stages: int | None = None,
) -> PipelineStage:
    """A stage of `torch.distributed.pipelining` that runs a module on ShardTensors.

        mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("pipe", "domain"))
        stage = pipeline_stage(part, mesh, x[:1] if first else None)
        schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=F.mse_loss)
        schedule.step(x) if first else schedule.step(target=y, losses=losses)

    module: that of this rank's stage; `parallelize(module, mesh["domain"])` sums its gradients in
    few messages. mesh: all ranks; those of the axis `pipe` run one stage after the other, the
    others share a sample. example: the inputs of a microbatch, on the first stage: ShardTensors on
    the mesh without `pipe`, or plain tensors that are alike on it. index, num_stages: where a rank
    has several stages (interleaved schedules), which it makes in their order, as stage i is on rank
    i modulo the size of `pipe`; default: one stage a rank.

    Between stages each rank sends its shards to the rank with its own place in the domain, in
    backward their gradients, and nothing else. The last stage gives ShardTensors to the loss and
    to the caller. Every microbatch has the example's shapes and cuts. To learn what passes, the
    module runs once, forward, on random numbers; its buffers and the random state are put
    back, and each rank tells the next stage's shapes.
    All ranks call this. Raises ValueError for a mesh without `pipe`, for an example elsewhere than
    on the first stage, and where a stage is another rank's; in a step UnsupportedOpError where what
    a stage passes on has another shape or cut than in the example, or is no tensor.
    """
    names = mesh.mesh_dim_names or ()
    if pipe not in names or len(names) < 2:
        raise ValueError(f"the mesh's axes are {names}: {pipe!r} and at least one more are needed")
    ranks, here, group = mesh[pipe].size(), mesh.get_local_rank(pipe), mesh.get_group(pipe)
    domain = mesh[tuple(n for n in names if n != pipe)]
    index = here if index is None else index
    num_stages = ranks if num_stages is None else num_stages
    if index % ranks != here:
        raise ValueError(f"stage {index} is that of rank {index % ranks} of {pipe!r}, not {here}")
    if (example is None) == (index == 0):
        raise ValueError(f"stage {index}: the first stage needs an example, others take none")
    if example is None:
        box: list[Any] = [None]
        dist.recv_object_list(box, group=group, group_src=(index - 1) % ranks)
        given = [_random(told, domain) for told in box[0]]
    else:
        given = [example] if isinstance(example, Tensor) else list(example)
    last = index == num_stages - 1
    passing = Passing(module, [_spec(x) for x in given], index > 0, last)
    outputs = _tried(passing, given)
    if not last:
        passing.gives = [_spec(y) for y in outputs]
        told = [_told(y) for y in outputs]
        dist.send_object_list([told], group=group, group_dst=(index + 1) % ranks)
        outputs = [_passed(y) for y in outputs]
    arriving = [_passed(x) for x in given] if index > 0 else given
    return PipelineStage(
        passing, index, num_stages, arriving[0].device,
        input_args=tuple(arriving), output_args=tuple(outputs), group=group,
    )  # fmt: skip


class Passing(nn.Module):
    """A stage's module, on shards that arrive as plain local tensors and leave as such.

    takes, gives: the specs of what it takes and gives; None: a plain tensor.
    """

    def __init__(
        self, module: nn.Module, takes: list[Spec | None], wraps: bool, last: bool
    ) -> None:
        super().__init__()
        self.module, self.takes, self.wraps, self.last = module, takes, wraps, last
        self.gives: list[Spec | None] = []

    def forward(self, *given: Tensor, **kwargs: Any) -> Any:
        if self.wraps:
            pairs = zip(given, self.takes, strict=True)
            given = tuple(x if spec is None else wrap(x, spec) for x, spec in pairs)
        out = pytree.tree_map(reduced, self.module(*given, **kwargs))
        if self.last:
            return out
        passed = _tensors(out)
        if [_spec(y) for y in passed] != self.gives:
            raise UnsupportedOpError(
                f"a stage gives {[_spec(y) for y in passed]}, where its example gave {self.gives}: "
                "microbatches of one shape, cut alike, are needed"
            )
        return tuple(map(_local, passed))


def _tried(passing: Passing, given: list[Tensor]) -> list[Tensor]:
    """What the module gives for these; its buffers and the random state are left as they were."""
    module = passing.module
    kept = [(b, b.clone()) for b in module.buffers()]
    with torch.random.fork_rng(), torch.enable_grad():
        out = pytree.tree_map(reduced, module(*given))
    with torch.no_grad():
        for b, before in kept:
            b.copy_(before)
    found = _tensors(out) if not passing.last else pytree.tree_leaves(out)
    return [y.detach().requires_grad_(y.requires_grad) for y in found if isinstance(y, Tensor)]


def _tensors(out: Any) -> list[Tensor]:
    """The tensors that a stage passes on: one, or a sequence of them."""
    found = list(out) if isinstance(out, tuple | list) else [out]
    if not all(isinstance(y, Tensor) for y in found):
        kinds = [type(y).__name__ for y in found]
        raise UnsupportedOpError(f"a stage passes on tensors, one or a tuple of them, not {kinds}")
    return found


def _spec(x: Tensor) -> Spec | None:
    return x._spec if isinstance(x, ShardTensor) else None


def _local(x: Tensor) -> Tensor:
    # what is sent has to be contiguous
    return (x.to_local() if isinstance(x, ShardTensor) else x).contiguous()


def _passed(x: Tensor) -> Tensor:
    """An example of what passes for this rank's part of x."""
    return _local(x).detach().requires_grad_(x.requires_grad)


def _told(x: Tensor) -> Told:
    if not isinstance(x, ShardTensor):
        return Told(tuple(x.shape), x.dtype, x.requires_grad, None, {})
    return Told(tuple(x.shape), x.dtype, x.requires_grad, tuple(x.placements), x._spec.sizes)


def _random(told: Told, domain: DeviceMesh) -> Tensor:
    """A tensor like that which was told of."""
    spec = None
    if told.placements is not None:
        spec = Spec.of(domain, told.placements, told.shape, told.sizes)
    shape = told.shape if spec is None else spec.local_shape
    made = torch.zeros(shape, dtype=told.dtype, device=torch.device(domain.device_type))
    if made.is_floating_point():
        made.uniform_()
    return (made if spec is None else wrap(made, spec)).requires_grad_(told.grad)
