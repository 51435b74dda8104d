"""Peak memory of third-party models at realistic sizes on one rank of several, over its share.

    python benchmarks/zoo_memory.py [NAME ...] [--ranks 8] [--middle] [--every] [--csv FILE]
    python benchmarks/zoo_memory.py --csv FILE --docs docs/memory.md    the page with its table

Images of 2048 x 2048, volumes of 256^3, 10^6 points. A step of training, forward and backward, on
fake tensors, which have sizes and no memory: what it holds at its peak beyond weights, buffers and
their gradients, on the first rank, one in the middle or the last, whichever holds most (--middle:
that one only; --every: of all ranks), over the same on one device divided by the ranks. 1.00 is a
perfect split. Where it is more than 1.10, the lines that hold most beyond their share, and the same
with parallelize(made_mb=16), which makes sharded what the model makes of sizes and indices.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.metadata
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from tables import append
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from zoo_models import LARGE

import shardtensor as st
from shardtensor import cache
from shardtensor._torch import probe
from shardtensor._torch.dispatcher import not_tracing
from shardtensor._torch.world import silent_world
from shardtensor.caller import call_of_user, error_line
from shardtensor.comm import groups
from shardtensor.plan.step.ledger import Ledger
from shardtensor.ranks.testing import tensors
from shardtensor.spec import Spec
from shardtensor.tensor import wrap
from shardtensor.train import parts as of_gradients

FIELDS = [
    "model", "shape", "ranks", "peak", "share", "ratio", "rank", "made", "weights", "where",
    "seconds",
]  # fmt: skip
ROOT = Path(__file__).parent.parent
# MiB from which on what the model makes is made sharded, where more than so many shares are held
MADE, MOST = 16.0, 1.1
WEIGHTS = {"parameters", "gradients", "buffers"}
# bytes from which on the line that made a tensor is told
TOLD = 2**18


class Origins(Ledger):
    """A ledger that knows which module, op and line of the model made what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[int, tuple[str, str]] = {}
        self.inside: list[str] = [""]
        self.op = ""

    def watch(self, model: nn.Module) -> None:
        """Know which module is running."""
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, n=name: self.inside.append(n))
            module.register_forward_hook(self._leave, always_call=True)

    def _leave(self, *_: Any) -> None:
        self.inside.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.op = func.overloadpacket.__name__
        return super().__torch_dispatch__(func, types, args, kwargs)

    def book(self, x: Tensor, kind: str) -> bool:
        new = super().book(x, kind)
        if new and self.moves[-1][1] >= TOLD:
            place = "backward" if probe.backward_nr() is not None else self.inside[-1]
            frame: FrameType | None = sys._getframe(1)
            while frame is not None and frame.f_code.co_filename == __file__:
                frame = frame.f_back
            line = call_of_user(frame)[0]
            line = "" if line.startswith(__file__) else line.rpartition("site-packages/")[2]
            self.lines[self.next - 1] = place, f"{self.op} {line}".strip()
        return new

    def held(self, start: int) -> dict[int, int]:
        """Bytes of what is held beside weights when most of it is, after the first moves."""
        alive: dict[int, int] = {}
        most, total = -1, 0
        best = start
        for i, (number, nbytes) in enumerate(self.moves):
            if self.kinds[number] in WEIGHTS:
                continue
            total += nbytes
            if i >= start and total > most:
                most, best = total, i
        for number, nbytes in self.moves[: best + 1]:
            if self.kinds[number] not in WEIGHTS:
                alive[number] = alive.get(number, 0) + nbytes
        return {n: b for n, b in alive.items() if b}


@contextmanager
def world(rank: int, ranks: int, ledger: Ledger) -> Iterator[Any]:
    """One rank of many on fake tensors; numbers that a library keeps aside may be real."""
    cache.clear()
    # what is booked must be released when it is, not when the collector comes round
    gc.collect()
    even = groups.taken_spread()
    with silent_world(rank, ranks), even, ledger.fake, ledger, not_tracing():
        try:
            yield ledger.fake
        finally:
            cache.clear()
            groups.forget()


@contextmanager
def unfilled() -> Iterator[None]:
    """Inside, weights are made without their numbers, which take time."""
    names = [n for n in vars(nn.init) if n.endswith("_") and not n.startswith("__")]
    kept = {n: getattr(nn.init, n) for n in names}
    try:
        for n in names:
            setattr(nn.init, n, lambda x, *args, **kwargs: x)
        yield
    finally:
        for n, f in kept.items():
            setattr(nn.init, n, f)


def faked(model: nn.Module, fake: Any) -> nn.Module:
    """The model with weights and buffers that have no memory."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, x in table.items():
                if x is not None and id(x) not in made:
                    made[id(x)] = fake.from_tensor(x)
                table[key] = None if x is None else made[id(x)]
    return model


class Held(NamedTuple):
    """What a step holds beside weights at its peak: bytes by (module, op and line)."""

    parts: Counter[tuple[str, str]]
    weights: int
    gathered: tuple[str, ...]


def run(
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    dim: int,
    rank: int,
    ranks: int,
    made_mb: float | None = None,
) -> Held:
    """One rank's step."""
    ledger = Origins()
    with unfilled():
        model = build().train()
    with world(rank, ranks, ledger) as fake, booked(ledger):
        faked(model, fake)
        ledger.mark("buffers", model.buffers())
        ledger.mark("parameters", model.parameters())
        ledger.watch(model)
        if ranks > 1:
            with probe.outside_fake():
                mesh = init_device_mesh("cpu", (ranks,))
            st.parallelize(model, mesh, sync=False, made_mb=made_mb)
            spec = Spec.of(mesh, [Shard(dim)], shape)
            x: Any = wrap(torch.empty(spec.local_shape), spec)
        else:
            x = torch.empty(shape)
        start = len(ledger.moves)
        with st.trace() as t:
            loss(model(x)).backward()
        ledger.mark("gradients", (p.grad for p in model.parameters()))
        parts = Counter[tuple[str, str]]()
        for number, nbytes in ledger.held(start).items():
            parts[ledger.lines.get(number, ("", "small"))] += nbytes
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return Held(parts, weights, tuple(dict.fromkeys(op for op, _ in t.gathered)))


@contextmanager
def booked(ledger: Ledger) -> Iterator[None]:
    """Parts of weights' gradients that wait for their bucket are gradients, too."""
    add = of_gradients.Pass.add

    def marked(self: Any, places: Any, parts: Any, *more: Any) -> None:
        ledger.mark("gradients", parts)
        add(self, places, parts, *more)

    of_gradients.Pass.add = marked  # type: ignore[method-assign]
    try:
        yield
    finally:
        of_gradients.Pass.add = add  # type: ignore[method-assign]


def loss(out: Any) -> Tensor:
    """The mean square of all outputs."""
    found = [x for x in tensors(out) if x.is_floating_point() and x.requires_grad]
    return sum((x**2).mean() for x in found)


def measure(name: str, ranks: int, middle: bool, every_rank: bool = False) -> dict[str, Any]:
    """A row of the table."""
    build, shape, dim = LARGE[name]
    begin = time.perf_counter()
    alone = run(build, shape, dim, 0, 1)
    share = alone.parts.total() / ranks
    row: dict[str, Any] = {
        "model": name, "shape": "x".join(map(str, shape)), "ranks": ranks,
        "weights": alone.weights, "share": round(share),
    }  # fmt: skip
    tried = [ranks // 2] if middle else [0, ranks // 2, ranks - 1]
    tried = [*range(ranks)] if every_rank else tried

    def largest(made_mb: float | None) -> tuple[int, Held]:
        every = {rank: run(build, shape, dim, rank, ranks, made_mb) for rank in tried}
        return max(every.items(), key=lambda pair: pair[1].parts.total())

    try:
        most, found = largest(None)
        row["rank"] = "" if middle else most
        row["peak"] = found.parts.total()
        row["ratio"] = round(row["peak"] / share, 3)
        told = [f"gathers {' '.join(found.gathered)}"] if found.gathered else []
        if row["ratio"] > MOST:
            told += beyond(alone, found, share, ranks)
            _, made = largest(MADE)
            row["made"] = round(made.parts.total() / share, 3)
            if row["made"] > MOST and (left := beyond(alone, made, share, ranks)):
                told += ["made: " + "; ".join(left)]
    except Exception as e:
        if "-v" in sys.argv:
            traceback.print_exc()
        told = [described(e)]
    return row | {"where": "; ".join(told), "seconds": round(time.perf_counter() - begin, 1)}


def beyond(alone: Held, found: Held, share: float, ranks: int) -> list[str]:
    """The modules that hold most beyond their share, with their largest op."""
    have, want = Counter[str](), Counter[str]()
    for held, total in ((found, have), (alone, want)):
        for (module, _), nbytes in held.parts.items():
            total[module] += nbytes
    more = {m: (n - want[m] / ranks) / share for m, n in have.items()}
    told = []
    for module in sorted(more, key=lambda m: -more[m])[:3]:
        if more[module] > 0.02:
            ops = {op: n for (m, op), n in found.parts.items() if m == module}
            told.append(f"{module} {more[module]:+.2f} ({max(ops, key=lambda o: ops[o])})")
    return told


def described(error: Exception) -> str:
    """What a run raised, in short."""
    text = (str(error).strip().splitlines() or [""])[0]
    line = error_line(error).rpartition("site-packages/")[2]
    return f"{type(error).__name__}: {text[:160]} ({line})"


def page(file: Path, before: str) -> str:
    """The page with the rows of a CSV file: the last of each model, as the tables of models order.

    What it says before between its head and the table stays.
    """
    said = before[before.index("## What") : before.index("## Table")].rstrip().splitlines()
    rows = {r["model"]: r for r in csv.DictReader(file.read_text().splitlines())}
    found = [rows[n] for n in LARGE if n in rows]
    ratios = [float(r["ratio"]) for r in found if r["ratio"]]
    good, ranks = sum(r <= MOST for r in ratios), next(r["ranks"] for r in found if r["ranks"])
    better = sum(float(r["made"] or r["ratio"]) <= MOST for r in found if r["ratio"])
    older = sum(bool(r["ratio"]) and not r["rank"] for r in found)
    names = {"": "middle only", "0": "first", str(int(ranks) - 1): "last"}
    lines = [
        "# Memory of models",
        "",
        "Third-party models, unmodified, at sizes that users have: a step of training, forward and",
        f"backward, on {ranks} ranks, one spatial dim of the input sharded evenly. Peak: what a",
        "rank holds beyond weights, buffers and weights' gradients when it holds most, over its",
        "share of the same on one device; 1.00 is a perfect split. Of the first rank, one in the",
        "middle and the last, the one that holds most. Made: with `parallelize(made_mb=16)`. At",
        f"most 1.10: {good} of {len(ratios)}, with it {better}. Counted on fake tensors, which",
        f"have no memory (torch {importlib.metadata.version('torch')}; benchmarks/zoo_memory.py).",
        *[f"Of {older} rows only the rank in the middle was measured."][: older > 0],
        "",
        "Beyond: modules that hold more than their share at that moment, in shares of the whole,",
        "and their largest op; or why the step cannot be planned: it reads values, or torch has no",
        "kernel of such shapes for fake tensors; or why one device cannot run the model at this",
        "size. In backward torch tells no line.",
        "",
        *said,
        "",
        "## Table",
        "",
        "| model | input | share MiB | peak | of rank | made | beyond |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in found:
        share = f"{float(r['share']) / 2**20:,.0f}" if r["share"] else "-"
        beyond = r["where"].replace("|", "/").replace(f"{ROOT}/", "")
        of = names.get(r["rank"], "middle") if r["ratio"] else "-"
        lines.append(
            f"| {r['model']} | {r['shape'] or '-'} | {share} | {r['ratio'] or '-'} | {of} | "
            f"{r['made'] or '-'} | {beyond} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=[])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--middle", action="store_true", help="this rank only")
    parser.add_argument("--every", action="store_true", help="every rank")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    parser.add_argument("--docs", type=Path, help="write the table of the rows of --csv")
    parser.add_argument("-v", action="store_true")
    options = parser.parse_args()
    if options.docs:
        options.docs.write_text(page(options.csv, options.docs.read_text()))
        return
    warnings.simplefilter("ignore")
    for name in LARGE:
        if options.names and not any(name.startswith(p) for p in options.names):
            continue
        try:
            row = measure(name, options.ranks, options.middle, options.every)
        except Exception as e:
            if options.v:
                traceback.print_exc()
            row = {"model": name, "where": f"one device: {described(e)}"}
        print(
            f"{name:36} {row.get('share', 0) / 2**20:10.1f} MiB {row.get('ratio', 0):6.2f} "
            f"{row.get('made', 0):6.2f} {row.get('seconds', 0):5.1f} s  {row.get('where', '')}",
            flush=True,
        )
        append(options.csv, FIELDS, row)


if __name__ == "__main__":
    main()
