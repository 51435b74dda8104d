"""ShardTensors in torch.distributed.checkpoint: a rank writes its shard, and reads what it needs.

What was saved from one mesh and cut loads into any other: the files hold global offsets.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from .comm.count import simulated_rank
from .errors import UnsupportedOpError
from .states import Planner, Reader, snapshot
from .states import Randomness as Randomness
from .tensor import ShardTensor

_pending: Saving | None = None
_group: Any = None


def chunks(x: ShardTensor) -> list[ChunkStorageMetadata]:
    """Where this rank's shard lies in the whole; no chunk for an empty shard of a larger tensor."""
    if x._spec.partial:
        raise UnsupportedOpError(f"a checkpoint of {x._spec}: redistribute to Replicate or Shard")
    if not x._local.numel() and x.numel():
        return []
    return [ChunkStorageMetadata(torch.Size(x._spec.offset), x._local.shape)]


def write_items(fqn: str, x: ShardTensor) -> list[WriteItem]:
    """What this rank writes; of replicas the planner picks one."""
    return [
        WriteItem(
            index=MetadataIndex(fqn, chunk.offsets),
            type=WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=chunk,
                properties=TensorProperties.create_from_tensor(x._local),
                size=x.shape,
            ),
        )
        for chunk in chunks(x)
    ]


def save(state: dict[str, Any], folder: str | Path, name: str, *, keep: int = 2) -> Path:
    """Write a checkpoint folder/name by all ranks; the `keep` newest stay.

    state: as for torch.distributed.checkpoint (see its `get_state_dict` for models and optimizers,
    and `Randomness`).
    It gets its name only when it is complete: a run that is killed while it saves leaves the last
    good one. Raises FileExistsError, on all ranks, for a name that is taken.
    """
    finish()
    path = _prepare(folder, name)
    _write(state, path, keep, None)
    return path


def save_async(state: dict[str, Any], folder: str | Path, name: str, *, keep: int = 2) -> Saving:
    """`save` in a thread: the state is copied to host memory at once, training may go on.

    One at a time: this waits for the one before, as do `save`, `finish` and the end of the program.
    What went wrong in the thread is raised then. Every rank calls this.
    """
    global _pending, _group
    finish()
    path = _prepare(folder, name)
    copy = snapshot(state)
    if dist.is_initialized() and simulated_rank() is None and _group is None:
        # collectives of a thread must not meet those of training
        _group = dist.new_group(backend="gloo")
    saving = Saving(copy, path, keep)
    if simulated_rank() is None:
        _pending = saving
    return saving


class Saving:
    """A checkpoint that is being written. path: its folder, once it is complete."""

    def __init__(self, state: dict[str, Any], path: Path, keep: int) -> None:
        self.path, self.error = path, list[BaseException]()
        self._thread = threading.Thread(target=self._run, args=(state, keep))
        if simulated_rank() is None:
            self._thread.start()
        else:
            # a simulated rank is a thread: another one would be no rank
            self._run(state, keep)

    def _run(self, state: dict[str, Any], keep: int) -> None:
        try:
            _write(state, self.path, keep, _group)
        except BaseException as e:
            self.error.append(e)

    def wait(self) -> Path:
        """Return when the checkpoint is complete. Raises RuntimeError where it could not be."""
        if self._thread.ident is not None:
            self._thread.join()
        if self.error:
            raise RuntimeError(f"checkpoint {self.path} was not saved") from self.error.pop()
        return self.path


def finish() -> None:
    """Wait for a `save_async` under way."""
    global _pending
    if _pending is not None and simulated_rank() is None:
        saving, _pending = _pending, None
        saving.wait()


def load(state: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Fill the tensors of a state from a checkpoint; other values come back in the same dict.

    No code of the file is executed: only tensors, numbers, text, bytes and containers of them are
    loaded. Raises RuntimeError on every rank for anything else, and where the checkpoint does not
    have what the state asks for.
    """
    alone = not dist.is_initialized()
    try:
        dcp.load(state, storage_reader=Reader(path), planner=Planner(), no_dist=alone)
    except CheckpointException as e:
        rank, (error, _) = next(iter(e.failures.items()))
        raise RuntimeError(f"checkpoint {path} cannot be loaded on rank {rank}: {error}") from error
    return state


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a folder, None if there is none."""
    found = _complete(Path(folder))
    return found[-1] if found else None


def _prepare(folder: str | Path, name: str) -> Path:
    """Clear what killed runs left behind; where the checkpoint will be."""
    folder = Path(folder)
    path = folder / name
    if path.exists():
        raise FileExistsError(f"{path} is complete already: name each checkpoint by its step")
    _meet()
    if _first():
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".*.partial"):
            shutil.rmtree(left, ignore_errors=True)
    _meet()
    return path


def _write(state: dict[str, Any], path: Path, keep: int, group: Any) -> None:
    partial = path.parent / f".{path.name}.partial"
    dcp.save(state, checkpoint_id=partial, process_group=group, no_dist=not dist.is_initialized())
    _meet(group)
    if _first():
        partial.rename(path)
        for old in _complete(path.parent)[:-keep] if keep else ():
            shutil.rmtree(old)
    _meet(group)


def _complete(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("*") if (p / ".metadata").exists() and p.name[0] != "."]
    return sorted(found, key=lambda p: (p / ".metadata").stat().st_mtime_ns)


def _first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _meet(group: Any = None) -> None:
    if dist.is_initialized():
        dist.barrier(group)
