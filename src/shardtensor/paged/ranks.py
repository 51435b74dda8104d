"""Simulated ranks of one memory, with copies of one model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from .. import _torch
from ..errors import UnsupportedOpError
from ..ranks.own import random_states, restore
from ..ranks.simulate import Turns, World
from ..ranks.testing import make_mesh
from ..settings import bringing, setting
from ..tensor import ShardTensor, layout
from ..tensor.random import match_single_device
from ..tensor.redistribute import reduced
from ..train.parallelize import parallelize
from .pager import Paged, Pager, Settled


class Ranks:
    """Ranks of a world that share a pager and the parameters' memory.

    sums: whether they add up gradients of parameters themselves.
    """

    sums = True

    def __init__(self, model: nn.Module, parts: tuple[int, ...], pager: Pager) -> None:
        self.model, self.parts, self.pager = model, parts, pager
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.versions = {name: version(p) for name, p in model.named_parameters()}
        self.grad = torch.is_grad_enabled()
        self.random: Any = None
        # what is done to what the caller has, once no rank has raised
        self.after: list[Callable[[], Any]] = []
        device, n = pager.shelf.device, prod(parts)
        modes = _modes_of_caller(device)

        def rank() -> None:
            with ExitStack() as stack:
                for make in modes:
                    stack.enter_context(make())
                stack.enter_context(_torch.not_tracing())
                stack.enter_context(Settled(pager))
                stack.enter_context(Paged(pager))
                if device.type == "cpu":
                    stack.enter_context(match_single_device())
                stack.enter_context(setting("paged", True))
                mesh = self.mesh()
                mine = replica(model)
                if self.parallelized:
                    parallelize(mine, mesh, sync=False)
                self.on_rank(mine, mesh)

        self.world = World(n, bringing(rank), (), _Latest(n, pager))

    @property
    def parallelized(self) -> bool:
        """Whether a rank's gradients of parameters are summed in buckets."""
        return bool(self.sums and self.grad and self.parameters)

    def mesh(self) -> DeviceMesh:
        """What a rank's tensors lie on."""
        return make_mesh(self.parts, self.pager.shelf.device.type)

    def on_rank(self, model: nn.Module, mesh: DeviceMesh) -> None:
        """What a rank does with its copy of the model."""
        raise NotImplementedError

    def unwritten(self) -> None:
        """Raises on a rank if it wrote to a parameter, which all ranks have in common."""
        for name, p in self.model.named_parameters():
            if version(p) != self.versions[name]:
                raise UnsupportedOpError(
                    f"tiled: the model writes to its parameter {name}, which all parts share: "
                    "register it as a buffer, or do so outside of the call"
                )

    def go_on(self) -> None:
        """Run all ranks until they end, or leave to wait for what is outside."""
        try:
            self.world.go_on()
            with torch.no_grad(), Paged(self.pager):
                while self.after:
                    self.after.pop(0)()
        finally:
            if self.world.ended:
                self.pager.close()
        if self.random is not None:
            # as the plain call leaves it
            restore(self.random)
            self.random = None

    def ended_forward(self, model: nn.Module, first: bool) -> None:
        """What the plain call leaves behind, beside its outputs: of a cut buffer a rank's rows."""
        mine = dict(model.named_buffers())
        with torch.no_grad():
            for name, b in self.model.named_buffers():
                y = mine.get(name)
                if y is None or y.shape != b.shape:
                    continue
                if isinstance(y, ShardTensor):
                    y = reduced(y)
                    self.after.append(partial(b[y._spec.block].copy_, y._local))
                elif first:
                    self.after.append(partial(b.copy_, y))
        if not first:
            return
        self.random = random_states()
        for ours, theirs in zip(self.model.modules(), model.modules(), strict=True):
            self.advance(*([vars(m).get(name) for name in vars(ours)] for m in (ours, theirs)))

    def advance(self, ours: Iterable[Any], theirs: Iterable[Any]) -> None:
        """Leave generators of the caller's as a part left its own copies."""
        for x, y in zip(ours, theirs, strict=True):
            if isinstance(x, torch.Generator):
                self.after.append(partial(x.set_state, y.get_state()))

    def gradients(self, model: nn.Module) -> list[Tensor | None]:
        """Of the model's trained parameters, in memory of their own."""
        found = [p.grad for p in model.parameters() if p.requires_grad]
        return [None if g is None else kept(g) for g in found]


class _Latest(Turns):
    """Ranks of one memory: that which stopped last goes on first, as most of it is there still."""

    def __init__(self, world_size: int, pager: Pager) -> None:
        super().__init__(world_size)
        self.pager = pager
        self.stopped = list(range(world_size))[::-1]

    def order(self, rank: int) -> Iterable[int]:
        self.stopped.remove(rank)
        self.stopped.append(rank)
        return [*self.stopped[-2::-1], rank]

    def wait(self, rank: int, ready: Callable[[], bool], what: Any) -> None:
        super().wait(rank, ready, what)
        self.pager.resume(rank)

    def work(self, collective: Any, datas: list[Any]) -> None:
        with Paged(self.pager):
            collective.work(datas)


class _Shared(TorchFunctionMode):
    """Inside, copy.deepcopy refuses tensors whose gradients would be those of a copy.

    copied: whether others are copied, or the same in what is copied.
    """

    def __init__(self, copied: bool) -> None:
        super().__init__()
        self.copied = copied

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.__deepcopy__:
            if args[0].requires_grad and torch.is_grad_enabled():
                raise UnsupportedOpError(
                    f"tiled: a tensor of shape {list(args[0].shape)} requires gradients, and is no "
                    "parameter, nor given as one, in a list, tuple or dict: each part has a copy"
                )
            if not self.copied:
                return args[0]
        return func(*args, **(kwargs or {}))


def own(x: Any) -> Any:
    """A part's own copy of an object that is given: what it changes is not another's.

    Tensors in it are the same. Raises UnsupportedOpError for iterators that cannot be copied.
    """
    try:
        with _Shared(copied=False):
            return copy.deepcopy(x)
    except (TypeError, copy.Error):
        if isinstance(x, Iterator):
            raise UnsupportedOpError(
                f"tiled: the first part would use up a {type(x).__name__}: give a list"
            ) from None
        return x


def alike(x: Any, lead: Tensor, dims: Sequence[int]) -> bool:
    """Whether x is a tensor that is cut as the lead is: on its device, as long in these dims."""
    return (
        isinstance(x, Tensor)
        and x.device == lead.device
        and all(d < x.ndim and x.shape[d] == lead.shape[d] for d in dims)
    )


def state(x: Tensor) -> tuple[int, int]:
    """What differs once a rank has written to its part."""
    local = x._local if isinstance(x, ShardTensor) else x
    return id(local), version(local)


def version(x: Tensor) -> int:
    """What grows when a tensor is written to."""
    return 0 if x.is_inference() else x._version


def lies(y: ShardTensor) -> tuple[int, ...]:
    """The strides of a new tensor like y."""
    own = layout.stride(y)
    return own if layout.is_dense(y.shape, own) else layout.dense(y.shape)


@torch.no_grad()
def kept(x: Tensor) -> Tensor:
    """The values of x in memory that the pager does not know."""
    with _torch.outside_modes():
        made = torch.empty_like(x)
    return made.copy_(x)


def _modes_of_caller(device: torch.device) -> list[Callable[[], AbstractContextManager[Any]]]:
    """What makes this thread's autograd and autocast in another one."""
    inference, grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    default, cached = torch.get_default_device(), torch.is_autocast_cache_enabled()
    casts = [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in {"cpu", device.type}
    ]
    modes: list[Callable[[], AbstractContextManager[Any]]] = [
        lambda: torch.inference_mode(inference),
        # which the one above enables: backward of a rank runs in its own thread, as that of the
        # device waits for it
        lambda: torch.autograd.set_multithreading_enabled(False),
        lambda: torch.set_grad_enabled(grad),
    ]
    for kind, on, dtype in casts:
        modes.append(partial(torch.autocast, kind, dtype, on, cached))
    if default.type != "cpu":
        modes.append(lambda: default)
    if device.type == "cuda":
        modes.append(partial(torch.cuda.stream, torch.cuda.current_stream(device)))
    return modes


def replica(model: nn.Module) -> nn.Module:
    """The model on the same parameters' memory, with gradients, buffers and state of its own."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()
    }
    with _Shared(copied=True):
        return copy.deepcopy(model, memo)
