"""Gradients of parameters summed over ranks in the graph itself, many in one message.

Between a parameter and its uses on shards stand two nodes. In backward `Start` runs when the last
use has given its part, and sends the parts of a bucket once all are there that this backward will
bring. `Wait` runs after all else and passes the sum on to the parameter. So whatever looks at the
gradient (hooks, autograd.grad, DDP, an optimizer inside backward) sees the whole one, and nothing
is left of a backward that breaks off: its state belongs to the graph and to torch's graph task.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from .. import _torch, comm
from .._torch import modules
from ..comm import wire
from ..comm.deferred import rows
from ..cuts import Cut
from ..errors import UnsupportedOpError
from ..later import dt
from ..tensor import ShardTensor
from .checksum import LENGTH
from .parts import Pass, Place, Ranks

# a gradient of this part of a message is one by itself, summed where it lies, not copied
ALONE = 8


@cache
def _watch_calls() -> None:
    modules.install(_stand_ins)


def _nbytes(parameter: nn.Parameter) -> int:
    """The bytes of a parameter that this rank has."""
    local = parameter.detach()
    if isinstance(local, dt.DTensor):
        local = local.to_local()
    return local.numel() * local.element_size()


class Reducer:
    """Sums the gradients of a model's parameters; once the model is gone, ops sum them again."""

    def __init__(self, ranks: Ranks, most: int) -> None:
        self.ranks, self.most = ranks, most
        self.buckets: list[Bucket] = []

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum the gradients of these from now on; most: bytes that travel in one message."""
        if comm.size(self.ranks.everyone) == 1:
            return
        if self.ranks.copies > 1:
            _watch_calls()
        # which takes a backward
        _torch.count_gradients()
        waiting: dict[Any, Bucket] = {}
        # backward makes the last parameters' gradients first
        for p in reversed(list(parameters)):
            if not (p.is_floating_point() or p.is_complex()):
                continue
            if self.ranks.copies == 1 and _nbytes(p) * ALONE >= self.most:
                self._bucket().add(p)
                continue
            key = (p.dtype, p.device)
            if key not in waiting:
                waiting[key] = self._bucket()
            if waiting[key].add(p) >= self.most:
                del waiting[key]

    def _bucket(self) -> Bucket:
        bucket = Bucket(self.ranks)
        self.buckets.append(bucket)
        return bucket

    def remove(self) -> None:
        """Leave the sums to the ops again."""
        for bucket in self.buckets:
            for slot in bucket.slots:
                slot.remove()
        self.buckets.clear()


class Bucket:
    """Parameters whose gradients travel in one message, and their uses since the last backward."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.number = ranks.buckets
        ranks.buckets += 1
        self.slots: list[Slot] = []
        self.nbytes = 0
        self.batch: Batch | None = None
        self.values: dict[Place, Tensor] = {}

    def add(self, parameter: nn.Parameter) -> int:
        """Take a parameter; returns the bucket's bytes."""
        slot = Slot(self, len(self.slots), parameter)
        self.slots.append(slot)
        parameter._shardtensor_slot = slot  # type: ignore[attr-defined]
        self.nbytes += _nbytes(parameter)
        return self.nbytes

    def use(self, place: Place, x: Tensor) -> Tensor:
        """A parameter's value there, whose gradient is made whole; uses in one graph share that."""
        value = self.values.get(place)
        if value is None or not _torch.same_memory(value, place.of(x, self.ranks.domain)):
            if self.batch is None or value is not None:
                self.batch, self.values = Batch(self), {}
            (value,) = self.batch.use((place,), (x,))
            self.values[place] = value
        return value

    def use_all(self, places: Sequence[Place], xs: Sequence[Tensor]) -> Sequence[Tensor]:
        """`use` of several, by the same nodes where none is in the graph yet."""
        if len(set(places)) < len(places) or not self.values.keys().isdisjoint(places):
            return [self.use(p, x) for p, x in zip(places, xs, strict=True)]
        if self.batch is None:
            self.batch = Batch(self)
        found = self.batch.use(places, xs)
        self.values.update(zip(places, found, strict=True))
        return found


class Slot:
    """One parameter's place in a bucket: an attribute of the parameter, which `vary` looks for."""

    declines = True

    def __init__(self, bucket: Bucket, index: int, parameter: nn.Parameter) -> None:
        self.group, self.ranks, self.index = bucket.ranks.domain, bucket.ranks, index
        self.key, self.place = (bucket.number, index), Place(index)
        self.placements = parameter.placements if isinstance(parameter, dt.DTensor) else None
        # weak: the values of a bucket hold the parameters in C++, where Python finds no cycle
        self._bucket = ref(bucket)
        # what `Wait` has just passed on, which is averaged already
        self.arrived: Tensor | None = None
        self.hook: Any = None
        if self.ranks.copies > 1 or self.placements is not None:
            self.hook = _torch.first_hook(parameter, self.arrive)

    def remove(self) -> None:
        """Let the gradient be."""
        if self.hook is not None:
            self.hook.remove()

    def use(self, x: Tensor) -> Tensor | None:
        """See `Bucket.use`; None if nobody sums any longer."""
        bucket = self._bucket()
        return None if bucket is None else bucket.use(self.place, x)

    def use_all(self, slots: Sequence[Any], xs: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """`use` of the parameters of these slots, of which this is one."""
        bucket, places = self._bucket(), []
        for s in slots:
            if bucket is None or s._bucket() is not bucket:
                return [s.use(x) for s, x in zip(slots, xs, strict=True)]
            places.append(s.place)
        assert bucket is not None
        return bucket.use_all(places, xs)

    def cut(self, x: Tensor, dim: int, sizes: Cut, read: bool) -> Tensor | None:
        """This rank's rows of it, in memory of their own unless they are only read; likewise."""
        bucket = self._bucket()
        if bucket is None:
            return None
        if self.hook is not None or len(sizes) * max(sizes) > 2 * sizes.offsets[-1]:
            # as addends: they are averaged with the others, or cheaper to send so
            return rows(bucket.use(self.place, x), dim, sizes, self.group, read)
        own = bucket.use(Place(self.index, dim, sizes), x)
        return own if read else own.clone(memory_format=torch.contiguous_format)

    def arrive(self, grad: Tensor) -> Tensor | None:
        """The parameter's gradient, whole and averaged; the hook that runs before all others."""
        arrived, self.arrived = self.arrived, None
        return self.whole(grad, arrived)

    def whole(self, grad: Tensor, arrived: Tensor | None = None) -> Tensor | None:
        """The gradient whole and averaged, None if it is already, as what has arrived is."""
        if not isinstance(grad, dt.DTensor):
            return None if grad is arrived else self._averaged(grad)
        whole = grad
        if grad.placements != self.placements:
            # ops of DTensors alone may leave addends
            whole = grad.redistribute(placements=self.placements)
        local = whole.to_local()
        if local is not arrived and self.ranks.copies > 1:
            whole = dt.DTensor.from_local(
                self._averaged(local), whole.device_mesh, whole.placements, run_check=False,
                shape=whole.shape, stride=whole.stride(),
            )  # fmt: skip
        return None if whole is grad else whole

    def _averaged(self, grad: Tensor) -> Tensor:
        if self.ranks.copies == 1:
            return grad
        if grad.layout is not torch.strided:
            raise UnsupportedOpError(
                "parallelize: a sparse gradient is averaged over the data axis; make the embedding "
                "with sparse=False"
            )
        return Mean.apply(grad, self.ranks, self.key)

    def __reduce__(self) -> Any:
        # a parameter is pickled with its attributes; the slot stays with this process
        return type(None), ()


class Batch:
    """The nodes of a bucket's parameters in one graph."""

    def __init__(self, bucket: Bucket) -> None:
        self.ranks, self.slots, self.number = bucket.ranks, bucket.slots, bucket.number
        self._bucket = ref(bucket)
        self.starts: dict[Place, ref[Any]] = {}
        # by torch's number of the backward pass
        self.passes: dict[int, Pass] = {}

    def use(self, places: Sequence[Place], xs: Sequence[Tensor]) -> Sequence[Tensor]:
        """xs behind a `Wait` and a `Start`."""
        held = Wait.apply(self, places, *xs)
        _torch.run_last(held[0].grad_fn)
        values: Sequence[Tensor] = Start.apply(self, places, *held)
        node = ref(values[0].grad_fn)
        for place in places:
            self.starts[place] = node
        return values

    def add(
        self, places: Sequence[Place], parts: Sequence[Tensor | None], owned: bool = False
    ) -> None:
        """Take this rank's parts of gradients; send all parts if they are the last.

        owned: whether nobody else has what the one part is in.
        """
        bucket = self._bucket()
        if bucket is not None and bucket.batch is self:
            # later uses are in another graph
            bucket.batch, bucket.values = None, {}
        task = _torch.graph_task()
        found = self.passes.get(task)
        if found is None:
            nodes = {i: node() for i, node in self.starts.items()}
            expected = {i for i, n in nodes.items() if n is not None and _torch.will_run(n)}
            found = self.passes[task] = Pass(self, expected, task)
        found.add(places, parts, owned)

    def take(self, places: Sequence[Place]) -> list[Tensor | None]:
        """The whole gradients, made of all ranks' parts; None where there are none."""
        task = _torch.graph_task()
        found = self.passes.get(task)
        if found is None:
            # all that came has been taken: nothing did of these
            return [None] * len(places)
        wholes = found.take(places)
        if not found.expected and not found.taken:
            del self.passes[task]
        for place, whole in zip(places, wholes, strict=True):
            slot = self.slots[place.number]
            if slot.hook is not None:
                slot.arrived = whole
        return wholes


class Wait(_torch.Function):
    """The identity; backward gives what the parts that `Start` took are together."""

    @staticmethod
    def forward(ctx: Any, batch: Batch, places: Sequence[Place], *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.batch, ctx.places = batch, places
        ctx.materialize_grads = False
        return tuple(map(Tensor.detach, xs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            # a gradient of this gradient is wanted: `Start` summed it
            return None, None, *grads
        return None, None, *ctx.batch.take(ctx.places)


class Start(_torch.Function):
    """The values at their places; backward hands in this rank's parts of the gradients."""

    @staticmethod
    def forward(ctx: Any, batch: Batch, places: Sequence[Place], *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.batch, ctx.places = batch, places
        ctx.materialize_grads = False
        values = []
        for place, x in zip(places, xs, strict=True):
            own = x.detach()
            values.append(place.of(own, batch.ranks.domain) if place.sizes else own)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if not torch.is_grad_enabled():
            owned = len(ctx.batch.slots) == len(grads) == 1 and _torch.is_only_gradient(grads)
            ctx.batch.add(ctx.places, grads, owned)
            # torch would keep them for `Wait` until all other nodes have run
            return None, None, *[None] * len(grads)
        domain = ctx.batch.ranks.domain
        every = zip(ctx.places, grads, strict=True)
        return None, None, *[None if g is None else p.whole(g, domain) for p, g in every]


class Mean(torch.autograd.Function):
    """The mean over ranks with other samples.

    What each does with it is averaged again in the end, so its gradient is the mean, too.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, ranks: Ranks, key: tuple[int, int]) -> Tensor:
        ctx.materialize_grads = False
        ctx.ranks, ctx.key = ranks, key
        heads = ranks.mean_heads
        heads.begin()
        flat = torch.cat([g.reshape(-1), heads.of(key, g)])
        (total,) = wire.all_reduce([flat], "sum", ranks.data)
        heads.read(key, total[-LENGTH:], [g.shape])
        return total[:-LENGTH].view(g.shape).div(ranks.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None, None]:
        return None if g is None else Mean.apply(g, ctx.ranks, ctx.key), None, None


class StandIn(_torch.Function):
    """The identity of what stands for a parameter in one call; its gradient is averaged as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Slot) -> Tensor:
        ctx.materialize_grads = False
        ctx.slot = slot
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None]:
        whole = None if g is None else ctx.slot.whole(g)
        return g if whole is None else whole, None


def _stand_ins(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What torch.func.functional_call is to put into a model: gradients of these are averaged.

    As those of the parameters that they stand for, and which the call does not see.
    """
    found = dict(given)
    for name, p in model.named_parameters(remove_duplicate=False):
        x, slot = given.get(name), getattr(p, "_shardtensor_slot", None)
        if x is None or x is p or not isinstance(slot, Slot) or slot.hook is None:
            continue
        if isinstance(x, ShardTensor) or not (x.requires_grad and torch.is_grad_enabled()):
            continue
        if _torch.functorch_level() is not None:
            raise UnsupportedOpError(
                f"torch.func.functional_call inside torch.func.grad or vjp, of {name}, whose "
                "gradient is averaged over the data axis: take torch.autograd.grad"
            )
        found[name] = StandIn.apply(x, slot)
    return found
