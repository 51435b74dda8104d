"""When a GPU gets to what the host asked of it: the host only launches, and runs ahead."""

from __future__ import annotations

import time
from typing import Any

import torch


class DeviceClock:
    """Marks in the order of work of the current stream, read as seconds of `time.perf_counter`.

    A mark is an event: nothing waits for it until `stop`. Of a collective that NCCL runs on its own
    stream, the stream that waits gets to the mark after the wait when the result is there.
    """

    began: float

    def __init__(self) -> None:
        # the device whose streams are marked, since another one's events cannot be compared
        self.device: int | None = None
        self.first: Any = None
        self.began = 0.0

    def mark(self) -> Any:
        """An event on this thread's stream; None where it would not be one of this clock's."""
        if torch.cuda.is_current_stream_capturing():
            # it would happen each time that the graph is replayed
            return None
        here = torch.cuda.current_device()
        if self.first is None:
            self.device, self.first = here, _event()
        return _event() if here == self.device else None

    def stop(self) -> float:
        """Wait for the device, once; returns the time."""
        if self.first is None:
            return time.perf_counter()
        last = self.mark()
        torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.began = now if last is None else now - 1e-3 * self.first.elapsed_time(last)
        return now

    def seconds(self, mark: Any) -> float:
        """When the device came to a mark, after `stop`."""
        return self.began + 1e-3 * float(self.first.elapsed_time(mark))


class Marks:
    """Of one op or collective: where the host enters and leaves it, in pairs."""

    def __init__(self, clock: DeviceClock) -> None:
        self.clock = clock
        self.found: list[Any] = [clock.mark()]

    def add(self) -> None:
        """Note another."""
        self.found.append(self.clock.mark())

    def times(self) -> tuple[float, float, float] | None:
        """(begin, end, seconds inside), after the clock's `stop`; None where a mark is missing."""
        if len(self.found) < 2 or any(m is None for m in self.found):
            return None
        at = [self.clock.seconds(m) for m in self.found]
        inside = sum(b - a for a, b in zip(at[::2], at[1::2], strict=False))
        return at[0], at[-1], inside


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
