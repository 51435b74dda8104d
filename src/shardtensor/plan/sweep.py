"""Where a task stops fitting: its peak on other numbers of devices and at other resolutions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import gcd, log, prod

from ..observe.network import Network
from .estimate import Device, Estimate, Layout, Task, estimate
from .trees import dims_like


@dataclass(frozen=True)
class Point:
    """What is known of so many devices at so many elements: bytes of a rank and seconds of a step.

    how: "computed" by an estimate, "interpolated" between such, or why it is not known.
    """

    peak: float
    seconds: float
    how: str

    @property
    def known(self) -> bool:
        return self.how in ("computed", "interpolated")


@dataclass(frozen=True)
class Sweep:
    """Estimates of one way to run a task, by number of devices and by size of the cut dims.

    Between computed points: the peak is linear in the number of elements and in one over the number
    of devices. Beyond them nothing is said.
    """

    layout: Layout
    shapes: tuple[tuple[int, ...], ...]
    devices: tuple[int, ...]
    computed: dict[tuple[int, tuple[int, ...]], Estimate]

    def sizes(self, steps: int = 24) -> list[tuple[int, ...]]:
        """Sizes of the cut dims from the smallest computed to the largest, those among them."""
        found = list(self.shapes)
        for a, b in zip(self.shapes, self.shapes[1:], strict=False):
            n = max(1, round(steps * log(prod(b) / prod(a)) / log(self._span())))
            for i in range(1, n):
                share = i / n
                middle = (round(x * (y / x) ** share) for x, y in zip(a, b, strict=True))
                found.append(tuple(middle))
        return sorted(set(found), key=prod)

    def counts(self) -> list[int]:
        """Numbers of devices that are shown: all up to 16, from there those that are computed."""
        low, high = self.devices[0], self.devices[-1]
        return sorted({*self.devices, *range(low, min(16, high) + 1)})

    def at(self, devices: int, size: tuple[int, ...]) -> Point:
        """On so many devices with cut dims of this size."""
        few, many, share = _between([1 / -n for n in self.devices], 1 / -devices)
        return _mixed(
            self._along(self.devices[few], size), self._along(self.devices[many], size), share
        )

    def last(self, devices: int, device: Device) -> tuple[int, ...] | None:
        """The largest size shown that fits so many devices; None where none does."""
        found = [
            s
            for s in self.sizes(240)
            if (p := self.at(devices, s)).known and p.peak <= device.among(devices).memory
        ]
        return found[-1] if found else None

    def least(
        self, size: tuple[int, ...], device: Device, counts: Sequence[int] = ()
    ) -> int | None:
        """The fewest devices of those (default: all shown) that hold this size; None where none."""
        points = ((n, self.at(n, size)) for n in counts or self.counts())
        return next((n for n, p in points if p.known and p.peak <= device.among(n).memory), None)

    def bracket(self, size: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The computed sizes on both sides."""
        low, high, _ = _between([prod(s) for s in self.shapes], prod(size))
        return self.shapes[low], self.shapes[high]

    def _span(self) -> float:
        return prod(self.shapes[-1]) / prod(self.shapes[0]) if len(self.shapes) > 1 else 2.0

    def _along(self, devices: int, size: tuple[int, ...]) -> Point:
        low, high, share = _between([prod(s) for s in self.shapes], prod(size))
        a, b = (_point(self.computed[devices, self.shapes[i]]) for i in (low, high))
        return _mixed(a, b, share)


def sweep(
    task: Task,
    best: Estimate,
    device: Device,
    network: Network,
    factors: Sequence[float] = (0.5, 1, 2),
    devices: Sequence[int] = (),
) -> Sweep:
    """Estimates of the configuration of `best` at other sizes and on other numbers of devices.

    factors: of each dim that may be cut; those that give no whole sizes, or sizes below the cuts,
    are left out, and so are all but 1 where an input is given with its values. devices: default
    half, as many, twice and four times as many.
    """
    ranks = best.layout.ranks
    counts = sorted({n for n in (devices or (ranks // 2, ranks, 2 * ranks, 4 * ranks)) if n > 0})
    if any(x is not None for x in task.values):
        factors = (1,)
    tasks = dict(_resized(task, factors))
    found = {}
    for size, other in sorted(tasks.items(), key=lambda t: prod(t[0])):
        for n in counts:
            layout = scaled(best.layout, n)
            own = n == ranks and other is task
            found[n, size] = best if own else _estimate(other, layout, size, device, network)
    shapes = tuple(sorted(tasks, key=prod))
    return Sweep(best.layout, shapes, tuple(counts), found)


def scaled(layout: Layout, devices: int) -> Layout:
    """The same way to cut on another number of devices.

    The data and tensor axes stay, or become smaller where they do not divide them; the dims that
    are cut are cut by what is nearest, others where it cannot be helped; evenly, for ranks of one
    speed.
    """
    tensor = gcd(devices, layout.tensor)
    data = gcd(devices // tensor, layout.data)
    rest = devices // tensor // data
    divisors = [d for d in range(1, rest + 1) if rest % d == 0]

    def far(cuts: tuple[int, ...]) -> tuple[int, float]:
        pairs = list(zip(cuts, layout.cuts, strict=True))
        return sum(c > 1 == o for c, o in pairs), sum(abs(log(c / o)) for c, o in pairs)

    ways = (c for c in product(divisors, repeat=len(layout.cuts)) if prod(c) == rest)
    return replace(layout, tensor=tensor, data=data, cuts=min(ways, key=far), sizes=(), speeds=())


def _estimate(
    task: Task, layout: Layout, size: tuple[int, ...], device: Device, network: Network
) -> Estimate:
    if any(n > s for n, s in zip(layout.cuts, size, strict=True)):
        return Estimate(layout, {}, refused=f"{layout}: more cuts than rows")
    return estimate(task, layout, device, network)


def _resized(task: Task, factors: Sequence[float]) -> Iterator[tuple[tuple[int, ...], Task]]:
    """Tasks by the sizes of the dims that may be cut."""
    first = task.shapes[0]
    for factor in sorted({*factors, 1}):
        sizes = {d: first[d] * factor for d in task.dims}
        if any(s != int(s) or s < 1 for s in sizes.values()):
            continue

        def other(shape: tuple[int, ...], sizes: dict[int, float] = sizes) -> tuple[int, ...]:
            # as inputs are cut: those that have these dims
            if (dims := dims_like(shape, first, tuple(sizes))) is None:
                return shape
            made = dict(zip(dims, sizes.values(), strict=True))
            return tuple(int(made.get(d, n)) for d, n in enumerate(shape))

        made = task if factor == 1 else replace(task, shapes=[other(s) for s in task.shapes])
        yield tuple(int(s) for s in sizes.values()), made


def _between(known: Sequence[float], x: float) -> tuple[int, int, float]:
    """Of ascending numbers the two around x, and how far x is from the first to the second."""
    high = min(max(bisect_right(known, x), 1), len(known) - 1)
    low = max(0, high - 1)
    if len(known) == 1 or x <= known[low]:
        return low, low, 0.0
    if x >= known[high]:
        return high, high, 0.0
    return low, high, (x - known[low]) / (known[high] - known[low])


def _point(e: Estimate) -> Point:
    return Point(float(e.peak), e.seconds, f"refused: {e.refused}" if e.refused else "computed")


def _mixed(a: Point, b: Point, share: float) -> Point:
    if share == 0.0 or not a.known:
        return a
    if not b.known:
        return b
    peak = a.peak + share * (b.peak - a.peak)
    return Point(peak, a.seconds + share * (b.seconds - a.seconds), "interpolated")
