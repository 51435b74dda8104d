"""Locks of files: they end with their process, and hold among hosts that share the files."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path


def take(lock: Path, wait: bool = False) -> int:
    """The lock of a file, which `let_go` takes back. File systems without locks do not tell.

    Raises BlockingIOError if somebody else has it and this one does not wait.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        # NFS locks what is open for writing alone
        file = os.open(lock, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(file)
            raise
        except OSError:
            return file
        # the one before may have taken its file away meanwhile
        with suppress(FileNotFoundError):
            if os.fstat(file).st_ino == os.stat(lock).st_ino:
                return file
        os.close(file)


def let_go(lock: Path, file: int) -> None:
    """Give a lock back and take its file away."""
    lock.unlink(missing_ok=True)
    with suppress(OSError):
        # processes that were forked meanwhile have the file open, too
        fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)
