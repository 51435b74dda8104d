"""Ring, zigzag or all-to-all: how attention over sharded queries and keys is parallelised.

Along n ranks, for queries Q, keys K, values V and output O of one rank (bytes), forward sends
- ring: (n - 1) (K + V) in n - 1 messages, hidden behind the computation; under a causal mask the
  ranks with late queries work longest;
- zigzag, under a causal mask: the ring on chunks dealt so that all ranks work alike; at most
  Q + K + V + O more in 2 (n - 1) messages;
- all-to-all (Jacobs et al.: DeepSpeed Ulysses, 2023): (n - 1) / n (Q + K + V + O) in 2 (n - 1)
  messages; each rank then has all tokens of some heads, so a causal mask loads all alike.
"auto" takes the all-to-all where heads can be dealt to ranks and it sends less, or as much under a
causal mask; else, under a causal mask, the zigzag where a rank has at least `BALANCE` tokens, so
that a block's products take longer than its way. Memory is that of one rank's share in every case.
Where `shardtensor doctor` has measured the links of as many ranks, `init` gives what the first rank
knows of them to all ranks, and the all-to-all is taken where it spends less time on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..settings import current, setting

KINDS = ("auto", "ring", "zigzag", "all_to_all")
# measured by benchmarks/attention.py on gloo, where messages are dear
BALANCE = 2048
# latency and bandwidth, where they were measured
_link: list[float] = []


@contextmanager
def strategy(kind: str) -> Iterator[None]:
    """Force "ring", "zigzag" or "all_to_all" for attention inside; "auto" chooses by cost.

    "all_to_all" raises UnsupportedOpError where heads cannot be dealt to the ranks, "zigzag" where
    queries and keys are not sharded alike. Without a causal mask "zigzag" is "ring".
    """
    if kind not in KINDS:
        raise ValueError(f"attention strategy {kind!r}; one of {KINDS}")
    with setting("strategy", kind):
        yield


def chosen() -> str:
    """The strategy in force."""
    return str(current("strategy", "auto"))


def assume_link(latency: float, bandwidth: float) -> None:
    """Choose by the time on such a link (s, bytes/s); the same on all ranks, or they part."""
    _link[:] = [latency, bandwidth]


def all_to_all_pays(
    n: int, queries: int, keys: int, values: int, output: int, causal: bool, item: int = 4
) -> bool:
    """Whether the all-to-all costs less than a ring of n ranks.

    By the time on the link that is assumed, else by what is sent. queries, keys, values, output:
    elements of all ranks, of item bytes.
    """
    swapped = (queries + keys + values + output) / n
    if not _link:
        return swapped < keys + values or (causal and swapped == keys + values)
    latency, bandwidth = _link
    share = (n - 1) / n * item / bandwidth
    return 2 * latency + share * swapped < (n - 1) * latency + share * (keys + values)


def balance_pays(tokens: int) -> bool:
    """Whether a ring of ranks with so many tokens each gains by the zigzag order."""
    return tokens >= BALANCE
