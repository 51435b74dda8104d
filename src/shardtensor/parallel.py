"""`parallelize`: weights in sync and gradients of the whole model summed in a few messages."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from . import _torch, comm, fsdp
from .comm import groups, wire
from .compile import Compiled
from .errors import UnsupportedOpError
from .fsdp import local
from .meet import is_slice
from .options import Options

M = TypeVar("M", bound=nn.Module)
_reducers: WeakKeyDictionary[nn.Module, Reducer] = WeakKeyDictionary()


def parallelize(model: M, mesh: DeviceMesh, options: Options | None = None, **values: Any) -> M:
    """Prepare a model for training on samples that are sharded over a mesh; returns the model.

    options, or its fields by name: see `Options`. mesh: all ranks that train together. Samples
    differ along the axis `data`; inputs lie on the submesh of the other axes, and gradients are
    averaged over the data axis. Without it inputs lie on `mesh`, also where an axis shards the
    batch.

    Without fsdp, gradients of parameters are summed over the ranks in buckets, each sent as soon as
    backward has made its last gradient, while backward goes on. (Without this call every op sums
    its own weights' gradients before backward goes on; the numbers are the same but for the order
    of the sums.) Gradients are complete when backward() returns; a hook on a parameter sees this
    rank's part. torch.autograd.grad with respect to a parameter raises UnsupportedOpError.
    With fsdp, parameters become FSDP2's DTensors, and FSDP2 sums and averages.
    After `tensor_parallel` its axis takes no part in this: along it all ranks have the same
    gradients, or those of their own weights.

    Nothing else about the model changes: the keys of its state_dict and how it is called stay.
    `model.compile(**arguments)` compiles its local program (see `shardtensor.compile`).
    Raises ValueError for options that do not fit together, the mesh or the model.
    """
    groups.renew()
    options = _options(options, values)
    names = mesh.mesh_dim_names or ()
    if options.data is not None and options.data not in names:
        raise ValueError(f"data axis {options.data!r} is not one of the mesh's {names}")
    if any(isinstance(m, FSDPModule) for m in model.modules()):
        raise ValueError("fully_shard was applied already; parallelize does it with fsdp=...")
    tensor = _tensor_axes(model, mesh)
    if tensor and options.compile is not None:
        raise ValueError("compile and tensor_parallel: the compiled program takes whole parameters")
    axes = tuple(a for a in range(mesh.ndim) if a not in tensor)
    everyone = comm.group(mesh, axes)
    shared = tuple(a for a in axes if options.data is None or names[a] != options.data)
    domain = comm.group(mesh, shared)
    if options.sync:
        _check_same(model, everyone)
        state = [*(p.detach() for p in model.parameters()), *model.buffers()]
        plain = [t for t in state if not isinstance(t, DTensor)]
        synchronise(plain, comm.group(mesh, tuple(range(mesh.ndim))))
        synchronise((local(t) for t in state if isinstance(t, DTensor)), everyone)
    if model in _reducers:
        restore(model)
    adapt(model, options)
    if options.fsdp is not None:
        parameters = fsdp.shard(model, mesh, axes, domain, options)
    else:
        parameters = list(dict.fromkeys(model.parameters()))
    parameters = [p for p in parameters if p.requires_grad]
    copies = comm.size(everyone) // comm.size(domain)
    most = int(options.bucket_mb * 2**20)
    _reducers[model] = Reducer(parameters, domain, everyone, copies, most)
    if options.fsdp is not None:
        return model
    # past nn.Module's bookkeeping: it is no part of the model's state
    model.__dict__["compile"] = partial(_compile, model)
    if options.compile is not None:
        model.compile(**options.compile)
    return model


def _options(options: Options | None, values: dict[str, Any]) -> Options:
    if options is None:
        return Options.from_dict(values)
    return replace(options, **values) if values else options


def adapt(model: nn.Module, options: Options) -> None:
    """Checkpointing, offload and autocast, by hooks around forward."""
    if options.checkpoint:
        blocks = fsdp.blocks_of(model, options.blocks)
        if not blocks:
            raise ValueError("checkpoint: the model has no nn.ModuleList; name the blocks")
        for block in blocks:
            _torch.checkpointed(block)
    if options.offload:
        _around(model, lambda: torch.autograd.graph.save_on_cpu(pin_memory=False))
    if options.precision is not None and options.fsdp is None:
        dtype = fsdp.DTYPES[options.precision]
        device = next((p.device.type for p in model.parameters()), "cpu")
        _around(model, lambda: torch.autocast(device, dtype))


def _around(model: nn.Module, make: Callable[[], Any]) -> None:
    """Run the model's forward inside the context that make() gives."""
    entered: list[Any] = []

    def enter(_: nn.Module, __: Any) -> None:
        context = make()
        context.__enter__()
        entered.append(context)

    def leave(_: nn.Module, __: Any, out: Any) -> Any:
        entered.pop().__exit__(None, None, None)
        return out

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)


def restore(model: nn.Module) -> None:
    """Undo `parallelize`: every op sums its own weights' gradients again."""
    _reducers.pop(model).remove()
    model.__dict__.pop("compile", None)


def _compile(model: nn.Module, **options: Any) -> None:
    """As nn.Module.compile: the model's calls run compiled from now on."""
    model._compiled_call_impl = Compiled(model, options, call=model._call_impl)


def _tensor_axes(model: nn.Module, mesh: DeviceMesh) -> set[int]:
    """The axes of the mesh on which the model's DTensor parameters lie."""
    names = mesh.mesh_dim_names or ()
    found: set[int] = set()
    for p in model.parameters():
        if isinstance(p, DTensor):
            if not is_slice(p.device_mesh, mesh):
                raise ValueError(
                    f"a parameter lies on {p.device_mesh}, which is no slice of {mesh}: give "
                    "parallelize the mesh of all axes"
                )
            found.update(names.index(n) for n in p.device_mesh.mesh_dim_names or ())
    return found


def _check_same(model: nn.Module, group: str) -> None:
    """Raise ValueError on every rank unless all have parameters of the same names and shapes."""
    if comm.size(group) == 1:
        return
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    text = ", ".join(f"{k} {list(v.shape)} {v.dtype}" for k, v in state.items())
    device = next((v.device for v in state.values()), torch.device("cpu"))
    known = wire.all_gather_numbers([len(state), zlib.crc32(text.encode())], device, group)
    if any(k != known[0] for k in known):
        raise ValueError(
            f"parallelize: ranks have different models, of {[k[0] for k in known]} parameters and "
            "buffers, or of other names, shapes or dtypes; make the same model on every rank"
        )


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
        # the parameter's hook holds this, in C++, where Python finds no cycle to collect
        self._parameter = ref(parameter)
        self.group, self.reducer = group, reducer
        self.shape = local(parameter.detach()).shape
        self.nbytes = self.shape.numel() * parameter.element_size()
        self.touched = self.accumulated = False
        self.bucket: Bucket
        self.index = 0
        parameter._shardtensor_slot = self  # type: ignore[attr-defined]
        self.hook = parameter.register_post_accumulate_grad_hook(self.ready)

    @property
    def parameter(self) -> nn.Parameter:
        found = self._parameter()
        assert found is not None
        return found

    def add(self, part: Tensor) -> Tensor:
        """Note one more part of the gradient."""
        view = self.bucket.view(self)
        if self.touched:
            view.add_(part)
        else:
            view.copy_(part)
        self.touched = True
        self.reducer.queue()
        return part

    def __reduce__(self) -> Any:
        # a parameter is pickled with its attributes; the slot stays with this process
        return type(None), ()

    def grad(self) -> Tensor | None:
        """This rank's part of the parameter's .grad, which may be written to."""
        p, grad = self.parameter, self.parameter.grad
        if isinstance(p, DTensor) and isinstance(grad, DTensor) and grad.placements != p.placements:
            # ops of DTensors alone may leave addends
            p.grad = grad = grad.redistribute(placements=p.placements)
        return None if grad is None else local(grad)

    def ready(self, _: Any) -> None:
        """The parameter's .grad has all of this backward: parts, and what was whole already."""
        grad = self.grad()
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
            sizes = [s.shape.numel() for s in self.slots]
            self.flat = torch.zeros(sum(sizes), dtype=p.dtype, device=p.device)
            parts = self.flat.split(sizes)
            self.views = [v.view(s.shape) for v, s in zip(parts, self.slots, strict=True)]
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
        lengths = [v.numel() for v in self.views]
        self.work = wire.start_all_reduce(self.flat, "sum", self.reducer.everyone, lengths)

    def finish(self) -> None:
        """Wait, and give the parameters their gradients."""
        if not self.launched:
            return
        if self.work is not None:
            self.work()
        if self.reducer.copies > 1 and self.flat is not None:
            self.flat.div_(self.reducer.copies)
        for view, s in zip(self.views, self.slots, strict=True):
            grad = s.grad()
            if s.touched and grad is not None:
                grad.copy_(view)
            s.touched = s.accumulated = False
        self.work, self.launched = None, False
