"""What is held, by kind, as a step goes on: few numbers, of which none hides a peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from .ledger import KINDS, Ledger

# as many moments are kept
MOST = 200


@dataclass(frozen=True)
class Course:
    """at: seconds of compute since the step began; held: bytes by kind then, in the order of KINDS.

    phases: (name, seconds when it begins).
    """

    at: tuple[float, ...]
    held: tuple[tuple[int, ...], ...]
    phases: tuple[tuple[str, float], ...]


def course(ledger: Ledger, start: int, begun: int, seconds: Sequence[float]) -> Course:
    """After the first `start` moves and `begun` ops, which take so many seconds each.

    Of many moments those at which most is held, one of each of MOST parts of the step.
    """
    times = [0.0, *accumulate(seconds)]
    whole = times[-1] or 1.0
    places = {kind: i for i, kind in enumerate(KINDS)}
    now = [0] * len(KINDS)
    best: dict[int, tuple[int, float, tuple[int, ...]]] = {}
    for i, ((number, nbytes), when) in enumerate(zip(ledger.moves, ledger.when, strict=True)):
        now[places[ledger.kinds[number]]] += nbytes
        if i < start - 1:
            continue
        at = times[min(max(0, when - begun), len(seconds))]
        part, total = int(MOST * at / whole), sum(now)
        if part not in best or total > best[part][0]:
            best[part] = total, at, tuple(now)
    found = [best[part] for part in sorted(best)]
    return Course(
        tuple(at for _, at, _ in found),
        tuple(held for _, _, held in found),
        tuple((name, times[min(n - begun, len(seconds))]) for name, n in ledger.phases),
    )
