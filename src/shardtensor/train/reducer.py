"""Gradients of parameters summed over ranks in the graph itself, many in one message.

Between a parameter and its uses on shards stand two nodes. In backward `Start` runs when the last
use has given its part, and sends the parts of a bucket once all are there that this backward will
bring. `Wait` runs after all else and passes the sum on to the parameter. So whatever looks at the
gradient (hooks, autograd.grad, DDP, an optimizer inside backward) sees the whole one, and nothing
is left of a backward that breaks off: its state belongs to the graph and to torch's graph task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .. import _torch, comm
from .._torch import modules
from ..comm import wire
from ..comm.sums import reduce
from ..errors import UnsupportedOpError
from ..tensor import ShardTensor
from .checksum import LENGTH, Heads


class Ranks:
    """Whom gradients are summed and averaged over, and what is under way to them.

    domain: ranks that share samples, whose parts are added up. data: those that have the same part
    of other samples, over which gradients are averaged. everyone: both.
    """

    def __init__(self, domain: str, data: str, everyone: str) -> None:
        self.domain, self.data, self.everyone = domain, data, everyone
        self.copies = comm.size(data)
        self.sent: list[Message] = []
        self.heads, self.mean_heads = Heads(comm.size(everyone)), Heads(self.copies)
        self.buckets = 0

    def send(self, flat: Tensor, lengths: list[int], task: int) -> Message:
        """Begin to sum a vector in place."""
        for message in [m for m in self.sent if m.task != task]:
            # of a backward that broke off, on all ranks at the same place
            message.wait()
        on_wire = torch.view_as_real(flat).view(-1) if flat.is_complex() else flat
        work = None
        if comm.size(self.everyone) > 1:
            work = wire.start_all_reduce(on_wire, "sum", self.everyone, lengths)
        message = Message(self, flat, work, task)
        self.sent.append(message)
        return message


class Message:
    """A vector of gradients that is being summed."""

    def __init__(
        self, ranks: Ranks, flat: Tensor, work: Callable[[], Any] | None, task: int
    ) -> None:
        self.ranks, self.flat, self.work, self.task = ranks, flat, work, task
        # what its head says
        self.key: Any = None
        self.shapes: list[Any] = []

    def wait(self) -> None:
        """End the sum, and average."""
        if self not in self.ranks.sent:
            return
        self.ranks.sent.remove(self)
        if self.work is not None:
            self.work()
        if self.key is not None:
            self.ranks.heads.read(self.key, self.flat[-LENGTH:], self.shapes)
        if self.ranks.copies > 1:
            self.flat.div_(self.ranks.copies)


@cache
def _watch_calls() -> None:
    modules.install(_stand_ins)


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
        waiting: dict[Any, Bucket] = {}
        # backward makes the last parameters' gradients first
        for p in reversed(list(parameters)):
            if not (p.is_floating_point() or p.is_complex()):
                continue
            key = (p.dtype, p.device)
            if key not in waiting:
                waiting[key] = Bucket(self.ranks)
                self.buckets.append(waiting[key])
            if waiting[key].add(p) >= self.most:
                del waiting[key]

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
        self.values: dict[int, Tensor] = {}

    def add(self, parameter: nn.Parameter) -> int:
        """Take a parameter; returns the bucket's bytes."""
        slot = Slot(self, len(self.slots), parameter)
        self.slots.append(slot)
        parameter._shardtensor_slot = slot  # type: ignore[attr-defined]
        local = parameter.detach()
        if isinstance(local, DTensor):
            local = local.to_local()
        self.nbytes += local.numel() * local.element_size()
        return self.nbytes

    def use(self, index: int, x: Tensor) -> Tensor:
        """A parameter's value, whose gradient is summed; its uses in one graph share the sum."""
        value = self.values.get(index)
        if value is None or not _torch.same_memory(value, x):
            if self.batch is None or value is not None:
                self.batch, self.values = Batch(self), {}
            value = self.values[index] = self.batch.use(index, x)
        return value

    def close(self, batch: Batch) -> None:
        """Backward has come to a graph; later uses are in another."""
        if batch is self.batch:
            self.batch, self.values = None, {}


class Slot:
    """One parameter's place in a bucket: an attribute of the parameter, which `vary` looks for."""

    def __init__(self, bucket: Bucket, index: int, parameter: nn.Parameter) -> None:
        self.group, self.ranks, self.index = bucket.ranks.domain, bucket.ranks, index
        self.key = (bucket.number, index)
        self.placements = parameter.placements if isinstance(parameter, DTensor) else None
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
        return None if bucket is None else bucket.use(self.index, x)

    def arrive(self, grad: Tensor) -> Tensor | None:
        """The parameter's gradient, whole and averaged; the hook that runs before all others."""
        arrived, self.arrived = self.arrived, None
        return self.whole(grad, arrived)

    def whole(self, grad: Tensor, arrived: Tensor | None = None) -> Tensor | None:
        """The gradient whole and averaged, None if it is already, as what has arrived is."""
        if not isinstance(grad, DTensor):
            return None if grad is arrived else self._averaged(grad)
        whole = grad
        if grad.placements != self.placements:
            # ops of DTensors alone may leave addends
            whole = grad.redistribute(placements=self.placements)
        local = whole.to_local()
        if local is not arrived and self.ranks.copies > 1:
            whole = DTensor.from_local(
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
        self.starts: dict[int, ref[Any]] = {}
        # by torch's number of the backward pass
        self.passes: dict[int, Pass] = {}

    def use(self, index: int, x: Tensor) -> Tensor:
        """x behind a `Wait` and a `Start`."""
        held = _torch.apply(Wait, x, self, index)
        _torch.run_last(held.grad_fn)
        value = _torch.apply(Start, held, self, index)
        self.starts[index] = ref(value.grad_fn)
        return value

    def add(self, index: int, part: Tensor) -> None:
        """Take this rank's part of a gradient; send all parts if it is the last."""
        bucket = self._bucket()
        if bucket is not None:
            bucket.close(self)
        task = _torch.graph_task()
        found = self.passes.get(task)
        if found is None:
            nodes = {i: node() for i, node in self.starts.items()}
            expected = {i for i, n in nodes.items() if n is not None and _torch.will_run(n)}
            found = self.passes[task] = Pass(self, expected, task)
        found.add(index, part)

    def take(self, index: int) -> Tensor:
        """The sum of all ranks' parts."""
        task = _torch.graph_task()
        found = self.passes[task]
        whole = found.take(index)
        if not found.expected and not found.taken:
            del self.passes[task]
        slot = self.slots[index]
        if slot.hook is not None:
            slot.arrived = whole
        return whole


class Pass:
    """The parts of a bucket in one backward."""

    def __init__(self, batch: Batch, expected: set[int], task: int) -> None:
        self.ranks, self.number, self.expected, self.task = (
            batch.ranks,
            batch.number,
            expected,
            task,
        )
        self.parts: dict[int, Tensor] = {}
        self.taken: dict[int, tuple[Message, Tensor]] = {}

    def add(self, index: int, part: Tensor) -> None:
        self.parts[index] = part
        self.expected.discard(index)
        if not self.expected:
            self.send()

    def send(self) -> None:
        """Begin to sum what is there."""
        parts = dict(sorted(self.parts.items()))
        shapes = [p.shape for p in parts.values()]
        vectors = [p.reshape(-1) for p in parts.values()]
        key = None
        if self.ranks.copies > 1:
            # the others' samples may have taken another way
            key = (self.number, *parts)
            self.ranks.heads.begin()
            vectors.append(self.ranks.heads.of(key, vectors[0]))
        lengths = [v.numel() for v in vectors]
        message = self.ranks.send(torch.cat(vectors), lengths, self.task)
        message.key, message.shapes = key, shapes
        for index, shape, view in zip(parts, shapes, message.flat.split(lengths), strict=False):
            self.taken[index] = message, view.view(shape)
        self.parts.clear()

    def take(self, index: int) -> Tensor:
        if index in self.parts:
            # parts on other devices are still to come
            self.send()
        message, whole = self.taken.pop(index)
        message.wait()
        # where it came, but a tensor of its own: no view, whose versions are those of all
        found = whole.new_empty(0)
        return found.set_(
            whole.untyped_storage(), whole.storage_offset(), whole.shape, whole.stride()
        )


class Wait(torch.autograd.Function):
    """The identity; backward gives the sum of the parts that `Start` took."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch, index: int) -> Tensor:
        ctx.batch, ctx.index = batch, index
        ctx.set_materialize_grads(False)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None, None]:
        # a gradient of this gradient is wanted: `Start` summed it
        return (g if torch.is_grad_enabled() else ctx.batch.take(ctx.index)), None, None


class Start(torch.autograd.Function):
    """The identity; backward hands in this rank's part of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch, index: int) -> Tensor:
        ctx.batch, ctx.index = batch, index
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None]:
        if not torch.is_grad_enabled():
            ctx.batch.add(ctx.index, g)
            # torch would keep it for `Wait` until all other nodes have run
            return None, None, None
        if comm.size(ctx.batch.ranks.domain) > 1:
            (g,) = reduce([g], "sum", ctx.batch.ranks.domain)
        return g, None, None


class Mean(torch.autograd.Function):
    """The mean over ranks with other samples.

    What each does with it is averaged again in the end, so its gradient is the mean, too.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, ranks: Ranks, key: tuple[int, int]) -> Tensor:
        ctx.ranks, ctx.key = ranks, key
        heads = ranks.mean_heads
        heads.begin()
        flat = torch.cat([g.reshape(-1), heads.of(key, g)])
        (total,) = wire.all_reduce([flat], "sum", ranks.data)
        heads.read(key, total[-LENGTH:], [g.shape])
        return total[:-LENGTH].view(g.shape).div(ranks.copies)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return Mean.apply(g, ctx.ranks, ctx.key), None, None


class StandIn(torch.autograd.Function):
    """The identity of what stands for a parameter in one call; its gradient is averaged as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slot: Slot) -> Tensor:
        ctx.slot = slot
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        whole = ctx.slot.whole(g)
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
        found[name] = _torch.apply(StandIn, x, slot)
    return found
