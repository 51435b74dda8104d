"""A rank's part of what a task is given, without memory but for values that are told."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..._torch import probe
from ...later import dt
from ...spec import Spec
from ...tensor import wrap
from ..task import Task
from ..trees import dims_like
from ..way import Layout
from .known import Known

Like = Callable[[Sequence[int], Sequence[int], Sequence[int]], tuple[int, ...] | None]


def inputs_of(
    task: Task, layout: Layout, domain: DeviceMesh | None, known: Known, like: Like = dims_like
) -> list[Tensor]:
    """This rank's part of each input: sharded where its dims are `like` those of the first one."""
    return [_input(task, layout, domain, i, known, like) for i in range(len(task.shapes))]


def same_dims(
    shape: Sequence[int], first: Sequence[int], dims: Sequence[int]
) -> tuple[int, ...] | None:
    """The dims where the sizes are those of the first input, as `tiled` cuts inputs."""
    alike = all(d < len(shape) and shape[d] == first[d] for d in dims)
    return tuple(dims) if alike else None


def _input(
    task: Task, layout: Layout, domain: DeviceMesh | None, i: int, known: Known, like: Like
) -> Tensor:
    first, shape = task.shapes[0], list(task.shapes[i])
    given = task.values[i]
    # the first dim of a mask (H, W) is not that of samples, though there be H of them
    rows = 0 not in task.dims and 0 in (dims_like(shape, first, task.dims) or ())
    if shape and first and shape[0] == first[0] and layout.data > 1 and not rows:
        shape[0] //= layout.data
        given = _narrowed(given, 0, 0, shape[0])
    dims = like(task.shapes[i], first, layout.dims)
    spec = None
    if domain is not None and dims is not None:
        sizes = {
            e: layout.cut(first)[d]
            for d, e, _ in zip(layout.dims, dims, layout.sizes, strict=False)
        }
        spec = Spec.of(domain, [dt.Shard(d) for d in dims], shape, sizes)
        shape = list(spec.local_shape)
        for d in dims:
            given = _narrowed(given, d, spec.dims[d].offsets[spec.index[d]], shape[d])
    if given is None:
        x = torch.empty(shape, dtype=task.dtypes[i])
        known.forget(x)
    else:
        x = known.fake(given)
    return x if spec is None else wrap(x, spec)


def _narrowed(x: Tensor | None, dim: int, start: int, length: int) -> Tensor | None:
    """A part of an input's values; a view would count as all that it is of."""
    if x is None or probe.is_fake(x):
        return None if x is None else x.narrow(dim, start, length)
    with probe.outside_fake():
        return x.narrow(dim, start, length).clone()
