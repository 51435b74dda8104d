"""Where the memory and the time of a step go, by module, and what would help."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .._torch import probe

# what limits a module, in the order of tables
LIMITS = ("compute", "memory", "launch", "wire")
GRADIENTS = "(gradients of weights)"
OPTIMIZER = "(optimizer)"
# nodes that add up a weight's gradient have the highest number that there is
_LEAVES = 2**62


class Places:
    """Which module of a model is running, in forward or in backward; "" is the model itself."""

    def __init__(self, model: nn.Module | None = None) -> None:
        self.inside = [""]
        self.starts: list[int] = []
        self.names: list[str] = []
        for name, module in () if model is None else model.named_modules():
            # a scripted module takes no hooks: what it does is its parent's
            with suppress(RuntimeError):
                module.register_forward_pre_hook(lambda *_, name=name: self._enter(name))
                module.register_forward_hook(lambda *_: self._leave(), always_call=True)

    def _enter(self, name: str) -> None:
        self.inside.append(name)
        self._note()

    def _leave(self) -> None:
        if len(self.inside) > 1:
            self.inside.pop()
        self._note()

    @contextmanager
    def at(self, name: str) -> Iterator[None]:
        """Inside, that is where it runs."""
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    def _note(self) -> None:
        self.starts.append(probe.sequence_nr())
        self.names.append(self.inside[-1])

    def here(self) -> str:
        """The name of the module whose op, or whose op's gradient, is running."""
        at = probe.backward_nr()
        if at is None or at > _LEAVES:
            return self.inside[-1]
        found = bisect_right(self.starts, at) - 1
        return self.names[found] if found >= 0 else ""


@dataclass
class Part:
    """What a module and all inside of it take of a step. held: bytes that it made and that are
    held at the peak, weights not among them; kernels: ops; seconds: by what limits them."""

    module: str
    held: int = 0
    kernels: int = 0
    flop: int = 0
    sent: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0.0))

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def limit(self) -> str:
        """What most of its time goes to: compute, memory, launch or wire."""
        return max(LIMITS, key=lambda k: self.seconds[k])

    def add(self, other: Part) -> None:
        self.held += other.held
        self.kernels += other.kernels
        self.flop += other.flop
        self.sent += other.sent
        for k, s in other.seconds.items():
            self.seconds[k] += s


class Tree:
    """The parts of a step by module name, each with all that is inside of it; "" is the whole."""

    checkpoint: bool
    own: dict[str, Part]

    def __init__(self, own: dict[str, Part], checkpoint: bool = False) -> None:
        self.parts: dict[str, Part] = {"": Part("")}
        self.own, self.checkpoint = own, checkpoint
        for name, part in own.items():
            for path in _paths(name):
                self.parts.setdefault(path, Part(path)).add(part)

    def __getitem__(self, module: str) -> Part:
        return self.parts[module]

    def children(self, module: str) -> list[Part]:
        """The parts directly inside of a module, the dearest first."""
        inside = [p for p in self.parts if p and _paths(p)[-2] == module]
        return sorted((self.parts[p] for p in inside), key=self._share, reverse=True)

    def _share(self, part: Part) -> float:
        whole = self.parts[""]
        return part.held / (whole.held or 1) + part.total / (whole.total or 1)

    def totals(self, of: Callable[[Part], int]) -> dict[str, int]:
        """A whole number of each module with all inside: exactly the sum of its parts' own."""
        found: dict[str, int] = dict.fromkeys(self.parts, 0)
        for name, part in self.own.items():
            for path in _paths(name):
                found[path] += of(part)
        return found

    def dearest(self, n: int = 3) -> list[Part]:
        """The modules that themselves take most, of memory and time."""
        return sorted(self.own.values(), key=self._share, reverse=True)[:n]

    def advice(self, n: int = 3) -> list[str]:
        """What the dearest modules take, and what would help."""
        whole = self.parts[""]
        told = []
        for part in self.dearest(n):
            name = part.module or "the model's own forward"
            held, time = part.held / (whole.held or 1), part.total / (whole.total or 1)
            text = f"{name}: {held:.0%} of activations, {time:.0%} of time, most of it {part.limit}"
            told.append(f"{text}; {self._help(part, held, time)}")
        return told

    def _help(self, part: Part, held: float, time: float) -> str:
        if part.module in (GRADIENTS, OPTIMIZER):
            return "more samples a step, or fsdp"
        if held >= time and not self.checkpoint:
            outer = _paths(part.module)[min(1, len(_paths(part.module)) - 1)]
            return f"checkpoint `{outer}`" if outer else "checkpoint its blocks"
        return _HELP[part.limit]

    def lines(self, depth: int = 3, least: float = 0.02) -> Iterator[str]:
        """The tree as text: parts of at least such a share of memory or time."""
        yield f"{'module':44}{'peak':>7}{'time':>7}{'MiB':>10}{'kernels':>9}{'MB sent':>9}  limit"
        yield from self._lines("", 0, depth, least)
        yield from self.advice()

    def _lines(self, module: str, level: int, depth: int, least: float) -> Iterator[str]:
        whole, p = self.parts[""], self.parts[module]
        held, time = p.held / (whole.held or 1), p.total / (whole.total or 1)
        name = "  " * level + (module.rpartition(".")[2] or "the model")
        yield (
            f"{name:44}{held:7.1%}{time:7.1%}{p.held / 2**20:10.1f}{p.kernels:9}"
            f"{p.sent / 1e6:9.2f}  {p.limit}"
        )
        if level < depth:
            for child in self.children(module):
                if max(child.held / (whole.held or 1), child.total / (whole.total or 1)) >= least:
                    yield from self._lines(child.module, level + 1, depth, least)

    def __str__(self) -> str:
        return "\n".join(self.lines())


_HELP = {
    "compute": "precision bf16, or more devices",
    "memory": "compile, which fuses what reads and writes memory, or precision bf16",
    "launch": "compile, or fewer devices: its kernels are too small",
    "wire": "fewer cuts, or cut a longer dim: its messages take longer than its kernels",
}


def parts(
    work: Iterable[tuple[str, str, float, int]],
    held: Iterable[tuple[str, int]],
    sent: Iterable[tuple[str, int, float]],
) -> dict[str, Part]:
    """Own parts by module, of (module, limit, seconds, FLOP), (module, bytes at the peak) and
    (module, bytes sent, seconds)."""
    found: dict[str, Part] = {}

    def of(name: str) -> Part:
        return found.setdefault(name, Part(name))

    for name, limit, seconds, flop in work:
        p = of(name)
        p.kernels, p.flop = p.kernels + 1, p.flop + flop
        p.seconds[limit] += seconds
    for name, nbytes in held:
        of(name).held += nbytes
    for name, nbytes, seconds in sent:
        of(name).sent += nbytes
        of(name).seconds["wire"] += seconds
    return found


def _paths(name: str) -> list[str]:
    """ "a.b": ["", "a", "a.b"]."""
    found: list[Any] = [""]
    if name:
        words = name.split(".")
        found += [".".join(words[: i + 1]) for i in range(len(words))]
    return found
