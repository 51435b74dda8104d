"""Where memory goes that has to leave a device: what a pager asks of such a place."""

from __future__ import annotations

from typing import Any

import torch


class Shelf:
    """A place for the storages of one device.

    device: whose they are. share: of a pager's budget, what is copied before it has to leave, and
    fetched before it is read. is_memory: whether a copy is the memory of the storage from then on,
    so that it never differs from it. cached: bytes that come back faster than they are made anew.
    """

    device: torch.device
    share = 0.0
    is_memory = False
    cached = 0

    def takes(self, storage: torch.UntypedStorage) -> bool:
        """Whether a storage may leave."""
        return storage.device == self.device

    def put(self, storage: torch.UntypedStorage) -> Any:
        """Begin to copy; what is known of the copy."""
        raise NotImplementedError

    def free(self, storage: torch.UntypedStorage, copy: Any) -> None:
        """Give up the memory of one that was put."""
        raise NotImplementedError

    def fetch(self, storage: torch.UntypedStorage, copy: Any) -> None:
        """Begin to bring back what was freed, to memory anew."""
        raise NotImplementedError

    def ready(self, copy: Any) -> None:
        """Let the ops that this thread calls next find what was fetched, or begun to be."""

    def here(self) -> None:
        """An op comes that this thread calls."""

    def drop(self, copy: Any) -> None:
        """The copy is needed no more."""

    def join(self) -> None:
        """Let the ops that this thread calls next come after all copies."""
