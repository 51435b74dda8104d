"""`check`: is my model right when it is sharded? And if not, which module, and what to do."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Shard

from ..caller import error_line
from ..comm.observers import simulated_rank
from ..dispatch.fallback import FallbackWarning
from ..errors import DivergenceError, RankError, UnsupportedOpError
from ..observe.trace import trace
from ..ranks.simulate import simulate
from ..ranks.testing import make_mesh, tensors
from ..ranks.tolerance import ROUNDING, gap, shaken
from ..tensor.construct import distribute_tensor
from ..tensor.random import match_single_device
from .activations import Run, run


@dataclass
class Finding:
    """What was found on one layout. error: the largest relative one, of any output or gradient.

    module, what, advice: where it is not right; gathered: ops without a rule, and their bytes.
    """

    layout: str
    ok: bool
    error: float = 0.0
    module: str = ""
    what: str = ""
    advice: str = ""
    gathered: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.ok:
            text = f"right on {self.layout}: largest relative difference {self.error:.0e}"
        else:
            text = f"NOT right on {self.layout}: {self.module}: {self.what}"
            text += f"\n    {self.advice}" if self.advice else ""
        for op, nbytes in self.gathered.items():
            text += f"\n    {op} has no rule: it gathers {nbytes} bytes on every rank (right, but "
            text += "memory grows with the global size; see st.rule and docs/errors.md)"
        return text


@dataclass
class Report:
    """The findings of all layouts. notes: what was done to make runs comparable."""

    findings: list[Finding]
    notes: list[str]

    @property
    def ok(self) -> bool:
        return all(f.ok for f in self.findings)

    def __str__(self) -> str:
        return "\n".join(map(str, [*self.findings, *self.notes]))


def check(
    model: nn.Module,
    inputs: Tensor | Sequence[Any],
    placements: Sequence[Placement],
    mesh_shapes: Sequence[Sequence[int]] | None = None,
    *,
    loss: Callable[[Any], Tensor] | None = None,
    double: bool = True,
    rtol: float | None = None,
) -> Report:
    """Hold a model, sharded, against itself on one device: values, gradients, buffers, by module.

    inputs: of forward; small ones will do. placements: one for each mesh axis, `Shard(dim)`, for
    every tensor input that has this dim in the size of the first one's; others stay plain.
    mesh_shapes: default (2,) and (3,) for one axis, (2, 2) for two. Each is tried with even shards
    and with uneven ones, of which one is empty where there are three. loss: of the output; default:
    a fixed random combination of it.
    double: compare in float64, so that rounding does not count (where the model takes it). rtol: of
    the largest value, default 1e-8 in float64, 1e-3 in float32.
    Ranks are simulated in this process; where torch.distributed is initialised, they are its ranks,
    and mesh_shapes must be of so many. The model and the random state are left as they were.
    """
    args = tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,)
    first = next((x for x in args if isinstance(x, Tensor)), None)
    if first is None or not all(
        isinstance(p, Shard) and -first.ndim <= p.dim < first.ndim for p in placements
    ):
        raise ValueError(
            f"placements {list(placements)}: one Shard(dim of the first tensor) an axis"
        )
    shapes = mesh_shapes or ([(2,), (3,)] if len(placements) == 1 else [(2,) * len(placements)])
    if any(len(s) != len(placements) for s in shapes):
        raise ValueError(f"mesh shapes {list(shapes)} for {len(placements)} placements")
    notes: list[str] = []
    with torch.random.fork_rng(devices=[]):
        case = _Case(model, args, tuple(placements), loss or _combination, rtol, double, notes)
        case.alone()
        findings = [
            case.on(shape, uneven)
            for shape in shapes
            for uneven in (False, True)
            if not uneven or _cuts(first, placements, shape, True)
        ]
    return Report(findings, notes)


def _combination(out: Any) -> Tensor:
    g = torch.Generator().manual_seed(17)
    found = [x for x in tensors(out) if x.is_floating_point() or x.is_complex()]
    weights = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in found]
    parts = [
        (x * w.to(x.device, x.dtype)).real if x.is_complex() else x * w.to(x.device, x.dtype)
        for x, w in zip(found, weights, strict=True)
    ]
    if not parts:
        raise ValueError("the model's output has no floating-point tensor: give a loss")
    total = parts[0].sum()
    for p in parts[1:]:
        total = total + p.sum()
    return total


@dataclass
class _Case:
    model: nn.Module
    args: tuple[Any, ...]
    placements: tuple[Placement, ...]
    loss: Callable[[Any], Tensor]
    rtol: float | None
    double: bool
    notes: list[str]
    random: bool = False
    want: Run = field(default_factory=Run)
    # the same with inputs that differ in the last digits: what rounding alone does
    shaken: Run = field(default_factory=Run)
    # exceptions of simulated ranks, by rank
    raised: dict[int, Finding] = field(default_factory=dict)

    def alone(self) -> None:
        """The run on one device, twice if numbers are drawn."""
        if self.double:
            try:
                self.want = self._serial(0)
            except (RuntimeError, TypeError) as e:
                self.double = False
                self.notes.append(f"compared in the model's own dtype; in float64 it raises: {e}")
        if not self.double:
            self.want = self._serial(0)
        self.shaken = self._serial(0, shake=True)
        other = self._serial(1)
        self.random = any(
            not torch.equal(a.value, b.value)
            for a, b in zip(self.want.seen, other.seen, strict=True)
        )
        if self.random:
            self.notes.append(
                "the model draws random numbers: ranks drew those of one device "
                "(st.random.match_single_device); in training, shards draw their own"
            )

    def _serial(self, seed: int, shake: bool = False) -> Run:
        model, args = self._fresh()
        found = Run()
        if shake:
            args = tuple(shaken(x) if isinstance(x, Tensor) else x for x in args)
        torch.manual_seed(seed)
        run(model, args, self.loss, found)
        return found

    def _fresh(self) -> tuple[nn.Module, tuple[Any, ...]]:
        model = copy.deepcopy(self.model)
        model.zero_grad(set_to_none=True)
        if self.double:
            model.double()
        return model, tuple(map(self._argument, self.args))

    def _argument(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        x = x.detach().clone()
        if not (x.is_floating_point() or x.is_complex()):
            return x
        return (x.to(_WIDE.get(x.dtype, x.dtype)) if self.double else x).requires_grad_()

    def on(self, shape: Sequence[int], uneven: bool) -> Finding:
        """What is found on one mesh shape."""
        first = next(x for x in self.args if isinstance(x, Tensor))
        sizes = _cuts(first, self.placements, shape, uneven)
        layout = f"{' x '.join(map(str, shape))} ranks" + (
            f", dim {next(iter(sizes))} in {list(next(iter(sizes.values())))}" if sizes else ""
        )
        if dist.is_initialized() and simulated_rank() is None:
            if prod(shape) != dist.get_world_size():
                raise ValueError(f"mesh shape {tuple(shape)} on {dist.get_world_size()} ranks")
            return self._on_rank(layout, shape, sizes)
        self.raised.clear()
        try:
            return simulate(prod(shape), self._on_rank, layout, shape, sizes)[0]
        except RankError as e:
            for rank, alone in self.raised.items():
                return replace(alone, what=f"on rank {rank} only: {alone.what}")
            return Finding(layout, False, float("inf"), "the model", str(e), _ADVICE_PARTED)

    def _on_rank(
        self, layout: str, shape: Sequence[int], sizes: dict[int, Sequence[int]]
    ) -> Finding:
        """What this rank finds on a layout: the model on shards, module by module."""
        mesh = make_mesh(shape)
        model, args = self._fresh()
        lead = next(x for x in args if isinstance(x, Tensor))
        dims = [p.dim % lead.ndim for p in self.placements]  # type: ignore[attr-defined]

        def place(x: Any) -> Any:
            alike = isinstance(x, Tensor) and all(
                d < x.ndim and x.shape[d] == lead.shape[d] for d in dims
            )
            if not alike:
                return x
            put = distribute_tensor(
                x.detach(), mesh, [Shard(d) for d in dims], src_data_rank=None, sizes=sizes
            )
            return put.requires_grad_(x.requires_grad)

        got = Run()
        torch.manual_seed(0)
        with warnings.catch_warnings(), trace() as t:
            warnings.simplefilter("ignore", FallbackWarning)
            try:
                args = tuple(map(place, args))
                if self.random:
                    with match_single_device():
                        run(model, args, self.loss, got)
                else:
                    run(model, args, self.loss, got)
            except RankError:
                raise
            except Exception as e:
                found = _refused(layout, model, got, e)
                self.raised[mesh.get_rank()] = found
                return found
        found = self._compare(layout, model, got)
        for op, nbytes in t.gathered:
            found.gathered[op] = found.gathered.get(op, 0) + nbytes
        return found

    def _compare(self, layout: str, model: nn.Module, got: Run) -> Finding:
        """Against one device: forward in the order of execution, then backward."""
        want, shaken = self.want, self.shaken
        rtol = self.rtol or (1e-8 if self.double else 1e-3)
        most = 0.0

        def far(a: Tensor | None, b: Tensor | None, c: Tensor | None) -> str:
            """By how much a differs from b, "" where rounding may: it moves c away from b."""
            nonlocal most
            off, scale = gap(a, b)
            if off <= rtol * scale:
                most = max(most, off / scale if scale else 0.0)
                return ""
            if off <= ROUNDING * gap(c, b)[0]:
                return ""
            return f"differs by {off / scale if scale else off:.0e} of its largest value"

        names = [s.module for s in want.seen]
        if [s.module for s in got.seen] != names:
            ran = [s.module for s in got.seen]
            i = next((i for i, (a, b) in enumerate(zip(ran, names, strict=False)) if a != b), 0)
            return _wrong(layout, model, names[i], "other modules run than on one device")
        for s, w, c in zip(got.seen, want.seen, shaken.seen, strict=True):
            if s.value.shape != w.value.shape:
                shapes = f"{tuple(s.value.shape)}, not {tuple(w.value.shape)}"
                return _wrong(layout, model, s.module, f"its output has the shape {shapes}")
            if off := far(s.value, w.value, c.value):
                return _wrong(layout, model, s.module, f"its output {off}")
        last = ""
        for s, w, c in zip(*map(reversed, (got.seen, want.seen, shaken.seen)), strict=True):
            if off := far(s.gradient, w.gradient, c.gradient):
                what = f"the gradient that it gives to the output of {s.module} {off}"
                return _wrong(layout, model, last or s.module, what)
            if s.module != "the model" and not any(model.get_submodule(s.module).children()):
                last = s.module
        for what in ("gradients", "buffers"):
            mine, theirs, third = (getattr(r, what) for r in (got, want, shaken))
            for k, x in mine.items():
                if off := far(x, theirs[k], third[k]):
                    owner = k.rpartition(".")[0] or "the model"
                    name = "gradient of" if what == "gradients" else "buffer"
                    return _wrong(layout, model, owner, f"the {name} {k} {off}")
        return Finding(layout, True, most)


_WIDE = {torch.float32: torch.float64, torch.float16: torch.float64, torch.bfloat16: torch.float64,
         torch.complex64: torch.complex128}  # fmt: skip
_ADVICE_PARTED = (
    "Ranks did not run the same ops: look for a branch on the rank, on a local size or on a value "
    "that differs between ranks (x.to_local(), x.to_local().shape)."
)
# in a module's source: what goes wrong on shards, and what to do
_SIGNS = {
    r"\.to_local\(": "to_local() gives this rank's part only: use the global tensor, or a rule "
    "(docs/rules.md) for what needs the local one",
    r"torch\.distributed|\bdist\.\w+\(": "it communicates by itself: leave that to the ops",
    r"\.data_ptr\(": "it reads memory: register what launches the kernel with st.rule",
    r"\.numpy\(\)": "numpy() is the global value, copied and without gradient: use torch ops",
    r"\.data\b": ".data has no gradient and no checks: use detach()",
    r"torch\.autograd\.Function|\.apply\(": "a torch.autograd.Function runs on shards: if it mixes "
    "rows, give it a rule with st.rule (docs/rules.md)",
}


def _wrong(layout: str, model: nn.Module, name: str, what: str) -> Finding:
    return Finding(layout, False, float("inf"), name, what, _advice(model, name))


def _refused(layout: str, model: nn.Module, got: Run, error: Exception) -> Finding:
    """An exception in the sharded run."""
    name = got.inside[-1] if got.inside else ("backward" if got.outputs else "the model")
    line = error_line(error)
    what = f"{type(error).__name__}: {error}" + (f" ({line})" if line else "")
    advice = _advice(model, name) if name != "backward" else ""
    if isinstance(error, DivergenceError):
        advice = _ADVICE_PARTED
    elif not isinstance(error, UnsupportedOpError) and not advice:
        advice = "On one device it runs: look for sizes taken from a local tensor."
    return Finding(layout, False, float("inf"), name, what, advice)


def _advice(model: nn.Module, name: str) -> str:
    """What the source of the module gives away."""
    module = model if name == "the model" else model.get_submodule(name)
    try:
        source = inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return ""
    found = [text for sign, text in _SIGNS.items() if re.search(sign, source)]
    return "; ".join(found)


def _cuts(
    x: Tensor, placements: Sequence[Placement], shape: Sequence[int], uneven: bool
) -> dict[int, Sequence[int]]:
    """Uneven sizes of the first dim that is cut; none where there is nothing to cut unevenly."""
    if not uneven:
        return {}
    dim = placements[0].dim % x.ndim  # type: ignore[attr-defined]
    ranks = 1
    for n, p in zip(shape, placements, strict=True):
        ranks *= n if p.dim % x.ndim == dim else 1  # type: ignore[attr-defined]
    size = x.shape[dim]
    if ranks < 2 or size < 2:
        return {}
    sizes = [0] * ranks
    sizes[-1] = size // 3
    sizes[0] = size - sizes[-1]
    return {dim: sizes}
