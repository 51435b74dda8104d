"""The folder of a checkpoint that is being written: beside its name, held by who writes."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

# what this process writes; a file that is open is held
_held: dict[Path, int] = {}


def of(path: Path) -> Path:
    """Where the files lie until the checkpoint is complete."""
    return path.with_name(f".{path.name}.partial")


def begin(path: Path) -> None:
    """Make the folder and hold it, until `let_go` or the end of the process; remove those of its
    kind that nobody holds. Raises FileExistsError where another program writes this checkpoint.
    """
    for left in path.parent.glob(".*.partial"):
        if left.is_symlink() or not left.is_dir():
            left.unlink()
            continue
        # of a save that went no further
        _close(left)
        if _hold(left):
            shutil.rmtree(left, ignore_errors=True)
            _close(left)
    folder = of(path)
    try:
        folder.mkdir()
    except FileExistsError as e:
        raise FileExistsError(f"{path} is being written by another program") from e
    _hold(folder)


def let_go(path: Path) -> None:
    """Whatever has become of it: another program may remove it."""
    _close(of(path))


def _close(folder: Path) -> None:
    file = _held.pop(folder, None)
    if file is not None:
        os.close(file)


def _hold(folder: Path) -> bool:
    """Whether nobody else holds it; file systems without locks do not tell."""
    file = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return False
    except OSError:
        pass
    _held[folder] = file
    return True
