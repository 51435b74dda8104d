"""Which module and op is the first that is wrong, from what all ranks saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite

from torch import nn

from . import causes
from .record import Key, Run
from .report import ACTIVATIONS, Finding


@dataclass
class Traced:
    """What a rank found op by op. wrong, gradients: events that differ.

    parts: of those up to the first. other: (op, line) of ops that run on shards only, by module.
    calls: the ops in each line. errors: the largest relative one of each module's activations.
    """

    wrong: dict[Key, str] = field(default_factory=dict)
    gradients: dict[Key, str] = field(default_factory=dict)
    parts: dict[Key, causes.Part] = field(default_factory=dict)
    other: dict[str, tuple[str, str]] = field(default_factory=dict)
    calls: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def noted(self, key: Key, off: float, scale: float, text: str) -> str:
        """The text; of a result its error is kept."""
        share, name = off / scale if scale else off, f"{ACTIVATIONS}{key[0]}"
        if key[4] >= 0 and isfinite(share):
            self.errors[name] = max(share, self.errors.get(name, 0.0))
        return text


@dataclass
class Blame:
    """want: the run on one device; seen: by each rank."""

    layout: str
    model: nn.Module
    want: Run
    seen: Sequence[Traced]

    def of(self, wrong: dict[str, str]) -> Finding:
        """The first module and op that is wrong, and the errors of all activations."""
        found = self._first(wrong)
        for s in self.seen:
            found.add({}, {}, s.errors)
        return found

    def _first(self, wrong: dict[str, str]) -> Finding:
        seen = self.seen
        order = list(self.want.events)
        first = next((k for k in order if any(k in s.wrong for s in seen)), None)
        if first is not None:
            module, op, line = first[0], first[2], first[3]
            text = next(s.wrong[first] for s in seen if first in s.wrong)
            parts = [s.parts[first] for s in seen if first in s.parts]
            what = f"what {op} takes {text}" if first[4] < 0 else f"the result of {op} {text}"
            what = what if op else f"its output {text}"
            if not op and seen[0].other.get(module):
                op, line = seen[0].other[module]
            return self._finding(module, op, line, what, causes.looks(parts))
        late = next((k for k in reversed(order) if any(k in s.gradients for s in seen)), None)
        if late is not None:
            text = next(s.gradients[late] for s in seen if late in s.gradients)
            reader = self._reader(late)
            what = f"the gradient that it gives to the output of {late[0]} {text}"
            return self._finding(reader[0], reader[2], reader[3], what, "")
        known = {k: order.index(v) for k, v in self.want.weights.items() if v in self.want.events}
        names = [k.partition(" ")[2] for k in wrong if not k.startswith("output")]
        for kind in ("gradient", "buffer"):
            for k in sorted(names, key=lambda n: -known.get(n, -1)):
                if f"{kind} {k}" in wrong:
                    key = self.want.weights.get(k, ("", 0, "", "", 0, 0))
                    owner = k.rpartition(".")[0] or "the model"
                    what = f"the {kind} of {k} {wrong[f'{kind} {k}']}"
                    if k.startswith("of input"):
                        owner, what = "the model", f"the {kind} {k} {wrong[f'{kind} {k}']}"
                    return self._finding(owner, key[2], key[3], what, "")
        k, text = next(iter(wrong.items()))
        return Finding(self.layout, "wrong", float("inf"), "the model", f"its {k} {text}")

    def _reader(self, key: Key) -> Key:
        """What took a result whose gradient is wrong, and has itself a right one."""
        events = self.want.events
        bad = {k for s in self.seen for k in s.gradients}
        took = [k for k in events[key].readers if k in events and k not in bad]
        if took:
            return took[0]
        order = list(events)
        after = order[order.index(key) + 1 :]
        return next((k for k in after if k[0] != key[0] and k[2]), key)

    def _finding(
        self,
        module: str,
        op: str,
        line: str,
        what: str,
        looks: str,
    ) -> Finding:
        file, span = causes.lines(self.model, module)
        here = {line: ops for s in self.seen[:1] for line, ops in s.calls.items()}
        inside = [
            x
            for x in here
            if x and x.rpartition(":")[0] == file and int(x.rpartition(":")[2]) in span
        ]
        theirs = causes.rules_of_users(
            o for x in ([line] if line else inside) for o in here.get(x, ())
        )
        if theirs and not line:
            op = next(iter(theirs))
            line = next(x for x in inside if op in here[x])
        advice = [looks, *theirs.values(), *causes.signs(self.model, module)]
        text = "; ".join(dict.fromkeys(filter(None, advice)))
        return Finding(self.layout, "wrong", float("inf"), module, what, text, op, line)
