"""The folder of a checkpoint that is being written: beside its name, held by who writes."""

from __future__ import annotations

import shutil
from pathlib import Path

from .. import locks

# what this process writes, and its locks
_held: dict[Path, int] = {}


def of(path: Path) -> Path:
    """Where the files lie until the checkpoint is complete."""
    return path.with_name(f".{path.name}.partial")


def begin(path: Path) -> None:
    """Make the folder and hold it, until `let_go` or the end of the process; remove those of its
    kind that nobody holds. Raises FileExistsError where another program writes this checkpoint.
    """
    for left in path.parent.glob(".*.partial"):
        _remove(left)
    folder = of(path)
    try:
        _hold(folder)
    except BlockingIOError as e:
        raise FileExistsError(f"{path} is being written by another program") from e
    try:
        folder.mkdir()
    except OSError:
        _release(folder)
        raise


def let_go(path: Path) -> None:
    """Whatever has become of it: another program may remove it."""
    _release(of(path))


def _remove(left: Path) -> None:
    # of a save of this process that went no further
    _release(left)
    try:
        _hold(left)
    except (BlockingIOError, PermissionError):
        return
    except OSError:
        # a disk that is full has no room for a lock, before this is gone
        pass
    if left.is_symlink() or not left.is_dir():
        left.unlink(missing_ok=True)
    else:
        shutil.rmtree(left, ignore_errors=True)
    _release(left)


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _hold(folder: Path) -> None:
    _held[folder] = locks.take(_lock(folder))


def _release(folder: Path) -> None:
    file = _held.pop(folder, None)
    if file is not None:
        locks.let_go(_lock(folder), file)
