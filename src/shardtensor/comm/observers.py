"""Who looks on at ops and collectives, and as which simulated rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

# set in the threads of a simulated world, so that each rank counts its own
thread = threading.local()


class Hooks:
    """What looks on, where something does; see `observe`.

    meeting(collective, group, facts) is called before each collective: facts are what the ranks of
    the group (its name, or its ranks) must agree on. calling(op, args, kwargs): before each op of
    the user, while a record is open; called(what calling returned, args, a list of the result,
    error): after it. explained(error): what an error of a collective means, from what other ranks
    left. grouped(): once a mesh is used that has more than one rank.
    """

    meeting: Callable[[str, Any, dict[str, Any]], None] | None = None
    calling: Callable[[str, Any, Any], Any] | None = None
    called: Callable[[Any, Any, list[Any], BaseException | None], None] | None = None
    explained: Callable[[BaseException], BaseException | None] | None = None
    grouped: Callable[[], None] | None = None


def simulated_rank() -> int | None:
    """This thread's rank in a simulated world, None in a process of its own."""
    return getattr(thread, "rank", None)


def alone() -> bool:
    """Whether no other rank of this thread's world runs: they miss nothing that it would send."""
    return getattr(thread, "alone", False)


def looked_at() -> bool:
    """Whether somebody compares what ranks bring to a collective."""
    return Hooks.meeting is not None or getattr(thread, "rank", None) is not None


def claim(leaves: Iterable[Tensor]) -> None:
    """Raise ValueError if another simulated rank accumulates gradients in one of these, too."""
    here = thread.__dict__.get("world")
    if here is None:
        return
    for x in leaves:
        world, at, owner = x.__dict__.get("_claim", (None, 0, 0))
        if world != here or at != id(x):
            # torch swaps no tensor that has a weak reference; a copy has the mark, too
            x._claim = here, id(x), thread.rank  # type: ignore[attr-defined]
        elif owner != thread.rank:
            raise ValueError(
                f"simulated ranks {owner} and {thread.rank} share a parameter of shape "
                f"{list(x.shape)}, in which their gradients would add up: make the model in the "
                "function that st.simulate runs, or let each rank copy.deepcopy(model)"
            )
