"""A CPU whose copies beside computing begin as late as events allow: `paged.streams` for tests.

What is computed is there at once. A copy reads and writes when somebody waits for it, or for one
after it: so memory that is given up, read or written too soon shows in the values.
"""

import weakref

import torch

from shardtensor import _torch

CPU = torch.device("cpu")


class LateStreams:
    """As `Streams`; an event is the number of copies up to it."""

    def __init__(self, device=CPU):
        self.device, self.computing = device, "default"
        # copies that have not run, after so many that have
        self.queue, self.done = [], 0
        self.host_waits = self.pinned_bytes = 0
        self.hosts = weakref.WeakSet()

    def current(self):
        return self.computing

    def copy(self, pairs, after):
        for pair in pairs:
            self.queue.append([(self._named(x), x.storage_offset(), x.numel()) for x in pair])
        return self.done + len(self.queue)

    def wait(self, stream, event):
        with _torch.outside_modes():
            while self.done < event:
                (to, *to_place), (x, *x_place) = self.queue.pop(0)
                self.done += 1
                to, x = to(), x()
                assert to is not None, "a copy writes to memory that is gone"
                # what was dropped while it was copied nobody needs
                if x is not None:
                    assert x.nbytes(), "a copy reads memory that was given up"
                    _bytes(to, *to_place).copy_(_bytes(x, *x_place))

    def finish(self, event):
        self.host_waits += 1
        self.wait(None, event)

    def pinned(self, nbytes):
        self.pinned_bytes += nbytes
        made = torch.empty(nbytes, dtype=torch.uint8).untyped_storage()
        self.hosts.add(made)
        return made

    def _named(self, x):
        """Copies keep pinned memory, as CUDA's allocator does, and nothing of the device."""
        storage = x.untyped_storage()
        return (lambda: storage) if storage in self.hosts else weakref.ref(storage)


def _bytes(storage, at, n):
    return torch.empty(0, dtype=torch.uint8).set_(storage, at, (n,))
