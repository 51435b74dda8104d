"""A model on shards held against itself on one device: its results, then, if wrong, each op."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..._torch import probe
from ...caller import error_line
from ...containers import mapped, tensors
from ...dispatch.fallback import FallbackWarning
from ...errors import DivergenceError, RankError, UnsupportedOpError
from ...later import dt
from ...observe.trace import trace
from ...observe.whole import Watch, Whole, whole
from ...ranks.simulate import simulate
from ...ranks.testing import make_mesh
from ...ranks.tolerance import ROUNDING, differentiable, gap, shaken
from ...tensor.construct import distribute_tensor
from ...tensor.random import match_single_device
from ..trees import dims_like
from . import causes
from .blame import Blame, Traced
from .copies import casts, copied, left_alone, seed, states
from .layouts import Layout, in_job
from .record import Held, Run, Widened, doubled, run
from .report import Finding

_WIDE = {torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64,
         torch.complex64: torch.complex128}  # fmt: skip


@dataclass
class Told:
    """What a rank found. wrong: results that differ, and by how much."""

    raised: Finding | None = None
    most: float = 0.0
    rounding: bool = False
    wrong: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    gathered: dict[str, int] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)


@dataclass
class Case:
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Callable[[Any], Tensor]
    rtol: float | None
    double: bool
    notes: list[str] = field(default_factory=list)
    random: bool = False
    widened: bool = False
    want: Run = field(default_factory=Run)
    # the same with inputs that differ in the last digits: what rounding alone does
    shaken: Run = field(default_factory=Run)
    eps: float = 0.0
    allowed: float = ROUNDING
    raised: dict[int, Finding] = field(default_factory=dict)

    def findings(self, layouts: Sequence[Layout]) -> list[Finding]:
        """On each layout, after the runs on one device."""
        with left_alone(self.model, tensors((self.args, self.kwargs))), probe.as_written():
            self._alone()
            found = [self._on(layout) for layout in layouts]
            if all(f.ok for f in found):
                self._whole(layouts[0])
            return found

    def _whole(self, layout: Layout) -> None:
        """A note of what ran whole on every rank, if it is much."""
        try:
            ran = self._everywhere(layout, self._watched)[0]
        except (RankError, _Raised):
            return
        if ran.of_bytes > 0.1:
            self.notes.append(str(ran))

    def _watched(self, layout: Layout) -> Whole:
        watches: list[Watch] = []
        self._sharded(layout, Run(), record=False, watch=watches)
        return whole(watches[0])

    def _alone(self) -> None:
        if self.double:
            try:
                self.want = self._serial(record=True)
            except (RuntimeError, TypeError, ValueError) as e:
                self.double = False
                self.notes.append(f"compared in the model's own dtype; in float64 it raises: {e}")
        self.eps, given = torch.finfo(torch.float64).eps, self.rtol
        self.rtol = given or (1e-8 if self.double else None)
        if not self.double:
            self.want = self._serial(record=True)
            narrow = [x.dtype for x in tensors((self.args, self.kwargs)) if differentiable(x)]
            self.eps = max((torch.finfo(d).eps for d in narrow), default=self.eps)
            self.rtol = self.rtol or max(1e-3, 8 * self.eps)
        elif self.want.coarse is not None:
            dtype, line = self.want.coarse
            narrow_run, self.widened = self.want, True
            at = f" ({line})" if line else ""
            try:
                self.want = self._serial(record=True)
                self.notes.append(f"casts to {dtype} inside the model{at} were made to float64")
            except (RuntimeError, TypeError, ValueError):
                self.want, self.widened = narrow_run, False
            if self.want.coarse is not None:
                self._narrow(self.want.coarse[0], given)
                self.notes.append(f"the model computes in {self.want.coarse[0]} inside{at}")
        elif casts(self.model):
            self._narrow(torch.float32, given)
            self.notes.append("TorchScript inside casts: held to the rounding of float32")
        self.shaken = self._serial(shake=self.eps)
        if self.want.drawn:
            self._drew(self._serial(number=1))

    def _narrow(self, dtype: torch.dtype, given: float | None) -> None:
        """Allow for a cast to dtype inside."""
        self.eps, self.allowed = torch.finfo(dtype).eps, 1e2
        self.rtol = given or 8 * self.eps

    def _drew(self, other: Run) -> None:
        """Whether results depend on random numbers. other: with another seed."""
        self.random = any(
            not torch.equal(x.local, y.local)
            for k, x in self.want.results.items()
            if x is not None and (y := other.results.get(k)) is not None
        )
        if self.random:
            self.notes.append(
                "the model draws random numbers: ranks drew those of one device "
                "(st.random.match_single_device); in training, shards draw their own"
            )

    def _serial(self, number: int = 0, shake: float = 0.0, record: bool = False) -> Run:
        found = Run()
        with self._as_asked():
            model, args, kwargs = self._fresh()
            if shake:
                args, kwargs = mapped(
                    lambda x: shaken(x, shake) if isinstance(x, Tensor) else x, (args, kwargs)
                )
            seed(number)
            before = states(self.model)
            run(model, args, kwargs, self.loss, found, record)
            found.drawn = states(self.model) != before
        return found

    @contextmanager
    def _as_asked(self) -> Iterator[None]:
        """In float64, if it is to be so."""
        with ExitStack() as stack:
            if self.double:
                stack.enter_context(doubled())
            if self.widened:
                stack.enter_context(Widened())
            yield

    def _fresh(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        model = copied(self.model)
        if self.double:
            model._apply(lambda x: x.to(_WIDE.get(x.dtype, x.dtype)))
        args, kwargs = mapped(self._argument, (self.args, self.kwargs))
        return model, args, kwargs

    def _argument(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().clone()
        if not differentiable(x):
            return x
        return (x.to(_WIDE.get(x.dtype, x.dtype)) if self.double else x).requires_grad_()

    def _on(self, layout: Layout) -> Finding:
        """What all ranks found together."""
        name = str(layout)
        self.raised.clear()
        try:
            told = self._everywhere(layout, self._results)
        except RankError as e:
            for rank, alone in self.raised.items():
                return replace(alone, what=f"on rank {rank} only: {alone.what}")
            return Finding(name, "parted", float("inf"), "the model", str(e), causes.PARTED)
        raised = {r: t.raised for r, t in enumerate(told) if t.raised is not None}
        for rank, found in raised.items():
            only = f"on rank {rank} only: " if len(raised) < len(told) else ""
            return replace(found, what=only + found.what)
        wrong = {k: v for t in told for k, v in t.wrong.items()}
        if wrong:
            found = self._blamed(layout, wrong)
        else:
            how = "rounding" if any(t.rounding for t in told) else "right"
            found = Finding(name, how, max(t.most for t in told))
        for t in told:
            found.add(t.gathered, t.lines, t.errors)
        return found

    def _everywhere(self, layout: Layout, fn: Callable[[Layout], Any]) -> list[Any]:
        """What fn gives on each rank."""
        with warnings.catch_warnings(), doubled() if self.double else ExitStack():
            # of the process, which simulated ranks share
            warnings.simplefilter("ignore", FallbackWarning)
            return self._on_ranks(layout, fn)

    def _on_ranks(self, layout: Layout, fn: Callable[[Layout], Any]) -> list[Any]:
        n = prod(layout.shape)
        if in_job():
            if n != dist.get_world_size():
                raise ValueError(f"mesh shape {layout.shape} on {dist.get_world_size()} ranks")
            every: list[Any] = [None] * n
            dist.all_gather_object(every, fn(layout))
            return every
        return simulate(n, fn, layout)

    def _sharded(
        self, layout: Layout, found: Run, record: bool, watch: list[Watch] | None = None
    ) -> None:
        """Run the model on this rank's shards."""
        mesh = make_mesh(layout.shape)
        model, args, kwargs = self._fresh()
        lead = tensors((args, kwargs))[0]

        def place(x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            if (dims := dims_like(x.shape, lead.shape, layout.dims)) is None:
                return x
            on = [dt.Shard(d) for d in dims]
            of = dict(zip(layout.dims, dims, strict=True))
            sizes = {of[d]: n for d, n in layout.sizes.items()}
            put = distribute_tensor(x.detach(), mesh, on, src_data_rank=None, sizes=sizes)
            return put.requires_grad_(x.requires_grad)

        seed(0)
        with ExitStack() as stack:
            if self.widened:
                stack.enter_context(Widened())
            try:
                args, kwargs = mapped(place, (args, kwargs))
                if self.random:
                    stack.enter_context(match_single_device())
                around = None
                if watch is not None:
                    watch.append(around := Watch(model))
                run(model, args, kwargs, self.loss, found, record, around)
            except RankError:
                raise
            except Exception as e:
                self.raised[mesh.get_rank()] = found_here = _refused(str(layout), model, e)
                raise _Raised(found_here) from e

    def _results(self, layout: Layout) -> Told:
        got, told = Run(), Told()
        with trace() as t:
            try:
                self._sharded(layout, got, record=False)
            except _Raised as e:
                return Told(e.found)
            self._compare(got, told)
        for op, nbytes in t.gathered:
            told.gathered[op] = told.gathered.get(op, 0) + nbytes
        # rules, too, gather what they can't do otherwise
        told.lines = {
            c.op: c.line for c in t.calls if c.rule == "fall_back" or c.op in told.gathered
        }
        return told

    def _compare(self, got: Run, told: Told) -> None:
        """Outputs, gradients, buffers; of sums that are pending the whole."""
        scales = {"output": 0.0, "gradient": 0.0, "buffer": 0.0}
        for k, x in self.want.results.items():
            kind = next(s for s in scales if k.startswith(s))
            scales[kind] = max(scales[kind], 0.0 if x is None else x.most)
        for k in {**self.want.results, **got.results}:
            if (k in self.want.results) != (k in got.results):
                told.wrong[k] = "is there on one device only" if k in self.want.results else (
                    "is there on shards only")  # fmt: skip
                continue
            off, scale, text = self._far(got.results[k], self.want.results[k],
                                         self.shaken.results.get(k))  # fmt: skip
            kind = next(s for s in scales if k.startswith(s))
            share = off / scale if scale else off
            # of the model's largest gradient that can be rounding alone
            if text and not off <= 1e-3 * (self.rtol or 0.0) * scales[kind]:
                told.wrong[k] = text
            else:
                if off > (self.rtol or 0.0) * scale:
                    told.rounding |= off > (self.rtol or 0.0) * scales[kind]
                    share = off / scales[kind] if scales[kind] else 0.0
                told.most = max(told.most, share)
            told.errors[k] = share

    def _far(
        self, got: Held | None, want: Held | None, shaken: Held | None
    ) -> tuple[float, float, str]:
        """(difference, scale, text), text "" where rounding may: it moves shaken from want."""
        whole = None if want is None else want.local
        if got is None or whole is None:
            off, scale = gap(None if got is None else got.added().local, whole)
            if got is None and want is not None:
                scale = want.most
        else:
            if got.shape != whole.shape:
                return (
                    float("inf"),
                    1.0,
                    f"has the shape {tuple(got.shape)}, not {tuple(whole.shape)}",
                )
            got = got.added()
            off, _ = gap(got.local, got.part(whole))
            scale = 0.0 if want is None else want.most
        third = None if shaken is None else shaken.local
        if off <= (self.rtol or 0.0) * scale or off <= self.allowed * gap(third, whole)[0]:
            return off, scale, ""
        share = off / scale if scale else off
        text = f"differs by {share:.0e} of its largest value"
        if self.double and share < 1e-6:
            text += " (as rounding in float32: if TorchScript or a custom op casts, double=False)"
        return off, scale, text

    def _events(self, layout: Layout) -> Traced:
        """The same run with every op looked at."""
        got, seen = Run(), Traced()
        with trace() as t:
            self._sharded(layout, got, record=True)
        for c in t.calls:
            seen.calls.setdefault(c.line, []).append(c.op)
        for key, event in got.events.items():
            if key not in self.want.events and event.op:
                seen.other.setdefault(event.module, (event.op, event.line))
        for key, want in self.want.events.items():
            mine, third = got.events.get(key), self.shaken.events.get(key)
            if mine is None:
                continue
            far = self._far(mine.held, want.held, third.held if third else None)
            text = seen.noted(key, *far)
            if not seen.wrong:
                seen.parts[key] = _part(mine.held, want.held)
            if text:
                seen.wrong[key] = text
            if want.gradient is not None and mine.gradient is not None:
                shaken = third.gradient if third else None
                if text := self._far(mine.gradient, want.gradient, shaken)[2]:
                    seen.gradients[key] = text
        return seen

    def _blamed(self, layout: Layout, wrong: dict[str, str]) -> Finding:
        """The first module and op that is wrong."""
        if not self.shaken.events:
            self.shaken = self._serial(shake=self.eps, record=True)
        try:
            seen = self._everywhere(layout, self._events)
        except (RankError, _Raised):
            seen = []
        return Blame(str(layout), self.model, self.want, seen).of(wrong)


class _Raised(Exception):
    """The model raised on this rank."""

    def __init__(self, found: Finding) -> None:
        super().__init__(str(found))
        self.found = found


def _refused(layout: str, model: nn.Module, error: Exception) -> Finding:
    """An exception in the sharded run."""
    name, op = causes.place(error, model)
    name = name or "backward"
    line = error_line(error)
    what = f"{type(error).__name__}: {error}" + (f" ({line})" if line else "")
    advice = "; ".join(causes.signs(model, name)) if name != "backward" else ""
    verdict = "refused" if isinstance(error, UnsupportedOpError) else "raises"
    if isinstance(error, DivergenceError):
        verdict, advice = "parted", causes.PARTED
    elif verdict == "raises" and not advice:
        advice = "On one device it runs: look for sizes taken from a local tensor."
    return Finding(layout, verdict, float("inf"), name, what, advice, op, line)


def _part(got: Held, want: Held) -> causes.Part:
    dims = () if got.spec is None else tuple(d for d, x in enumerate(got.spec.dims) if x.axes)
    return causes.Part(got.local, got.part(want.local), dims)
