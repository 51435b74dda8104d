"""ShardTensors in torch.distributed.checkpoint: a rank writes its shard, and reads what it needs.

What was saved from one mesh and cut loads into any other: the files hold global offsets.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from .errors import UnsupportedOpError
from .tensor import ShardTensor


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

    state: as for torch.distributed.checkpoint (see its `get_state_dict` for models and optimizers).
    It gets its name only when it is complete: a run that is killed while it saves leaves the last
    good one. Raises FileExistsError, on all ranks, for a name that is taken.
    """
    folder = Path(folder)
    path, partial = folder / name, folder / f".{name}.partial"
    if path.exists():
        raise FileExistsError(f"{path} is complete already: name each checkpoint by its step")
    _meet()
    if _first():
        # what a killed run left behind
        shutil.rmtree(partial, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    _meet()
    dcp.save(state, checkpoint_id=partial, no_dist=not dist.is_initialized())
    _meet()
    if _first():
        partial.rename(path)
        for old in _complete(folder)[:-keep] if keep else ():
            shutil.rmtree(old)
    _meet()
    return path


def load(state: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Fill the tensors of a state from a checkpoint; other values come back in the same dict."""
    dcp.load(state, checkpoint_id=Path(path), no_dist=not dist.is_initialized())
    return state


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a folder, None if there is none."""
    found = _complete(Path(folder))
    return found[-1] if found else None


def _complete(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("*") if (p / ".metadata").exists() and p.name[0] != "."]
    return sorted(found, key=lambda p: (p / ".metadata").stat().st_mtime_ns)


def _first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _meet() -> None:
    if dist.is_initialized():
        dist.barrier()
