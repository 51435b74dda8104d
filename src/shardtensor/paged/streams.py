"""Copies beside a GPU's computing: one stream of them, ordered with others by events."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Streams:
    """The copy stream of a device, and those that compute there. Nothing but `finish` waits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copying = torch.cuda.Stream(device)

    def current(self) -> Any:
        """The stream that gets this thread's ops."""
        return torch.cuda.current_stream(self.device)

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[Any]) -> Any:
        """Copy from the second of each pair to the first, after what these streams have got so far.

        The event of the end.
        """
        for stream in after:
            self.copying.wait_stream(stream)
        with torch.cuda.stream(self.copying):
            for to, x in pairs:
                to.copy_(x, non_blocking=True)
        return self.copying.record_event()

    def wait(self, stream: Any, event: Any) -> None:
        """Let a stream's next ops wait for an event."""
        stream.wait_event(event)

    def finish(self, event: Any) -> None:
        """Let the host wait for an event."""
        event.synchronize()

    def pinned(self, nbytes: int) -> torch.UntypedStorage:
        """Memory of the host that the device copies from and to by itself."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).untyped_storage()
