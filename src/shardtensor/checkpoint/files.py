"""ShardTensors in torch.distributed.checkpoint: a rank writes its shard, and reads what it needs.

What was saved from one mesh and cut loads into any other: the files hold global offsets.
"""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from collections.abc import Callable
from operator import index
from pathlib import Path
from typing import Any, TypeVar

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

from ..caller import described
from ..comm import counters, groups
from ..comm.observers import simulated_rank
from ..errors import UnsupportedOpError
from ..registry import before_end, method
from ..tensor import ShardTensor
from . import partial
from .planner import Planner, SavePlanner
from .states import Randomness as Randomness
from .states import snapshot, stated
from .storage import METADATA, Contents, Reader, Writer, complete, contents

_pending: Saving | None = None
_group: Any = None
T = TypeVar("T")


@method
def chunks(x: ShardTensor) -> list[ChunkStorageMetadata]:
    """Where this rank's shard lies in the whole; no chunk for an empty shard of a larger tensor."""
    if x._spec.partial:
        raise UnsupportedOpError(f"a checkpoint of {x._spec}: redistribute to Replicate or Shard")
    if not x._local.numel() and x.numel():
        return []
    return [ChunkStorageMetadata(torch.Size(x._spec.offset), x._local.shape)]


@method
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
    """Write a checkpoint folder/name by all ranks; the `keep` newest stay, with 0 all.

    state: as for torch.distributed.checkpoint (see its `get_state_dict` for models and optimizers,
    and `Randomness`): tensors, numbers, text and containers of these.
    It gets its name only when it is complete: a run that is killed while it saves leaves the last
    good one. Each rank writes its own shards; what ranks send is the plan: names, sizes and
    checksums. Raises on all ranks alike: TypeError for a state that is no dict with text as keys,
    ValueError for a name that is not one of a file and a `keep` below 0, FileExistsError for a name
    that is taken, RuntimeError where the checkpoint could not be written.
    """
    keep = _checked(state, name, keep)
    finish()
    path = _prepare(folder, name)
    given, error = _given(stated, state)
    _write(given, path, keep, None, error)
    return path


def save_async(state: dict[str, Any], folder: str | Path, name: str, *, keep: int = 2) -> Saving:
    """`save` in a thread: the state is copied to host memory at once, training may go on.

    One at a time: this waits for the one before, as do `save`, `finish` and the end of the program.
    What went wrong in the thread is raised then. Every rank calls this; what is sent is as in
    `save`, by a process group of its own. Raises at once TypeError for a state and ValueError for
    a name or `keep` that `save` does not take.
    """
    global _pending, _group
    keep = _checked(state, name, keep)
    finish()
    path = _prepare(folder, name)
    copy, error = _given(snapshot, state)
    if dist.is_initialized() and simulated_rank() is None and _group is None:
        # collectives of a thread must not meet those of training
        _group = dist.new_group(backend="gloo")
    saving = Saving(copy, path, keep, error)
    if simulated_rank() is None:
        _pending = saving
    return saving


class Saving:
    """A checkpoint that is being written. path: its folder, once it is complete."""

    error: list[BaseException]
    path: Path

    def __init__(
        self, state: dict[str, Any], path: Path, keep: int, failed: Exception | None
    ) -> None:
        self.path, self.error = path, list[BaseException]()
        self._thread = threading.Thread(target=self._run, args=(state, keep, failed))
        if simulated_rank() is None:
            self._thread.start()
        else:
            # a simulated rank is a thread: another one would be no rank
            self._run(state, keep, failed)

    def _run(self, state: dict[str, Any], keep: int, failed: Exception | None) -> None:
        try:
            _write(state, self.path, keep, _group, failed)
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
    """Wait for a `save_async` under way, and raise what went wrong in it. Sends nothing itself."""
    global _pending
    if _pending is not None and simulated_rank() is None:
        saving, _pending = _pending, None
        saving.wait()


before_end.append(finish)


def load(state: dict[str, Any], path: str | Path, *, strict: bool = True) -> dict[str, Any]:
    """Fill the tensors of a state from a checkpoint; other values come back in the same dict.

    A first key of the file that the state does not have is not read. Below those that it has all
    must match: raises RuntimeError that names the keys which the file does not have, and those for
    which the state has no place; with strict=False both are left as they are. The state_dict of an
    optimizer that has not stepped yet takes what the file has. A tensor is converted to the dtype
    of the state's where that holds it: no float as an integer, no complex one as a real, none
    beyond its largest.

    No code of the file is executed: only tensors, numbers, text, bytes and containers of them are
    loaded. What a rank reads is held against the checksums that `save` wrote. Raises RuntimeError
    on every rank, which names the file, where a checkpoint is cut, damaged or has anything else;
    tensors of the state may then be filled in part. TypeError for a state that is no dict with text
    as keys.
    """
    _is_dict(state)
    path = Path(path)
    alone = not dist.is_initialized()
    found, first = _decide(lambda: (_contents(path), path.name))
    planner = Planner(strict, path.name, first)
    try:
        dcp.load(state, storage_reader=Reader(path, found), planner=planner, no_dist=alone)
    except CheckpointException as e:
        planner.undo()
        rank = min(e.failures)
        error = e.failures[rank][0]
        raise RuntimeError(f"checkpoint {path} cannot be loaded on rank {rank}: {error}") from error
    except RuntimeError as e:
        # of an object that took its state: Randomness, a model, an optimizer
        raise RuntimeError(f"checkpoint {path} cannot be loaded: {e}") from e
    return state


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a folder, None if there is none.

    Warns of newer ones that are not complete, and says what is wrong with them. Each rank looks by
    itself; nothing is sent.
    """
    for path in reversed(_found(Path(folder))):
        try:
            complete(path)
            return path
        except (ValueError, OSError) as e:
            warnings.warn(f"checkpoint {path} is not complete: {e}", stacklevel=2)
    return None


def _contents(path: Path) -> Contents:
    try:
        return contents(path)
    except (ValueError, OSError) as e:
        raise RuntimeError(f"checkpoint {path} cannot be loaded: {e}") from e


def _is_dict(state: Any) -> None:
    if not isinstance(state, dict):
        raise TypeError(
            f"the state is a {type(state).__name__}; give a dict with text as keys, such as "
            '{"model": model.state_dict()}'
        )


def _checked(state: Any, name: str, keep: int) -> int:
    """The number of checkpoints that stay. Raises ValueError for it, and for an odd name."""
    _is_dict(state)
    if (
        not isinstance(name, str) or not name.isprintable() or name != name.strip()
        or {"/", "\\"} & set(name) or name[:1] in ("", ".") or len(name.encode()) > 240
    ):  # fmt: skip
        raise ValueError(
            f"name {name!r}: the checkpoint becomes a folder of that name; give one without /, "
            "that does not begin with a dot"
        )
    try:
        keep = index(keep)
    except TypeError:
        keep = -1
    if keep < 0:
        raise ValueError("keep is how many of the newest checkpoints stay; 0 for all")
    return keep


def _prepare(folder: str | Path, name: str) -> Path:
    """Clear what killed runs left behind; where the checkpoint will be: the first rank's name."""
    folder = Path(folder)

    def cleared() -> str:
        path = folder / name
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path):
            raise FileExistsError(f"{path} is complete already: name each checkpoint by its step")
        partial.begin(path)
        return name

    return folder / _decide(cleared)


def _given(
    make: Callable[[dict[str, Any]], dict[str, Any]], state: dict[str, Any]
) -> tuple[dict[str, Any], Exception | None]:
    """What a rank's state gives, and what it raises, which travels with the plans."""
    try:
        return make(state), None
    except Exception as e:
        # of its class others may have none, or other arguments
        return {}, RuntimeError(described(e))


def _write(
    state: dict[str, Any], path: Path, keep: int, group: Any, error: Exception | None
) -> None:
    """Write the files beside their name; when all ranks are done, rank 0 renames.

    error: what this rank's state raised, which all are to raise.
    """
    try:
        _written(state, path, keep, group, error)
    finally:
        if not dist.is_initialized() or dist.get_rank() == 0:
            partial.let_go(path)


def _written(
    state: dict[str, Any], path: Path, keep: int, group: Any, error: Exception | None
) -> None:
    folder = partial.of(path)
    try:
        dcp.save(
            state,
            storage_writer=Writer(folder),
            planner=SavePlanner(error),
            process_group=group,
            no_dist=not dist.is_initialized(),
        )
    except CheckpointException as e:
        rank = min(e.failures)
        first = e.failures[rank][0]
        raise RuntimeError(f"checkpoint {path} was not saved: rank {rank}: {first}") from first

    def named() -> None:
        _date(folder, path.parent)
        folder.rename(path)
        _settle(path.parent)
        _prune(path.parent, keep)
        # before others see the folder complete
        partial.let_go(path)

    _decide(named, group)


def _settle(folder: Path) -> None:
    """The names in a folder survive a loss of power."""
    at = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(at)
    finally:
        os.close(at)


def _date(made: Path, folder: Path) -> None:
    """Make it the newest, whatever the clock of who wrote the others: `keep` removes the oldest."""
    others = [(p / METADATA).stat().st_mtime_ns for p in _found(folder)]
    mine = (made / METADATA).stat().st_mtime_ns
    if others and mine <= max(others):
        os.utime(made / METADATA, ns=(mine, max(others) + 1))


def _prune(folder: Path, keep: int) -> None:
    """Remove what is older than the `keep` newest complete ones."""
    left = keep
    for path in reversed([p for p in _found(folder) if not p.is_symlink()] if keep else []):
        if left:
            left -= _complete(path)
            continue
        # no half of one is ever found under its name
        gone = partial.of(path)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def _complete(path: Path) -> bool:
    try:
        complete(path)
    except (ValueError, OSError):
        return False
    return True


def _found(folder: Path) -> list[Path]:
    """What looks like checkpoints, the newest last."""
    found = [p for p in folder.glob("*") if p.name[0] != "." and (p / METADATA).exists()]
    return sorted(found, key=lambda p: ((p / METADATA).stat().st_mtime_ns, p.name))


def _decide(work: Callable[[], T], group: Any = None) -> T:
    """What the first rank finds or does, on all ranks; what it raises, all raise."""
    if not dist.is_initialized():
        return work()
    if group is None:
        # what torch sends next is no collective of this library's
        counters.meeting("meeting of all ranks", groups.world(), {})
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = work()
        except (OSError, ValueError, RuntimeError) as e:
            told[1] = e
        except Exception as e:
            # of any other the others may have no class
            told[1] = RuntimeError(described(e))
    dist.broadcast_object_list(told, src=0, group=group)
    if told[1] is not None:
        raise told[1]
    found: T = told[0]
    return found
