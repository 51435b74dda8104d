"""`tiled`: a model on a sample whose activations do not fit, exactly, on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .. import _torch, containers
from ..errors import UnsupportedOpError
from ..later import dt
from ..tensor import ShardTensor
from .alone import without_meeting
from .call import Call, OneCall, Session, end_left
from .files import Files
from .pager import Pager, Paging
from .pinned import Pinned
from .ranks import Ranks
from .shelf import Shelf
from .streams import Streams
from .within import Calls

T = TypeVar("T")


def tiled(
    model: nn.Module,
    parts: int | Sequence[int],
    dim: int | Sequence[int],
    *,
    memory: int,
    spill: str | Path,
) -> Tiled:
    """The model, called as before, on inputs whose activations need more memory than there is.

    Inputs are cut into `parts` along `dim` (or along several dims), the ranks of a simulated world
    which run one after another up to where they meet, and exchange halos, keys or statistics there
    as on as many devices. What they hold, and what is kept for backward, lies in files beyond
    `memory` bytes: so values and gradients are those of the plain call, unlike those of tiles that
    are blended, dropout, too.

        predict = st.tiled(model, 16, dim=2, memory=2**30, spill="/scratch")
        loss = F.mse_loss(predict(x), y)
        loss.backward()        # gradients of model.parameters(), as after model(x)

    parts: how many; each should fit several times into memory. dim: of the first tensor that is
    given, as those that have it in the same size are cut; the others are given whole. memory:
    bytes of the ranks' tensors of 64 KiB or more that stay in memory together; beside them are
    weights, inputs and outputs, and what an op needs while it runs. spill: a folder on a disk, not
    in memory (tmpfs); what is there has no name and goes with the process. Tensors of a GPU go to
    pinned memory of the host first, `memory` bytes of it; with spill="cpu" all of them stay there.

    `run` gives a step the sharded model itself, for inputs and outputs in files. Python state that
    forward changes, and new buffers, stay with the ranks' copies of the model; buffers come back.
    Raises ValueError for arguments that do not fit, UnsupportedOpError for tensors of other devices
    than CPUs and CUDA GPUs, for folders on other systems than Linux, and inside of torch.func, and
    what `simulate` raises for errors of the model: then buffers, generators, inputs and gradients
    are as they were, so that it can be called again. A second derivative raises RuntimeError.
    """
    return Tiled(model, parts, dim, memory, spill)


class Tiled:
    """A model that `tiled` runs in parts. paging: what the last call has moved (see `Paging`).

    halo: the rows of the input that each of its parts had on either side of its own in each dim,
    where they did not meet, else None; of a step, of the model's last call in it.

    Raises ValueError for arguments that `tiled` does not take.
    """

    dims: tuple[int, ...]
    halo: tuple[int, ...] | None
    memory: int
    paging: Paging
    parts: tuple[int, ...]
    spill: Path | None

    def __init__(
        self,
        model: nn.Module,
        parts: int | Sequence[int],
        dim: int | Sequence[int],
        memory: int,
        spill: str | Path,
    ) -> None:
        self.model = model
        self.parts = (parts,) if isinstance(parts, int) else tuple(parts)
        self.dims = (dim,) if isinstance(dim, int) else tuple(dim)
        self.memory, self.spill = memory, None if spill == "cpu" else Path(spill)
        self.paging = Paging()
        self.halo: tuple[int, ...] | None = None
        self._shelves: dict[torch.device, Shelf] = {}
        if len(self.parts) != len(self.dims) or not self.parts or min(self.parts) < 1:
            raise ValueError(f"{parts} parts along dim {dim}: one number of parts for each dim")
        if any(isinstance(p, ShardTensor | dt.DTensor) for p in model.parameters()):
            raise ValueError("tiled takes a model of plain parameters: it runs on one device")
        if memory <= 0:
            raise ValueError(f"memory is {memory}: bytes that parts may hold together")
        if self.spill is not None and not self.spill.is_dir():
            raise ValueError(f"spill: there is no folder {self.spill}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As model(*args, **kwargs): the outputs, plain and whole, with their gradients."""
        end_left()
        given, known, self.halo = (args, kwargs), self.halo, None
        tensors = containers.tensors(given)
        if _torch.functorch_level() is not None or any(_torch.followed(x) for x in tensors):
            raise UnsupportedOpError(
                "tiled: torch.func or forward mode around a call in parts: use it in the model's "
                "forward, whose parts do so, or on the model itself"
            )
        dims = _dims_of(tensors, self.dims)
        call: OneCall | None = None
        call = without_meeting(self.model, self.parts, dims, self._pager(tensors[0]), given, known)
        if call is None:
            call = Session(self.model, self.parts, dims, self._pager(tensors[0]), given)
            call.go_on()
        else:
            self.halo = call.halo
        outputs = Call.apply(call, *call.tensors, *(call.parameters if call.grad else []))
        return call.rebuilt(outputs)

    def run(self, step: Callable[[nn.Module, DeviceMesh], T]) -> T:
        """step(model, mesh) on every rank, the model and all it makes in files beyond the memory.

        The step makes or reads its inputs as ShardTensors on the mesh, (with `shardtensor.io`, say,
        so that a sample lies nowhere whole), calls the model, and may call backward on a loss: the
        gradients are added to those of the model's parameters. Returns what rank 0 returned; that
        is to be plain (a ShardTensor raises ValueError).
        """
        end_left()
        self.halo = None
        pager = self._pager(next(self.model.parameters(), None))
        work = _Step(self.model, self.parts, pager, step)
        work.go_on()
        self.halo = work.calls.last
        result: Any = work.result
        return result

    def _pager(self, first: Tensor | None) -> Pager:
        """A pager of the device that this tensor is on."""
        device = torch.device("cpu") if first is None else first.device
        if device not in self._shelves:
            self._shelves[device] = shelf(device, self.spill, self.memory)
        pager = Pager(self.memory, self._shelves[device])
        self.paging = pager.done
        return pager


def _dims_of(tensors: list[Tensor], dims: tuple[int, ...]) -> tuple[int, ...]:
    """The dims that are cut, from the front. Raises unless the tensors can be cut here."""
    if not tensors or any(not -tensors[0].ndim <= d < tensors[0].ndim for d in dims):
        raise ValueError(f"tiled along dim {dims}: the first tensor that is given needs them")
    if any(isinstance(x, ShardTensor) for x in tensors):
        raise ValueError("tiled takes plain tensors: it cuts them itself")
    return tuple(d % tensors[0].ndim for d in dims)


def shelf(device: torch.device, folder: Path | None, memory: int) -> Shelf:
    """Where storages of a device go. Raises for devices that there is no place for."""
    if device.type == "cuda":
        return Pinned(Streams(device), folder, None if folder is None else memory)
    if device.type != "cpu":
        raise UnsupportedOpError(f"tiled runs on CPUs and CUDA GPUs: {device.type} has no pager")
    if folder is None:
        raise ValueError('spill="cpu" is where memory of a GPU goes: on a CPU give a folder')
    return Files(folder)


class _Step(Ranks):
    """A step of the user's."""

    def __init__(
        self,
        model: nn.Module,
        parts: tuple[int, ...],
        pager: Pager,
        step: Callable[[nn.Module, DeviceMesh], Any],
    ) -> None:
        self.step, self.result = step, None
        super().__init__(model, parts, pager)
        self.calls = Calls(pager, self.world.turns)

    def on_rank(self, model: nn.Module, mesh: DeviceMesh) -> None:
        self.calls.follow(model, mesh, hooks=int(self.parallelized))
        result = self.step(model, mesh)
        self.unwritten()
        if any(isinstance(x, ShardTensor) for x in containers.tensors(result)):
            raise ValueError(
                "the step returned a ShardTensor, whose ranks end here: return full_tensor(), or "
                "write it to a file"
            )
        first = mesh.get_rank() == 0
        self.ended_forward(model, first)
        if first:
            self.result = result
            self.after.append(partial(self._add, self.gradients(model)))

    def _add(self, gradients: list[Tensor | None]) -> None:
        with _torch.outside_modes():
            for p, g in zip(self.parameters, gradients, strict=True):
                if g is not None:
                    p.grad = g if p.grad is None else p.grad + g
