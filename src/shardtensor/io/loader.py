"""Samples for data x domain: the same within a domain group, others across; read ahead."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol
from zlib import crc32

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DistributedSampler

from .. import comm
from ..comm import wire
from .ahead import Failed, InProcesses, InThread, Samples
from .collate import moved
from .failing import reason

# what ranks tell each other of a batch: 0, or that time is over, or
_FAILED = 2


class Dataset(Protocol):
    """What a loader reads. Reading a sample must not communicate: a thread or process does it."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Any: ...


class DomainSampler(DistributedSampler[int]):
    """Indices of samples: one order for all ranks, dealt out along the mesh's data axis.

    Ranks that differ along other axes only get the same samples. data: the name of the data axis;
    a mesh without it has one domain group. Every group gets equally many: with drop_last the rest
    of an epoch is left out, else its first samples fill up the last round. Epochs are shuffled by
    seed + epoch, the same way for any number of groups. weights: (length,), of all samples; an
    epoch is then `length` draws by them, with replacement, drawn anew each epoch. Works with
    torch's DataLoader, too, and sends nothing; being torch's own kind of sampler, it is not
    replaced by one that deals samples to single ranks, as Lightning does with others. Raises
    ValueError for fewer samples than groups, weights that are not one number of 0 or more a sample,
    and a mesh without this rank.
    """

    group: int
    groups: int
    length: int
    weighted: int
    weights: Tensor | None

    def __init__(
        self,
        length: int,
        mesh: DeviceMesh,
        *,
        data: str = "data",
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = True,
        weights: Sequence[float] | Tensor | None = None,
    ) -> None:
        names = mesh.mesh_dim_names or ()
        place = mesh.get_coordinate()
        if place is None:
            raise ValueError("this rank is not part of the mesh")
        axis = names.index(data) if data in names else None
        self.data = data
        self.length, self.groups = length, 1 if axis is None else mesh.size(axis)
        self.group = 0 if axis is None else place[axis]
        if length < 1 or (drop_last and length < self.groups):
            raise ValueError(f"{length} samples for {self.groups} groups of ranks")
        self.weights = None
        if weights is not None:
            self.weights = torch.as_tensor(weights, dtype=torch.double, device="cpu").detach()
        # what a resume holds the order to
        self.weighted = 0
        if self.weights is not None:
            self.weighted = crc32(self.weights.numpy().tobytes())
            good = self.weights.shape == (length,) and bool((self.weights >= 0).all())
            if not good or not 0 < float(self.weights.sum()) < torch.inf:
                raise ValueError(
                    f"weights {tuple(self.weights.shape)} of {length} samples: one number of 0 or "
                    "more for each, not all of them 0"
                )
        samples: Any = range(length)
        super().__init__(
            samples, self.groups, self.group, shuffle=shuffle, seed=seed, drop_last=drop_last
        )

    def __iter__(self) -> Iterator[int]:
        order = super().__iter__()
        if self.weights is None:
            return order
        draw = torch.Generator().manual_seed(self.seed + self.epoch)
        drawn = torch.multinomial(self.weights, self.length, True, generator=draw).tolist()
        return iter([drawn[i] for i in order])


class Loader:
    """Batches of a dataset, read ahead in a thread or in processes; one epoch for each `iter`.

    batch_size: of one domain group. sampler: default a DomainSampler of the dataset, which leaves
    out the samples that fill no round of batches, unless all of them are fewer than that; another
    one, of any kind, has to give the ranks of a domain group the same numbers. With its drop_last
    (or without the attribute) unset, the last batch may be smaller. prefetch: how many batches wait
    ready; 0 reads when asked. Batches are what `collate` makes, on the mesh's device, copied from
    pinned memory where that is a GPU. progress: a bar on the first rank (extra `demo`).

    workers: processes that read, forked at each `iter`, in place of the thread, with the dataset as
    it is then; each sample's draws of torch, NumPy and random follow from its number and the epoch.
    timeout: seconds after which a batch that is waited for counts as one that cannot be read.
    budget: seconds from now; the first batch that a rank has later than that ends the iteration on
    every rank, `over` is True, and state_dict() is that of a run to be resumed.

    A sample that cannot be read raises RuntimeError with its number on every rank: each batch costs
    one all-reduce of a byte for that. Each epoch costs an all-gather of a few numbers: ValueError
    on every rank where samples part. waited: seconds spent waiting for batches. state_dict() and
    load_state_dict() resume within an epoch with the next batch, also on other numbers of ranks
    where as many samples make a round or a whole number of rounds.
    """

    batch_size: int
    budget: float | None
    dataset: Dataset
    device: torch.device
    done: int
    mesh: DeviceMesh
    over: bool
    prefetch: int
    progress: bool
    timeout: float | None
    waited: float
    workers: int

    def __init__(
        self,
        dataset: Dataset,
        mesh: DeviceMesh,
        *,
        batch_size: int = 1,
        sampler: Any = None,
        prefetch: int = 2,
        progress: bool = False,
        workers: int = 0,
        timeout: float | None = None,
        budget: float | None = None,
    ) -> None:
        if batch_size < 1 or prefetch < 0 or workers < 0:
            raise ValueError(f"batch_size {batch_size}, prefetch {prefetch}, workers {workers}")
        if timeout is not None and (timeout <= 0 or not prefetch + workers):
            raise ValueError(
                f"timeout {timeout}, prefetch {prefetch}: more than 0 s, and batches read ahead"
            )
        self.dataset, self.mesh, self.batch_size = dataset, mesh, batch_size
        if sampler is None:
            sampler = DomainSampler(len(dataset), mesh, drop_last=False)
            if len(dataset) >= sampler.groups * batch_size:
                sampler = DomainSampler(len(dataset), mesh)
        self.sampler = sampler
        if not len(self):
            raise ValueError(
                f"{len(self.sampler)} samples of a domain group make no batch of {batch_size}: "
                "take a smaller batch_size, or a sampler with drop_last=False"
            )
        self.prefetch, self.progress, self.workers = prefetch, progress, workers
        self.timeout, self.budget, self.over = timeout, budget, False
        self._began, self._read = time.monotonic(), 0
        self.device = torch.device(mesh.device_type)
        self.done, self.waited = 0, 0.0
        self._turn: object = None

    def __len__(self) -> int:
        n = len(self.sampler)
        whole = getattr(self.sampler, "drop_last", False)
        return n // self.batch_size if whole else -(-n // self.batch_size)

    @property
    def epoch(self) -> int:
        """The sampler's; 0 where it has none."""
        return int(getattr(self.sampler, "epoch", 0))

    def _set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    @property
    def bytes_read(self) -> int | None:
        """What this rank has read, if the dataset tells; its processes included."""
        here = getattr(self.dataset, "bytes_read", None)
        return None if here is None else here + self._read

    def _count(self, nbytes: int) -> None:
        self._read += nbytes

    @property
    def _round(self) -> int:
        """How many samples all groups together take at a time."""
        return self.batch_size * int(getattr(self.sampler, "groups", 1))

    def _order(self) -> dict[str, int]:
        """What the order of samples follows from, as far as the sampler tells."""
        known = {
            k: getattr(self.sampler, k, None) for k in ("length", "seed", "shuffle", "weighted")
        }
        return {k: int(v) for k, v in known.items() if v is not None}

    def state_dict(self) -> dict[str, int]:
        """Where the epoch stands, for `load_state_dict` on any number of ranks; nothing is sent."""
        return {"epoch": self.epoch, "done": self.done, "round": self._round, **self._order()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Raises ValueError for the state of another order of samples, and where `round` differs
        and what was done ends within one of this loader's.
        """
        for key in ("epoch", "done", "round"):
            n = state.get(key, self._round if key == "round" else None)
            if type(n) is not int or n < (key == "round"):
                raise ValueError(f"resume: {key} is {n!r}; give what state_dict() gave")
        for key, mine in self._order().items():
            if int(state.get(key, mine)) != mine:
                raise ValueError(f"resume: {key} was {state[key]}, this sampler has {mine}")
        samples = int(state["done"]) * int(state.get("round", self._round))
        if samples % self._round and state["done"]:
            raise ValueError(
                f"resume after {samples} samples of an epoch, {self._round} a round: take a "
                f"batch_size such that a round of all groups divides {samples}"
            )
        self._set_epoch(int(state["epoch"]))
        self.done = samples // self._round

    def __iter__(self) -> Iterator[Any]:
        """The batches that are left of this epoch, or those of the next."""
        if self.done >= len(self):
            self._set_epoch(self.epoch + 1)
            self.done = 0
        # one more than it says, if it has more, for `_same` to see
        order = list(islice(iter(self.sampler), len(self.sampler) + 1))
        self._same(order)
        batches = [
            order[i * self.batch_size : (i + 1) * self.batch_size]
            for i in range(self.done, len(self))
        ]
        mine = self._turn = object()
        source = self._source(batches)
        try:
            for found in self._watched(source, batches):
                self.done += 1
                yield moved(found, self.device)
                if self._turn is not mine:
                    raise RuntimeError(
                        "Loader: another iterator of it began meanwhile, and both would skip "
                        "batches: one at a time, or a Loader for each"
                    )
        finally:
            if isinstance(source, InThread | InProcesses):
                source.close()

    def _source(self, batches: Sequence[Sequence[int]]) -> Iterator[Any]:
        """What makes the batches."""
        make = Samples(self.dataset).__getitem__
        if self.workers and batches:
            seed = f"{getattr(self.sampler, 'seed', 0)} {self.epoch}"
            return InProcesses(
                self.dataset, batches, self.workers, self.prefetch, self.timeout, seed, self._count
            )
        return (
            InThread(make, batches, self.prefetch, self.timeout)
            if self.prefetch
            else map(make, batches)
        )

    def _same(self, order: Sequence[int]) -> None:
        """Raise ValueError on every rank unless the ranks of each domain group read the same
        samples, and all ranks as many batches.
        """
        mesh = self.mesh
        names = mesh.mesh_dim_names or ()
        place = mesh.get_coordinate()
        on = getattr(self.sampler, "data", "data")
        mine = place[names.index(on)] if place is not None and on in names else 0
        said = len(self.sampler)
        numbers = [said, mine, self.done, len(order), len(self), crc32(repr(order).encode())]
        found = wire.all_gather_numbers(numbers, self.device, self._group())
        wrong = [n for n, _, _, given, *_ in found if n != given]
        if wrong:
            raise ValueError(
                f"Loader: a {type(self.sampler).__name__} says that it has {wrong[0]} samples and "
                "gives others: its len has to be how many it gives"
            )
        ranks = [facts for _, *facts in found]
        if len({(done, n) for _, done, _, n, _ in ranks}) > 1:
            told = ", ".join(f"{n} batches from {done}" for _, done, _, n, _ in ranks)
            raise ValueError(f"Loader: ranks part: {told}; give all the same dataset and state")
        seen: dict[int, list[int]] = {}
        for rank, (group, *facts) in enumerate(ranks):
            if seen.setdefault(group, [rank, *facts])[1:] != facts:
                raise ValueError(
                    f"Loader: ranks {seen[group][0]} and {rank} hold parts of one sample and would "
                    f"read different ones: a {type(self.sampler).__name__} that deals samples to "
                    "single ranks, or shuffles by another seed on each; take io.DomainSampler"
                )

    def _group(self) -> str:
        return comm.group(self.mesh, tuple(range(self.mesh.ndim)))

    def _watched(self, source: Iterator[Any], batches: Sequence[Sequence[int]]) -> Iterator[Any]:
        """What the source gives, timed, with a bar if asked for; raises where any rank failed."""
        bar = self._bar(len(batches))
        try:
            for indices in batches:
                begin = time.perf_counter()
                try:
                    found = next(source)
                except Exception as e:
                    # late, or a process that ended
                    found = Failed(indices[0], e)
                self.waited += time.perf_counter() - begin
                if self._agree(found if isinstance(found, Failed) else None):
                    return
                yield found
                if bar is not None:
                    bar.advance(bar.task_ids[0])
        finally:
            if bar is not None:
                bar.stop()

    def _agree(self, failed: Failed | None) -> bool:
        """Whether the time is over on any rank. Raises RuntimeError where a batch failed on any."""
        group = self._group()
        self.over = self.budget is not None and time.monotonic() - self._began > self.budget
        told = _FAILED if failed is not None else int(self.over)
        if comm.size(group) > 1:
            flag = torch.tensor([told], dtype=torch.uint8, device=self.device)
            told = int(wire.all_reduce([flag], "max", group)[0])
        if told == _FAILED:
            why, error = "", None
            if failed is not None:
                error = failed.error
                why = f"sample {failed.index}: {str(error) or type(error).__name__}"
            first = reason(why, self.device, group)
            raise RuntimeError(
                why or f"another rank could not read its part of a sample: {first}"
            ) from error
        self.over = bool(told)
        return self.over

    def _bar(self, total: int) -> Any:
        if not self.progress or comm.rank(self._group()):
            return None
        from rich.progress import Progress

        bar = Progress()
        bar.add_task(f"epoch {self.epoch}", total=total)
        bar.start()
        return bar
