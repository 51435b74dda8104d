"""How every rank sends one vector to all others: the same for every message of such sizes."""

from __future__ import annotations

from typing import NamedTuple

from ..cache import cached
from . import groups


class ToAll(NamedTuple):
    """How vectors go from all ranks to all others: bytes to and from each, elements that come."""

    gives: list[int]
    gets: list[int]
    others: list[int]
    length: int
    me: int
    nbytes: int
    messages: int
    silent: bool


@cached
def plan(of: tuple[int, ...], item: int, group: str) -> ToAll:
    n, me = len(of), groups.rank(group)
    gives, gets = [item * of[me]] * n, [item * k for k in of]
    gives[me] = gets[me] = 0
    others = [*of[:me], *of[me + 1 :]]
    messages = n - gives.count(0)
    silent = groups.silent(group)
    return ToAll(gives, gets, others, sum(others), me, sum(gives), messages, silent)
