"""What goes into checkpoints: a copy of a state, the states of generators."""

from __future__ import annotations

import copy
import io
import random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.stateful import Stateful

from ..comm.observers import simulated_rank
from ..containers import parts
from ..later import dt
from ..tensor import ShardTensor, wrap
from .storage import loaded


def stated(state: dict[str, Any]) -> dict[str, Any]:
    """A state in which Stateful objects among the first keys have given theirs."""
    return {k: v.state_dict() if isinstance(v, Stateful) else v for k, v in state.items()}


def snapshot(state: Any) -> Any:
    """A copy in host memory that training does not change; Stateful objects give their state."""
    if isinstance(state, Stateful) and not isinstance(state, Tensor):
        return snapshot(state.state_dict())
    found = parts(state)
    if found is not None:
        return found.make([snapshot(v) for v in found.values])
    if isinstance(state, ShardTensor):
        return wrap(_copied(state.to_local()), state.spec)
    if isinstance(state, dt.DTensor):
        return dt.DTensor.from_local(
            _copied(state.to_local()), state.device_mesh, state.placements, run_check=False,
            shape=state.shape, stride=state.stride(),
        )  # fmt: skip
    if isinstance(state, Tensor):
        return _copied(state)
    try:
        return copy.deepcopy(state)
    except Exception:
        # nothing that could be saved: where it is written, it is refused by its key, on all ranks
        return state


def _copied(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True)


class Randomness:
    """The states of torch's, NumPy's and Python's generators of every rank, as a part of a state.

    Loaded on as many ranks each continues its own draws, on others all continue the first rank's.
    """

    def state_dict(self) -> dict[str, bytes]:
        """The states of all ranks, gathered on all: some kilobytes each."""
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
        """Sets this rank's. Raises RuntimeError, on all ranks, for what are no such states."""
        try:
            every = loaded(io.BytesIO(state["states"]))
            # those of all ranks are tried on each, so that all raise or none
            for each in every:
                torch.Generator().set_state(each["torch"])
                np.random.RandomState().set_state(_numpy(each))
                random.Random().setstate(each["python"])
            rank = simulated_rank()
            if rank is None:
                rank = dist.get_rank() if dist.is_initialized() else 0
            mine = every[rank if rank < len(every) else 0]
            torch.set_rng_state(mine["torch"])
            if mine["cuda"] is not None and torch.cuda.is_available():
                torch.cuda.set_rng_state(mine["cuda"])
            np.random.set_state(_numpy(mine))
            random.setstate(mine["python"])
        except Exception as e:
            raise RuntimeError(f"these are no states of random generators: {e}") from e


def _numpy(of_rank: dict[str, Any]) -> tuple[Any, ...]:
    kind, keys, *rest = of_rank["numpy"]
    return (kind, keys.numpy().astype(np.uint32), *rest)
