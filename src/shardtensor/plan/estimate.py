"""What one rank of a configuration holds, computes and sends in a step, found without running it.

A configuration is a mesh and options of `parallelize`. Its step runs on fake tensors as one rank of
a world that moves nothing: the same rules, so that what is held, computed and sent is that of the
real rank. Only time is a model: ops by the device's peaks, messages by the network's links.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from .. import cache
from .._torch import probe
from .._torch.autocast import as_on_gpus
from ..attention import RATES, Rates, assume
from ..caller import error_line
from ..comm import groups
from ..comm.counters import Sent
from ..compile.blocks import blocks_of
from ..containers import tensors
from ..errors import UnsupportedOpError
from ..observe.network import DGX_H100, Network
from ..observe.trace import trace
from ..rules.routes import are_kept
from ..train.around import around
from ..train.parallelize import adapt, parallelize
from ..train.tensor_parallel import tensor_parallel
from .device import A100, CPU, DEVICES, H100, H200, Device
from .step.away import Away
from .step.build import build
from .step.collector import collect
from .step.course import Course, course
from .step.inputs import inputs_of
from .step.ledger import Ledger, Turn
from .step.turns import paged
from .step.update import Update
from .task import Task
from .tree import GRADIENTS, Part, Places, Tree, parts
from .trees import called, filled
from .way import Layout, looked_at

__all__ = ["A100", "DEVICES", "H100", "H200", "Device", "Estimate", "Layout", "Task", "estimate"]


@dataclass(frozen=True)
class Estimate:
    """One configuration. Bytes and seconds are those of the rank that holds most.

    memory: bytes by kind when most are held. sent: its collectives. gathered: ops without a rule.
    compute, communication: seconds of a step; refused: why it cannot run. assumed: what was taken
    for values that only inputs decide, with the lines that read them. host: bytes in host memory.
    """

    layout: Layout
    memory: dict[str, int]
    sent: tuple[Sent, ...] = field(default=(), repr=False)
    gathered: tuple[str, ...] = ()
    compute: float = 0.0
    communication: float = 0.0
    flop: int = 0
    hides: float = 0.5
    refused: str = ""
    assumed: tuple[str, ...] = ()
    host: int = 0
    modules: dict[str, Part] = field(default_factory=dict, repr=False, compare=False)
    # what is held by kind as the step goes on
    course: Course | None = field(default=None, repr=False, compare=False)
    # bytes of the largest op's arguments and results; what the step makes, reads and ends, and
    # where ranks meet, if it was asked for
    largest: int = field(default=0, repr=False, compare=False)
    turns: tuple[Turn, ...] = field(default=(), repr=False, compare=False)

    def tree(self) -> Tree:
        """Memory and time by module; print it."""
        return Tree(self.modules, self.layout.options.checkpoint)

    @property
    def peak(self) -> int:
        """Bytes of a rank, at most, over the step."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float:
        """With `hides` of what is sent while ops run; by default half of it."""
        both = min(self.compute, self.communication)
        return self.compute + self.communication - self.hides * both

    def fits(self, device: Device) -> bool:
        """Whether it is not refused and a device holds it."""
        return not self.refused and self.peak <= device.among(self.layout.ranks).memory

    def collectives(self) -> dict[str, tuple[int, int, int]]:
        """Calls, messages and bytes by collective."""
        found: dict[str, Counter[str]] = {}
        for s in self.sent:
            found.setdefault(s.collective, Counter()).update(
                calls=1, messages=s.messages, bytes=s.bytes
            )
        return {k: (c["calls"], c["messages"], c["bytes"]) for k, c in found.items()}


def estimate(
    task: Task,
    layout: Layout,
    device: Device = H100,
    network: Network = DGX_H100,
    *,
    turns: bool = False,
) -> Estimate:
    """What one configuration needs.

    Of a rank in the middle, which has neighbours on all sides, and where shards are uneven also of
    the first, which has the largest: what needs more. Where the layout has sizes or speeds, memory
    is of the rank with the most rows, and time of the one that takes longest. Nothing is sent:
    fake tensors run in this process. turns: whether to note them, too.

    What fails is told in `refused` and not raised: UnsupportedOpError of the model; what depends on
    values (sort, masks, indices), which can be had by `rehearse`; ValueError where the output has
    no gradient.
    """
    device = device.among(layout.ranks)
    found = []
    for rank in looked_at(layout, task.shapes[0]):
        try:
            found.append(_of_rank(task, layout, rank, device, network, turns))
        except Exception as e:
            return Estimate(layout, {}, refused=_reason(e))
    most = max(found, key=lambda e: e.peak)
    # a rank's own speed is in its time already
    return replace(most, compute=max(e.compute for e in found)) if layout.speeds else most


def _of_rank(
    task: Task, layout: Layout, rank: int, device: Device, network: Network, turns: bool
) -> Estimate:
    """One rank's step on fake tensors: what it holds at its peak, computes and sends."""
    if torch.distributed.is_initialized():
        raise RuntimeError("plan in a process of its own: torch.distributed is initialised")
    cache.clear()
    # what is booked must be released when it is, not when the collector comes round
    collect()
    ledger = Ledger(turns=turns)
    chosen = assume(attention_rates(device, network, layout.ranks))
    drawn = torch.random.fork_rng(devices=[])
    world = probe.fake_world(rank, layout.ranks, ledger)
    with drawn, world, chosen, groups.taken_spread(ledger.known.assumed), casts_of(device):
        try:
            step = _prepared(task, layout, ledger, device)
            # routes of indices are found once: a step is one that has them
            for _ in range(2):
                at, begun, sent = len(ledger.moves), len(ledger.work), len(ledger.sent)
                begin = len(ledger.turns or ())
                ledger.phases.clear()
                with trace() as t:
                    ledger.heard, ledger.senders = t.sent, []
                    step()
                ledger.heard = ()
                if not are_kept():
                    break
            (memory, owned), work = ledger.peak(at), ledger.work[begun:]
            # ops alike have one cost
            costs = {id(w): device.bound(w) for w in {id(w): w for w in work}.values()}
            bounds = [costs[id(w)] for w in work]
            seconds = [s for _, s in bounds]
            messages = (*t.sent, *ledger.sent[sent:])
        finally:
            cache.clear()
            groups.forget()
    return Estimate(
        layout,
        memory,
        messages,
        tuple(dict.fromkeys(op for op, _ in t.gathered)),
        compute=sum(seconds) / (layout.speeds or {rank: 1.0})[rank],
        communication=sum(network.seconds(s) for s in messages),
        flop=sum(w.flop for w in work),
        hides=device.hides,
        assumed=tuple(ledger.known.assumed),
        host=ledger.most_away,
        modules=parts(
            (
                (name, *bound, w.flop)
                for name, bound, w in zip(ledger.workers[begun:], bounds, work, strict=True)
            ),
            owned.items(),
            (
                (name, s.bytes, network.seconds(s))
                for name, s in zip(_senders(ledger, messages), messages, strict=True)
            ),
        ),
        course=course(ledger, at, begun, seconds),
        largest=max((w.moved for w in work), default=0),
        turns=paged(ledger, begin) if turns else (),
    )


def _senders(ledger: Ledger, messages: tuple[Sent, ...]) -> list[str]:
    """The module of each message; those at the end, of no module, are of gradients."""
    return ledger.senders + [GRADIENTS] * (len(messages) - len(ledger.senders))


def has_blocks(task: Task) -> bool:
    """Whether the model has blocks that can be checkpointed."""
    ledger = Ledger()
    with probe.fake_world(0, 1, ledger):
        try:
            return bool(blocks_of(build(task.make, ledger), ()))
        except UnsupportedOpError:
            # every configuration tells it
            return False


def _reason(e: Exception) -> str:
    """Why a step cannot be planned, with the user's line and what to do."""
    line, text = error_line(e), (str(e).strip().splitlines() or [""])[0]
    at = f" ({line})" if line and line not in text else ""
    if isinstance(e, probe.depends_on_values()):
        return (
            f"depends on values{at}: give the input that they come from as a tensor, "
            "or rehearse it on a device"
        )
    kind = "" if isinstance(e, UnsupportedOpError) else f"{type(e).__name__}: "
    return f"{kind}{text}{at}"


def casts_of(device: Device) -> AbstractContextManager[None]:
    """Inside, autocast casts as it does on the device."""
    return nullcontext() if device.name == CPU else as_on_gpus()


def attention_rates(device: Device, network: Network, ranks: int) -> dict[int, Rates]:
    """What attention is chosen by: two FLOP a multiply-add, 26 bytes a merged element."""
    link = network.inner if ranks <= network.node else network.outer
    alike = RATES["cpu" if device.name == CPU else "cuda"][4]
    return {
        bits // 8: alike._replace(
            multiply=flops * device.efficiency / 2, merge=device.bandwidth / 26,
            latency=link.latency, bandwidth=link.bandwidth,
        )
        for bits, flops in device.flops.items()
        if bits % 8 == 0
    }  # fmt: skip


def _prepared(task: Task, layout: Layout, ledger: Ledger, device: Device) -> Callable[[], None]:
    """The step on this rank; the ledger is told what memory is for."""
    mesh = None
    if layout.ranks > 1:
        with probe.outside_fake():
            mesh = init_device_mesh(
                "cpu", tuple(layout.mesh.values()), mesh_dim_names=tuple(layout.mesh)
            )
    model = build(task.make, ledger).train(task.train)
    ledger.mark("buffers", model.buffers())
    options = replace(layout.options, sync=False, offload=False)
    if mesh is not None:
        if layout.tensor > 1:
            tensor_parallel(model, mesh["tensor"], task.tensor)
        parallelize(model, mesh, options, **({"data": "data"} if layout.data > 1 else {}))
    else:
        adapt(model, replace(options, fsdp=None))
    # a CPU's memory is the host's: nothing leaves it
    if layout.options.offload and device.name != CPU:
        around(model, lambda *_: Away(ledger))
    ledger.mark("parameters", model.parameters())
    ledger.places = Places(model)
    domain = None if mesh is None else mesh[tuple(f"dim{d}" for d in layout.dims)]
    inputs = inputs_of(task, layout, domain, ledger.known)
    ledger.mark("inputs", inputs)
    args, kwargs = called(model, filled(task.form, inputs))
    if not task.train:
        return lambda: _infer(model, args, kwargs)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UnsupportedOpError(
            "the model has no weights to train: plan it with train=False or, where its first "
            "forward makes them, let `make` call it once"
        )
    update = Update(task.optimizer, trained, ledger, task.booked, device.name != CPU)

    def step() -> None:
        ledger.phase("forward")
        loss = _loss(task, model(*args, **kwargs))
        ledger.phase("backward")
        loss.backward()
        del loss
        ledger.mark("gradients", (p.grad for p in model.parameters()))
        ledger.phase("optimizer")
        update()

    return step


@torch.no_grad()
def _infer(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    model(*args, **kwargs)


def _loss(task: Task, out: Any) -> Tensor:
    if task.loss is not None:
        return task.loss(out)
    found = [x for x in tensors(out) if x.is_floating_point() and x.requires_grad]
    if not found:
        raise ValueError("the model's output has no gradient: give a loss")
    total = found[0].float().square().mean()
    for x in found[1:]:
        total = total + x.float().square().mean()
    return total
