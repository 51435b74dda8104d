"""Ring, zigzag, all-to-all or both: how attention over sharded queries and keys is parallelised.

Along n ranks, for queries Q, keys K, values V and output O of one rank (bytes), forward sends
- ring: (n - 1) (K + V) in n - 1 messages, hidden behind the computation; under a causal mask the
  ranks with late queries work longest;
- zigzag, under a causal mask: the ring on chunks dealt so that all ranks work alike; at most
  Q + K + V + O more in 2 (n - 1) messages;
- all-to-all (Jacobs et al.: DeepSpeed Ulysses, 2023): (n - 1) / n (Q + K + V + O) in 2 (n - 1)
  messages; each rank then has all tokens of some heads, so a causal mask loads all alike;
- usp (arXiv 2405.07719), in teams of u ranks: (u - 1) / u (Q + K + V + O) in 2 (u - 1) messages,
  then (n / u - 1) (K + V) in n / u - 1 messages, hidden behind the computation;
- gather: (n - 1) (K + V) in n - 1 messages that nothing hides, and one block in place of n; or
  (m - 1) (K + V) so, after which m ranks have one block, of which n / m go around the ring.
"auto" takes what costs the busiest rank least time by `cost`, at the rates of `RATES` for the
mesh's device; in place of hops "gather" among so many ranks as takes least, where their keys and
values have few bytes (`Rates.whole`). Memory is that of one rank's share in every other case. Where
`shardtensor doctor` has measured the links of as many ranks, `init` gives what the first rank knows
of them to all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..settings import current, setting
from .cost import Rates, Way, Work, cost, together

KINDS = ("auto", "ring", "zigzag", "all_to_all", "usp", "gather")
# by device and bytes of a number; of what is not there, as for 4 bytes
RATES = {
    # `benchmarks/attention.py --rates` on gloo, 2 ranks with a core of a server each, fp32
    "cpu": {4: Rates(3e10, 1e9, 1.3e-4, 8e8, 2.5e-4, 2**19)},
    # from data sheets, as `plan` assumes: H100, half of 67e12 and 989e12 FLOP/s, a multiply-add is
    # two; 3.35e12 bytes/s, of which a merge moves 26 an element; NVLink 4, a kernel's launch;
    # ten launches a block
    "cuda": {
        4: Rates(1.7e13, 1.3e11, 1e-5, 4.5e11, 5e-5, 2**22),
        2: Rates(2.5e14, 1.3e11, 1e-5, 4.5e11, 5e-5, 2**22),
    },
}
# GPUs that NVLink joins; beyond, NDR InfiniBand (s, bytes/s)
NODE, BEYOND = 8, (2e-5, 5e10)
# latency and bandwidth, where they were measured
_link: list[float] = []


@contextmanager
def strategy(kind: str) -> Iterator[None]:
    """Force "ring", "zigzag", "all_to_all", "usp" or "gather" inside; "auto" chooses by cost.

    "all_to_all" and "usp" raise UnsupportedOpError where heads cannot be dealt to the ranks or to
    teams of them, "zigzag" where queries and keys are not sharded alike. Without a causal mask
    "zigzag" is "ring". What each sends is in the module's table. Raises ValueError for another
    name.
    """
    if kind not in KINDS:
        raise ValueError(f"attention strategy {kind!r}; one of {KINDS}")
    with setting("strategy", kind):
        yield


def chosen() -> str:
    """The strategy in force."""
    return str(current("strategy", "auto"))


@contextmanager
def assume(rates: Mapping[int, Rates]) -> Iterator[None]:
    """Choose by these rates, as in `RATES`; the same on all ranks, or they part."""
    with setting("rates", rates):
        yield


def assume_link(latency: float, bandwidth: float) -> None:
    """Choose by the time on such a link (s, bytes/s); the same on all ranks, or they part."""
    _link[:] = [latency, bandwidth]


def rates(device: str, item: int, ranks: int) -> Rates:
    """By which is chosen for so many ranks of such devices and numbers of item bytes."""
    assumed = current("rates", None)
    table = assumed or RATES.get(device, RATES["cuda"])
    found: Rates = table.get(item, table[4])
    if assumed:
        return found
    if _link:
        return found._replace(latency=_link[0], bandwidth=_link[1])
    if device != "cpu" and ranks > NODE:
        return found._replace(latency=BEYOND[0], bandwidth=BEYOND[1])
    return found


def cheapest(work: Work, ways: Sequence[Way], rates: Rates, *, gathers: bool = False) -> Way:
    """The way that takes the busiest rank the least time; the first of equal ones.

    gathers: whether keys of several ranks may come at once where the best is to pass them on.
    """
    found = min(ways, key=lambda way: cost(work, way).seconds(rates))
    if not gathers or not cost(work, found).hops:
        return found

    def seconds(way: Way) -> float:
        passed = cost(work, way)
        return passed.seconds(rates) + passed.hops * rates.block

    every = [Way("gather", m) for m in together(work, rates.whole)]
    return min([found, *every], key=seconds)
