"""What goes into checkpoints and what may come out of them."""

from __future__ import annotations

import copy
import io
import pickle
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.tensor import DTensor

from .comm.count import simulated_rank
from .tensor import ShardTensor, wrap


def snapshot(state: Any) -> Any:
    """A copy in host memory that training does not change; Stateful objects give their state."""
    if isinstance(state, Stateful) and not isinstance(state, Tensor):
        return snapshot(state.state_dict())
    if isinstance(state, dict):
        return {k: snapshot(v) for k, v in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(snapshot(v) for v in state)
    if isinstance(state, ShardTensor):
        return wrap(_copied(state.to_local()), state.spec)
    if isinstance(state, DTensor):
        return DTensor.from_local(
            _copied(state.to_local()), state.device_mesh, state.placements, run_check=False,
            shape=state.shape, stride=state.stride(),
        )  # fmt: skip
    if isinstance(state, Tensor):
        return _copied(state)
    return copy.deepcopy(state)


def _copied(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True)


class Randomness:
    """The states of torch's, NumPy's and Python's generators of every rank, as a part of a state.

    Loaded on as many ranks each continues its own draws, on others all continue the first rank's.
    """

    def state_dict(self) -> dict[str, bytes]:
        kind, keys, at, gauss, cached = np.random.get_state(legacy=True)
        mine = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
            "numpy": [str(kind), torch.from_numpy(np.array(keys, np.int64)), at, gauss, cached],
            "python": random.getstate(),
        }
        every = [mine]
        if dist.is_initialized() and dist.get_world_size() > 1:
            every = [mine] * dist.get_world_size()
            dist.all_gather_object(every, mine)
        buffer = io.BytesIO()
        torch.save(every, buffer)
        return {"states": buffer.getvalue()}

    def load_state_dict(self, state: dict[str, bytes]) -> None:
        every = torch.load(io.BytesIO(state["states"]), weights_only=True)
        rank = simulated_rank()
        if rank is None:
            rank = dist.get_rank() if dist.is_initialized() else 0
        mine = every[rank if rank < len(every) else 0]
        torch.set_rng_state(mine["torch"])
        if mine["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(mine["cuda"])
        kind, keys, *rest = mine["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        random.setstate(mine["python"])


class Planner(DefaultLoadPlanner):
    """Loads values that are no tensors without executing what they were pickled with."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        torch.load(value, weights_only=True)  # raises for anything but data
        value.seek(0)
        super().load_bytes(read_item, value)


class Reader(FileSystemReader):
    """Reads a checkpoint's metadata, which is a pickle, as the few classes that it is made of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        path = self._get_metadata_path(kwargs.get("rank"))
        with self.fs.create_stream(path, "rb") as stream:
            _Careful(stream).load()
        return super().read_metadata(*args, **kwargs)


class _Careful(pickle.Unpickler):
    """Nothing but what DCP's own metadata is made of."""

    _METADATA = "torch.distributed.checkpoint.metadata"
    _OTHERS = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            # Python 3.13 names them so
            ("pathlib._local", "PosixPath"),
            ("pathlib._local", "WindowsPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        of_torch = getattr(torch, name, None) if module == "torch" else None
        if isinstance(of_torch, torch.dtype):
            return of_torch
        if "." not in name and (module == self._METADATA or (module, name) in self._OTHERS):
            found = super().find_class(module, name)
            # what the module imports is not part of it
            if getattr(found, "__module__", module) in (
                module,
                "torch",
                "pathlib",
                "pathlib._local",
            ):
                return found
        raise pickle.UnpicklingError(f"a checkpoint with {module}.{name} is not loaded")
