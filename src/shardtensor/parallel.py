"""`parallelize`: weights in sync and gradients of the whole model summed in a few messages."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from . import _torch, comm
from .comm import groups, wire
from .comm.count import sending
from .compile import Compiled
from .errors import UnsupportedOpError

M = TypeVar("M", bound=nn.Module)
_reducers: WeakKeyDictionary[nn.Module, Reducer] = WeakKeyDictionary()


def parallelize(
    model: M,
    mesh: DeviceMesh,
    *,
    data: str | None = None,
    sync: bool = True,
    bucket_mb: float = 8.0,
) -> M:
    """Prepare a model for training on samples that are sharded over a mesh; returns the model.

    Weights and buffers become those of the mesh's first rank (sync). Gradients of parameters are
    summed over the ranks in buckets of `bucket_mb` MiB, each sent as soon as backward has made its
    last gradient, while backward goes on. Without this call every op sums its own weights'
    gradients before backward goes on; the numbers are the same but for the order of the sums.

    mesh: all ranks that train together. data: the name of a mesh axis along which samples differ;
    inputs then lie on the submesh of the other axes, and gradients are averaged over the data axis.
    Without it inputs lie on `mesh`, also where an axis shards the batch.

    Nothing else about the model changes: its class, its state_dict and how it is called. Gradients
    are complete when backward() returns; a hook on a parameter sees this rank's part.
    torch.autograd.grad with respect to a parameter raises UnsupportedOpError.
    `model.compile(**options)` compiles its local program (see `shardtensor.compile`).
    """
    names = mesh.mesh_dim_names or ()
    if data is not None and data not in names:
        raise ValueError(f"data axis {data!r} is not one of the mesh's {names}")
    axes = tuple(range(mesh.ndim))
    everyone = comm.group(mesh, axes)
    domain = comm.group(mesh, tuple(a for a in axes if data is None or names[a] != data))
    if sync:
        synchronise(_tensors(model), everyone)
    parameters = [p for p in dict.fromkeys(model.parameters()) if p.requires_grad]
    if model in _reducers:
        restore(model)
    copies = comm.size(everyone) // comm.size(domain)
    _reducers[model] = Reducer(parameters, domain, everyone, copies, int(bucket_mb * 2**20))
    # past nn.Module's bookkeeping: it is no part of the model's state
    model.__dict__["compile"] = partial(_compile, model)
    return model


def restore(model: nn.Module) -> None:
    """Undo `parallelize`: every op sums its own weights' gradients again."""
    _reducers.pop(model).remove()
    model.__dict__.pop("compile", None)


def _compile(model: nn.Module, **options: Any) -> None:
    """As nn.Module.compile: the model's calls run compiled from now on."""
    model._compiled_call_impl = Compiled(model, options, call=model._call_impl)


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from (p.detach() for p in model.parameters())
    yield from model.buffers()


@torch.no_grad()
def synchronise(tensors: Iterable[Tensor], group: str) -> None:
    """Copy tensors from the group's first rank to all, in one message per dtype and device."""
    if comm.size(group) == 1:
        return
    alike: dict[Any, list[Tensor]] = {}
    for t in tensors:
        alike.setdefault((t.dtype, t.device), []).append(t)
    for found in alike.values():
        flat = torch.cat([t.reshape(-1) for t in found])
        wire.broadcast(flat, group)
        for t, value in zip(found, flat.split([t.numel() for t in found]), strict=True):
            t.copy_(value.view(t.shape))


class Reducer:
    """Sums parameters' gradients over ranks, a bucket at a time, while backward runs.

    domain: ranks that share samples, whose parts are added up. everyone: those and their copies on
    other samples, over which the sum is averaged.
    """

    def __init__(
        self, parameters: list[nn.Parameter], domain: str, everyone: str, copies: int, most: int
    ) -> None:
        self.everyone, self.copies = everyone, copies
        # whole gradients count once in the sum over the domain
        self.first = comm.rank(domain) == 0
        self.queued = False
        self.slots: list[Slot] = []
        self.buckets: list[Bucket] = []
        if comm.size(everyone) == 1:
            return
        # backward makes the last parameters' gradients first
        for p in reversed(parameters):
            self.slots.append(Slot(p, domain, self))
        waiting: dict[Any, list[Slot]] = {}
        for slot in self.slots:
            key = (slot.parameter.dtype, slot.parameter.device)
            here = waiting.setdefault(key, [])
            here.append(slot)
            if sum(s.nbytes for s in here) >= most:
                self.buckets.append(Bucket(waiting.pop(key), self))
        self.buckets += [Bucket(slots, self) for slots in waiting.values()]

    def queue(self) -> None:
        """Have `finish` run at the end of this backward."""
        if not self.queued:
            self.queued = True
            _torch.at_end_of_backward(self.finish)

    def finish(self) -> None:
        """Complete all gradients."""
        self.queued = False
        lost = [s for s in self.slots if s.touched and not s.accumulated]
        if lost:
            for s in self.slots:
                s.touched = s.accumulated = False
            raise UnsupportedOpError(
                "torch.autograd.grad with respect to parameters of a parallelized model: call "
                "backward(), or shardtensor.parallel.restore(model) first"
            )
        for b in self.buckets:
            b.launch()
        for b in self.buckets:
            b.finish()

    def remove(self) -> None:
        """Forget the parameters."""
        for s in self.slots:
            s.hook.remove()
            del s.parameter._shardtensor_slot  # type: ignore[attr-defined]


class Slot:
    """One parameter's place in a bucket."""

    def __init__(self, parameter: nn.Parameter, group: str, reducer: Reducer) -> None:
        self.parameter, self.group, self.reducer = parameter, group, reducer
        self.nbytes = parameter.numel() * parameter.element_size()
        self.touched = self.accumulated = False
        self.bucket: Bucket
        self.index = 0
        parameter._shardtensor_slot = self  # type: ignore[attr-defined]
        self.hook = parameter.register_post_accumulate_grad_hook(self.ready)

    def add(self, part: Tensor) -> None:
        """Note one more part of the gradient."""
        view = self.bucket.view(self)
        if self.touched:
            view.add_(part)
        else:
            view.copy_(part)
        self.touched = True
        self.reducer.queue()

    def __reduce__(self) -> Any:
        # a parameter is pickled with its attributes; the slot stays with this process
        return type(None), ()

    def ready(self, _: Any) -> None:
        """The parameter's .grad has all of this backward: parts, and what was whole already."""
        grad = self.parameter.grad
        if grad is None or not (self.touched or self.reducer.copies > 1):
            return
        view = self.bucket.view(self)
        if self.reducer.first:
            view.copy_(grad)
        elif not self.touched:
            view.zero_()
        self.touched = self.accumulated = True
        self.reducer.queue()
        self.bucket.count()


class Bucket:
    """Parameters whose gradients travel in one message."""

    def __init__(self, slots: list[Slot], reducer: Reducer) -> None:
        self.slots, self.reducer = slots, reducer
        self.work: Any = None
        self.launched = False
        self.flat: Tensor | None = None
        self.views: list[Tensor] = []
        for i, s in enumerate(slots):
            s.bucket, s.index = self, i

    def view(self, slot: Slot) -> Tensor:
        """Where a slot's numbers lie; the memory is taken on first use."""
        if self.flat is None:
            p = self.slots[0].parameter
            sizes = [s.parameter.numel() for s in self.slots]
            self.flat = torch.zeros(sum(sizes), dtype=p.dtype, device=p.device)
            parts = self.flat.split(sizes)
            self.views = [v.view(s.parameter.shape) for v, s in zip(parts, self.slots, strict=True)]
        return self.views[slot.index]

    def count(self) -> None:
        """Launch once every slot is ready."""
        if all(s.accumulated for s in self.slots):
            self.launch()

    def launch(self) -> None:
        """Start the sum over ranks."""
        if self.launched or not any(s.touched for s in self.slots):
            return
        assert self.flat is not None
        for view, s in zip(self.views, self.slots, strict=True):
            if not s.touched:
                view.zero_()
        self.launched = True
        n = comm.size(self.reducer.everyone)
        nbytes = 2 * self.flat.numel() * self.flat.element_size() * (n - 1) // n
        with sending("all_reduce", nbytes, 2 * (n - 1), n):
            self.work = dist.all_reduce(
                self.flat, group=groups.resolve(self.reducer.everyone), async_op=True
            )

    def finish(self) -> None:
        """Wait, and give the parameters their gradients."""
        if not self.launched:
            return
        if self.work is not None:
            self.work.wait()
        if self.reducer.copies > 1 and self.flat is not None:
            self.flat.div_(self.reducer.copies)
        for view, s in zip(self.views, self.slots, strict=True):
            if s.touched and s.parameter.grad is not None:
                s.parameter.grad.copy_(view)
            s.touched = s.accumulated = False
        self.work, self.launched = None, False
