"""Batches made before they are asked for: in a thread, or in processes."""

from __future__ import annotations

import pickle
import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_all_start_methods
from multiprocessing.reduction import ForkingPickler
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..containers import mapped
from ..spec import Spec
from ..tensor import ShardTensor, wrap
from .collate import collate


class Failed:
    """What a sample that could not be read raised."""

    def __init__(self, index: int, error: BaseException) -> None:
        self.index, self.error = index, error


class Samples(TorchDataset[Any]):
    """Batches of a dataset by the numbers of their samples; each the batch, or what one raised."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: Sequence[int]) -> Any:
        samples, at = [], indices[0]
        try:
            for at in indices:
                samples.append(self.sample(at))
            return collate(samples)
        except Exception as e:
            return Failed(at, e)

    def sample(self, i: int) -> Any:
        return self.dataset[i]


class InThread:
    """What fn makes of each item in turn, at most `most` ahead of what is asked for.

    timeout: seconds after which waiting for one raises TimeoutError.
    """

    def __init__(
        self, fn: Callable[[Any], Any], items: Sequence[Any], most: int, timeout: float | None
    ) -> None:
        self.ready: queue.Queue[Any] = queue.Queue(most)
        self.timeout, self.late = timeout, False
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(fn, items), daemon=True)
        self.thread.start()

    def _run(self, fn: Callable[[Any], Any], items: Sequence[Any]) -> None:
        for item in items:
            try:
                found = fn(item)
            except BaseException as e:
                # what ends the thread would leave every rank waiting
                found = Failed(item[0], e)
            while not self.stop.is_set():
                try:
                    self.ready.put(found, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self.stop.is_set():
                return

    def __iter__(self) -> InThread:
        return self

    def __next__(self) -> Any:
        try:
            return self.ready.get(timeout=self.timeout)
        except queue.Empty:
            self.late = True
            raise TimeoutError(f"not read within {self.timeout:g} s") from None

    def close(self) -> None:
        """End the thread; what it reads is waited for no longer than when asked for."""
        self.stop.set()
        if not self.late:
            self.thread.join(self.timeout)


class InProcesses:
    """The batches of some samples, made by processes that are forked from this one.

    A process has the dataset as it is now. Each sample's draws of torch, NumPy and random follow
    from `seed` and its number, so they are the same on all ranks and for any number of processes.
    counted: what is called with the bytes that each batch has read, where the dataset tells.
    """

    def __init__(
        self,
        dataset: Any,
        batches: Sequence[Sequence[int]],
        workers: int,
        ahead: int,
        timeout: float | None,
        seed: str,
        counted: Callable[[int], None],
    ) -> None:
        if "fork" not in get_all_start_methods():
            raise ValueError("Loader: workers are forked, which this system cannot do; take 0")
        made: DataLoader[Any] = DataLoader(
            Forked(dataset, seed),
            sampler=batches,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=max(1, -(-ahead // workers)),
            timeout=timeout or 0,
            multiprocessing_context="fork",
            # torch's own draw is left alone
            generator=torch.Generator().manual_seed(0),
        )
        self.batches: Iterator[Any] | None = iter(made)
        self.counted = counted
        self.specs: dict[bytes, Spec] = {}

    def __iter__(self) -> InProcesses:
        return self

    def __next__(self) -> Any:
        assert self.batches is not None
        why = ""
        try:
            batch, nbytes = next(self.batches)
        except Exception as e:
            why = str(e) or type(e).__name__
        if why:
            # without the other one, whose frames would keep the processes
            raise RuntimeError(f"its process did not send it: {why}")
        self.counted(nbytes)
        return mapped(self._wrapped, batch)

    def _wrapped(self, x: Any) -> Any:
        if not isinstance(x, Sent):
            return x
        if x.spec not in self.specs:
            self.specs[x.spec] = pickle.loads(x.spec)
        return wrap(x.local, self.specs[x.spec])

    def close(self) -> None:
        """End the processes."""
        self.batches = None


class Forked(Samples):
    """The samples of a process that was forked: (batch, bytes read), to be sent."""

    def __init__(self, dataset: Any, seed: str) -> None:
        super().__init__(dataset)
        self.seed = seed
        self.specs: dict[Spec, bytes] = {}

    def __getitem__(self, indices: Sequence[int]) -> tuple[Any, int]:
        before = getattr(self.dataset, "bytes_read", 0)
        found = super().__getitem__(indices)
        if isinstance(found, Failed):
            # exceptions of some libraries cannot be sent
            found.error = RuntimeError(str(found.error) or type(found.error).__name__)
        try:
            found = mapped(self._sent, found)
        except Exception as e:
            found = Failed(indices[0], RuntimeError(f"it cannot be sent by its process: {e}"))
        return found, getattr(self.dataset, "bytes_read", 0) - before

    def sample(self, i: int) -> Any:
        seed = crc32(f"{self.seed} {i}".encode())
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        return super().sample(i)

    def _sent(self, x: Any) -> Any:
        """As a process can send it. Raises what the thread that sends would tell nobody."""
        if isinstance(x, Tensor) and not isinstance(x, ShardTensor):
            return x.detach().requires_grad_() if x.requires_grad else x
        if not isinstance(x, ShardTensor):
            if not isinstance(x, bool | int | float | str | Failed | None):
                ForkingPickler.dumps(x)
            return x
        if x.spec not in self.specs:
            self.specs[x.spec] = pickle.dumps(x.spec)
        local = x.to_local().detach().requires_grad_(x.requires_grad)
        return Sent(local, self.specs[x.spec])


class Sent:
    """A ShardTensor between processes: this rank's block, and its spec as bytes."""

    def __init__(self, local: Tensor, spec: bytes) -> None:
        self.local, self.spec = local, spec


def _as_it_is(batch: Any) -> Any:
    return batch
