"""`parallelize`: weights in sync and gradients of the whole model summed in a few messages."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Collection, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .. import _torch, comm
from ..comm import groups, observers, together, wire
from ..compile.blocks import blocks_of
from ..compile.program import Compiled, compile_forward
from ..compile.program import compile as compile_blocks
from ..dispatch.axes import is_slice
from ..later import dt, fsdp2
from ..tensor import ShardTensor
from . import fsdp, made
from .around import around, left
from .fsdp import local
from .offload import offloaded
from .options import Options
from .parts import Ranks
from .reducer import Reducer
from .replaced import check_made, replacing
from .whole import is_sharded

M = TypeVar("M", bound=nn.Module)
_trained: WeakKeyDictionary[nn.Module, Trained] = WeakKeyDictionary()
_numbers = itertools.count()


def parallelize(
    model: M, mesh: DeviceMesh, options: Options | Mapping[str, Any] | None = None, **values: Any
) -> M:
    """Prepare a model for training on samples that are sharded over a mesh; returns the model.

    options, or its fields by name, also in a mapping: see `Options`. mesh: all ranks that train
    together. Samples differ along the axis `data`; inputs lie on the submesh of the other axes, and
    gradients are averaged over the data axis. Without it inputs lie on `mesh`, also where an axis
    shards the batch; a weight that meets a tensor on fewer axes raises ValueError.

    Without fsdp, gradients of parameters are summed over the ranks in buckets, each sent as soon as
    backward has made its last gradient, while backward goes on. (Without this call every op sums
    its own weights' gradients before backward goes on; the numbers are the same but for the order
    of the sums.) Whatever sees a parameter's gradient sees the sum and mean: hooks, on one rank
    only, too, torch.autograd.grad, second derivatives, DDP around the model, in it or beside it.
    Over the data axis, gradients of uses that meet no sharded tensor are averaged one by one, and
    so are those of tensors that stand for parameters in torch.func.functional_call.
    With fsdp, parameters become FSDP2's DTensors, and FSDP2 sums and averages.
    After `tensor_parallel` its axis takes no part in this: along it all ranks have the same
    gradients, or those of their own weights.

    Nothing else about the model changes: the keys of its state_dict and how it is called stay.
    Parameters that are ShardTensors stay as they are. New parameters, such as those of another
    head or of weight_norm, or of another dtype, are taken in at the next call of the model. An
    optimizer that was made before its parameters were replaced (fsdp) raises ValueError at its
    step.
    `model.compile(**arguments)` compiles its local program (see `shardtensor.compile`).
    Raises ValueError for options that do not fit together, the mesh or the model.
    """
    groups.renew()
    options = Options.of(options, values)
    check_made(model, "parallelize")
    observers.claim(model.parameters())
    names = mesh.mesh_dim_names or ()
    if options.data is not None and options.data not in names:
        raise ValueError(f"data axis {options.data!r} is not one of the mesh's {names}")
    if is_sharded(model):
        raise ValueError("fully_shard was applied already; parallelize does it with fsdp=...")
    tensor = _tensor_axes(model, mesh)
    axes = tuple(a for a in range(mesh.ndim) if a not in tensor)
    everyone = comm.group(mesh, axes)
    shared = tuple(a for a in axes if options.data is None or names[a] != options.data)
    domain = comm.group(mesh, shared)
    if model in _trained:
        restore(model)
    data = comm.group(mesh, tuple(a for a in axes if a not in shared))
    reducer = Reducer(Ranks(domain, data, everyone), int(options.bucket_mb * 2**20))
    everybody = comm.group(mesh, tuple(range(mesh.ndim)))
    trained = Trained(reducer, everybody if options.sync else None)
    if options.sync:
        _check_same(model, everyone)
        trained.synchronise(model)
    adapt(model, options)
    _trained[model] = trained
    # past nn.Module's bookkeeping: these are no part of the model's state
    model.__dict__["_shardtensor_origin"] = Origin(trained, reducer.ranks.copies)
    together.begin_model(options.fsdp is not None)
    if options.fsdp is not None:
        with replacing(model, "parallelize(fsdp=...)"):
            trained.leave(model, fsdp.shard(model, mesh, axes, domain, options))
    trained.take(model)
    trained.handle = model.register_forward_pre_hook(_take_new, prepend=True)
    model.__dict__["compile"] = partial(_compile, model)
    if options.compile is not None:
        model.compile(**options.compile)
    return model


def adapt(model: nn.Module, options: Options) -> None:
    """Checkpointing, offload and autocast, by hooks around forward."""
    if options.checkpoint:
        blocks = blocks_of(model, options.blocks)
        if not blocks:
            raise ValueError("checkpoint: the model has no nn.ModuleList; name the blocks")
        for block in blocks:
            _torch.checkpointed(block)
    if options.offload:
        around(model, lambda *_: offloaded())
    if options.precision is not None:
        dtype = fsdp.DTYPES[options.precision]
        device = next((p.device.type for p in model.parameters()), "cpu")
        around(model, lambda *_: torch.autocast(device, dtype))
    if options.made_mb is not None:
        least = options.made_mb * 2**20
        around(model, lambda *given: made.around(given, least))


def restore(model: nn.Module) -> None:
    """Undo `parallelize`: every op sums its own weights' gradients again."""
    trained = _trained.pop(model)
    trained.reducer.remove()
    if trained.handle is not None:
        trained.handle.remove()
    model.__dict__.pop("compile", None)
    model.__dict__.pop("_shardtensor_origin", None)


def _compile(model: nn.Module, *, blocks: Iterable[str] | None = None, **options: Any) -> None:
    """As nn.Module.compile: the model's calls run compiled from now on, or those of its blocks.

    Under FSDP2 those of its units without other units in them, inside of FSDP2's hooks.
    """
    units = [m for m in model.modules() if isinstance(m, fsdp2.FSDPModule)]
    if units:
        if blocks is not None:
            raise ValueError("compile of blocks under fsdp: its units are compiled, leave them out")
        inner = [m for m in units if sum(isinstance(x, fsdp2.FSDPModule) for x in m.modules()) == 1]
        compile_forward(inner, options)
    elif blocks is not None:
        compile_blocks(model, blocks=blocks, **options)
    else:
        model._compiled_call_impl = left(Compiled(model, options, call=model._call_impl))


def _tensor_axes(model: nn.Module, mesh: DeviceMesh) -> set[int]:
    """The axes of the mesh on which the model's DTensor parameters lie."""
    names = mesh.mesh_dim_names or ()
    found: set[int] = set()
    for p in model.parameters():
        if isinstance(p, dt.DTensor):
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


class Marks(set[int]):
    """An attribute of parameters and buffers: the numbers of those who have taken them in.

    A weak reference would keep `model.float()` from putting other memory into a DTensor. What it
    puts there loses the attribute and its hooks, and is taken in again.
    """

    def __reduce__(self) -> Any:
        # a tensor is pickled with its attributes
        return type(None), ()


class Trained:
    """What `parallelize` keeps of a model: what has been synchronised and is summed.

    everybody: the group whose first rank's weights count, None if each rank's own do.
    """

    def __init__(self, reducer: Reducer, everybody: str | None) -> None:
        self.reducer, self.everybody = reducer, everybody
        self.number = next(_numbers)
        self.handle: Any = None
        # FSDP2 sums these, and puts others in their place while the model runs
        self.left: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()

    def leave(self, model: nn.Module, but: Iterable[Tensor]) -> None:
        """Take in none of the parameters that the model has now, but for some."""
        kept = {id(p) for p in but}
        for module in model.modules():
            self.left[module] = {
                k for k, p in module._parameters.items() if p is not None and id(p) not in kept
            }

    def parameters(self, model: nn.Module) -> Iterable[Tensor]:
        """The model's parameters whose gradients are this one's to sum."""
        for module in model.modules():
            left = self.left.get(module, ())
            yield from (p for k, p in module._parameters.items() if p is not None and k not in left)

    def knows(self, x: Tensor) -> bool:
        """Whether a parameter or buffer has been taken in."""
        return self.number in (getattr(x, "_shardtensor_known", None) or ())

    def new(self, tensors: Iterable[Tensor]) -> list[Any]:
        """Those that were not there before; a ShardTensor is left alone."""
        found = dict.fromkeys(t for t in tensors if not isinstance(t, ShardTensor))
        return [t for t in found if not self.knows(t)]

    def changed(self, model: nn.Module) -> bool:
        """Whether the model has a parameter that was not there before."""
        seen, waiting, ranks = {id(model)}, [model], self.reducer.ranks
        lefts: Mapping[nn.Module, Collection[str]] = self.left if len(self.left) else {}
        while waiting:
            module = waiting.pop()
            left = lefts.get(module, ()) if lefts else ()
            for key, p in module._parameters.items():
                if p is None:
                    continue
                slot = getattr(p, "_shardtensor_slot", None)
                if getattr(slot, "ranks", None) is ranks or key in left:
                    continue
                # others than Parameters are there for one call (torch.func.functional_call)
                if isinstance(p, nn.Parameter) and not self.knows(p):
                    return True
            for child in module._modules.values():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    waiting.append(child)
        return False

    def synchronise(self, model: nn.Module) -> None:
        """Give all ranks the first one's parameters and buffers, if they are new."""
        if self.everybody is None:
            return
        state = [*self.new((*self.parameters(model), *model.buffers()))]
        plain = [t for t in state if not isinstance(t, dt.DTensor)]
        synchronise(plain, self.everybody)
        synchronise(
            (local(t) for t in state if isinstance(t, dt.DTensor)), self.reducer.ranks.everyone
        )

    def take(self, model: nn.Module) -> None:
        """Sum the gradients of new parameters."""
        self.reducer.take(self.new(self.parameters(model)))
        for x in (*self.parameters(model), *model.buffers()):
            marks = getattr(x, "_shardtensor_known", None) or Marks()
            x._shardtensor_known = marks  # type: ignore[attr-defined]
            marks.add(self.number)


class Origin:
    """By what copies of a model know how it was parallelized; None in another process."""

    def __init__(self, trained: Trained | None, copies: int) -> None:
        self.trained, self.copies = trained, copies

    def __deepcopy__(self, _: Any) -> Origin:
        return self

    def __reduce__(self) -> Any:
        return Origin, (None, self.copies)


def _copied(model: nn.Module) -> None:
    """Let a copy of a parallelized model that is about to train do so as its original.

    Nothing is sent: weights of copies are alike where the original's were.
    """
    origin = model.__dict__.get("_shardtensor_origin")
    if origin is None or not torch.is_grad_enabled():
        return
    if origin.trained is None:
        if origin.copies > 1 and any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "this model was saved whole after parallelize(data=...), and the ranks over which "
                "its gradients were averaged are gone: call parallelize again"
            )
        return
    first = origin.trained
    trained = Trained(Reducer(first.reducer.ranks, first.reducer.most), first.everybody)
    trained.take(model)
    _trained[model] = trained


def _take_new(model: nn.Module, _: Any) -> None:
    """Before forward: what is new in the model, such as another head, trains as the rest.

    Looked for in the modules themselves: code may write into their dicts, which calls no hook.
    """
    trained = _trained.get(model)
    if trained is None and not _torch.is_tracing():
        _copied(model)
        return
    if trained is None or _torch.is_tracing() or not trained.changed(model):
        return
    check_made(model, "parallelize")
    trained.synchronise(model)
    trained.take(model)


@torch.no_grad()
def synchronise(tensors: Iterable[Tensor], group: str, source: int = 0) -> None:
    """Copy tensors from one of the group's ranks to all, in one message per dtype and device."""
    if comm.size(group) == 1:
        return
    alike: dict[Any, list[Tensor]] = {}
    for t in itertools.chain.from_iterable(_dense(x, group) for x in tensors):
        alike.setdefault((t.dtype, t.device), []).append(t)
    for found in alike.values():
        flat = torch.cat([t.reshape(-1) for t in found])
        wire.broadcast(flat, group, source)
        for t, value in zip(found, flat.split([t.numel() for t in found]), strict=True):
            t.copy_(value.view(t.shape))


def _dense(t: Tensor, group: str) -> list[Tensor]:
    """The tensors that a tensor is made of: indices and values of a sparse one."""
    if t.layout is torch.sparse_coo:
        parts = [t._indices(), t._values()]
    elif t.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [t.crow_indices(), t.col_indices(), t.values()]
    elif t.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [t.ccol_indices(), t.row_indices(), t.values()]
    else:
        return [t]
    # the first rank's entries may be twice at a place
    sums = t.layout is torch.sparse_coo and not t.is_coalesced()
    mine = [parts[-1].numel(), int(sums)]
    entries, summed = zip(*wire.all_gather_numbers(mine, t.device, group), strict=True)
    if len(set(entries)) > 1:
        raise ValueError(
            f"parallelize: ranks have {list(entries)} numbers in a sparse tensor of "
            f"{tuple(t.shape)}; make it of the same places on all of them"
        )
    if any(summed):
        t._coalesced_(False)
    return parts
