"""Samples for data x domain: the same within a domain group, others across; read ahead."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import Sampler

from .. import comm
from ..comm import wire
from ..spec import Dim
from ..tensor import ShardTensor, wrap


class Dataset(Protocol):
    """What a loader reads. Reading a sample must not communicate: it happens in a thread."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Any: ...


class DomainSampler(Sampler[int]):
    """Indices of samples: one order for all ranks, dealt out along the mesh's data axis.

    Ranks that differ along other axes only get the same samples. data: the name of the data axis;
    a mesh without it has one domain group. Every group gets equally many: with drop_last the rest
    of an epoch is left out, else its first samples fill up the last round. Epochs are shuffled by
    seed + epoch. Works with torch's DataLoader, too.
    """

    def __init__(
        self,
        length: int,
        mesh: DeviceMesh,
        *,
        data: str = "data",
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        names = mesh.mesh_dim_names or ()
        place = mesh.get_coordinate()
        if place is None:
            raise ValueError("this rank is not part of the mesh")
        axis = names.index(data) if data in names else None
        self.groups = 1 if axis is None else mesh.size(axis)
        self.group = 0 if axis is None else place[axis]
        self.length, self.shuffle, self.seed, self.drop_last = length, shuffle, seed, drop_last
        self.epoch = 0
        if length < 1 or (drop_last and length < self.groups):
            raise ValueError(f"{length} samples for {self.groups} groups of ranks")

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        n = self.length
        return n // self.groups if self.drop_last else -(-n // self.groups)

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.length))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.length, generator=generator).tolist()
        wanted = len(self) * self.groups
        order = (order * -(-wanted // self.length))[:wanted]
        return iter(order[self.group :: self.groups])


class Loader:
    """Batches of a dataset, read ahead in a thread; one epoch for each `iter`.

    batch_size: of one domain group. prefetch: how many batches wait ready; 0 reads when asked.
    Samples are dicts, tuples, lists, tensors or numbers of equal structure: ShardTensors of one
    spec get a batch dim in front without communication, as do tensors of one shape; what differs
    from sample to sample becomes a list. Batches come on the mesh's device, copied from pinned
    memory where that is a GPU. progress: a bar on the first rank (extra `demo`).

    A sample that cannot be read raises RuntimeError with its number on every rank: each batch costs
    one all-reduce of a byte for that. waited: seconds spent waiting for batches. state_dict() and
    load_state_dict() resume within an epoch with the next batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        mesh: DeviceMesh,
        *,
        batch_size: int = 1,
        sampler: DomainSampler | None = None,
        prefetch: int = 2,
        progress: bool = False,
    ) -> None:
        if batch_size < 1 or prefetch < 0:
            raise ValueError(f"batch_size {batch_size}, prefetch {prefetch}")
        self.dataset, self.mesh, self.batch_size = dataset, mesh, batch_size
        self.sampler = DomainSampler(len(dataset), mesh) if sampler is None else sampler
        self.prefetch, self.progress = prefetch, progress
        self.device = torch.device(mesh.device_type)
        self.done, self.waited = 0, 0.0

    def __len__(self) -> int:
        return len(self.sampler) // self.batch_size

    @property
    def bytes_read(self) -> int | None:
        """What this rank has read, if the dataset tells."""
        return getattr(self.dataset, "bytes_read", None)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.sampler.epoch, "done": self.done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.sampler.set_epoch(state["epoch"])
        self.done = state["done"]

    def __iter__(self) -> Iterator[Any]:
        if self.done >= len(self):
            self.sampler.set_epoch(self.sampler.epoch + 1)
            self.done = 0
        order = list(self.sampler)
        batches = [
            order[i * self.batch_size : (i + 1) * self.batch_size]
            for i in range(self.done, len(self))
        ]
        read = _Ahead(self._batch, batches, self.prefetch) if self.prefetch else None
        source = read if read is not None else map(self._batch, batches)
        try:
            for found in self._watched(source, len(batches)):
                self.done += 1
                yield _moved(found, self.device)
        finally:
            if read is not None:
                read.close()

    def _batch(self, indices: Sequence[int]) -> Any:
        """The samples as one batch, or the exception that one of them raised."""
        samples, at = [], indices[0]
        try:
            for at in indices:
                samples.append(self.dataset[at])
            return collate(samples)
        except Exception as e:
            return _Failed(at, e)

    def _watched(self, source: Any, total: int) -> Iterator[Any]:
        """What the source gives, timed, with a bar if asked for; raises where any rank failed."""
        bar = self._bar(total)
        try:
            source = iter(source)
            for _ in range(total):
                begin = time.perf_counter()
                found = next(source)
                self.waited += time.perf_counter() - begin
                self._agree(found if isinstance(found, _Failed) else None)
                yield found
                if bar is not None:
                    bar.advance(bar.task_ids[0])
        finally:
            if bar is not None:
                bar.stop()

    def _agree(self, failed: _Failed | None) -> None:
        group = comm.group(self.mesh, tuple(range(self.mesh.ndim)))
        bad = failed is not None
        if comm.size(group) > 1:
            flag = torch.tensor([bad], device=self.device)
            bad = bool(wire.all_reduce([flag], "max", group)[0])
        if failed is not None:
            raise RuntimeError(f"sample {failed.index}: {failed.error}") from failed.error
        if bad:
            raise RuntimeError("another rank could not read its part of a sample")

    def _bar(self, total: int) -> Any:
        group = comm.group(self.mesh, tuple(range(self.mesh.ndim)))
        if not self.progress or comm.rank(group):
            return None
        from rich.progress import Progress

        bar = Progress()
        bar.add_task(f"epoch {self.sampler.epoch}", total=total)
        bar.start()
        return bar


class _Failed:
    def __init__(self, index: int, error: Exception) -> None:
        self.index, self.error = index, error


class _Ahead:
    """fn of each item in turn, computed in a thread, at most `most` results ahead."""

    def __init__(self, fn: Callable[[Any], Any], items: Sequence[Any], most: int) -> None:
        self.ready: queue.Queue[Any] = queue.Queue(most)
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(fn, items), daemon=True)
        self.thread.start()

    def _run(self, fn: Callable[[Any], Any], items: Sequence[Any]) -> None:
        for item in items:
            found = fn(item)
            while not self.stop.is_set():
                try:
                    self.ready.put(found, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self.stop.is_set():
                return

    def __iter__(self) -> _Ahead:
        return self

    def __next__(self) -> Any:
        return self.ready.get()

    def close(self) -> None:
        """End the thread; a sample that is being read is waited for."""
        self.stop.set()
        self.thread.join()


def collate(samples: Sequence[Any]) -> Any:
    """Samples as one batch: see `Loader`."""
    first = samples[0]
    if isinstance(first, Mapping):
        return {k: collate([s[k] for s in samples]) for k in first}
    if isinstance(first, tuple | list):
        return type(first)(collate(parts) for parts in zip(*samples, strict=True))
    if isinstance(first, ShardTensor):
        if any(s.spec != first.spec for s in samples):
            return list(samples)
        local = torch.stack([s.to_local() for s in samples])
        return wrap(local, first.spec.with_dims([Dim(len(samples)), *first.spec.dims]))
    if isinstance(first, Tensor):
        alike = all(s.shape == first.shape for s in samples)
        return torch.stack(list(samples)) if alike else list(samples)
    if isinstance(first, bool | int | float):
        return torch.tensor(samples)
    return list(samples)


def _moved(x: Any, device: torch.device) -> Any:
    """x on the device; from pinned memory to a GPU, without waiting."""
    if isinstance(x, Mapping):
        return {k: _moved(v, device) for k, v in x.items()}
    if isinstance(x, tuple | list):
        return type(x)(_moved(v, device) for v in x)
    if isinstance(x, ShardTensor):
        return wrap(_moved(x.to_local(), device), x.spec)
    if not isinstance(x, Tensor) or x.device.type == device.type:
        return x
    return x.pin_memory().to(device, non_blocking=True)
