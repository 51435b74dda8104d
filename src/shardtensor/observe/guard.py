"""Ranks agree before each collective, so that one that goes another way is named, not waited for.

Each rank leaves a record in the store of the process group: what collective it comes to, from
which op and line, with which dtype and sizes, and which ops it ran since the last one (see
`history`). Nobody enters before everybody's record is there and fits; the first verdict counts for
all. The end of the guard is such a meeting, too.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch.distributed as dist

from .. import _torch
from .._torch import world
from ..caller import call_of_user, described
from ..comm import counters, groups, launcher, observers
from ..comm.mismatch import difference, position
from ..errors import DivergenceError
from . import history

_open: list[float] = []
_session = 0
_counts: dict[str, int] = {}
# an open record turns the noting of ops on; no thread has this rank, so it stays empty
_RECORD = counters.Record(-1)


def timeout() -> float:
    """Seconds that ranks wait for each other: SHARDTENSOR_DEBUG_TIMEOUT, 10 if it is not set."""
    return launcher.seconds("SHARDTENSOR_DEBUG_TIMEOUT", 10.0)


@contextmanager
def guard(seconds: float | None = None) -> Iterator[None]:
    """Inside, ranks agree before each collective; SHARDTENSOR_DEBUG=1 does so for a whole program.

    seconds: how long ranks wait for one that does not come (default: SHARDTENSOR_DEBUG_TIMEOUT,
    else 10). Enter and leave it on all ranks alike. Raises DivergenceError on every rank, naming
    ranks, ops and lines, where one comes to another collective, brings another dtype or other
    sizes, ran another op on a ShardTensor, gave one another plain tensor than the others, raised,
    or does not come in time.
    """
    start(timeout() if seconds is None else seconds)
    try:
        yield
        _end()
    except DivergenceError:
        raise
    except BaseException as e:
        _left(e)
        raise
    finally:
        stop()


def start(seconds: float) -> None:
    """Begin to agree before each collective."""
    global _session
    me = counters.simulated_rank()
    if me in (None, 0) and not _open:
        _session += 1
        _counts.clear()
    if not _open:
        counters.records.append(_RECORD)
        observers.Hooks.meeting, observers.Hooks.calling = _meeting, history.began
        observers.Hooks.called = history.ended
        history.follow_methods()
    if me is not None:
        observers.thread.left.pop(me, None)
    _open.append(seconds)
    history.enter()


def stop() -> None:
    """End what `start` began."""
    _open.pop()
    if not _open:
        counters.records.remove(_RECORD)
        observers.Hooks.meeting = observers.Hooks.calling = observers.Hooks.called = None
        history.leave_methods()
    history.leave()


def _end() -> None:
    """The last meeting: of the ops after the last collective, and of ranks that left earlier."""
    if history.depth() > 1:
        # the guard around this one goes on
        return
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    if counters.simulated_rank() is not None:
        _meeting("end of the guard", groups.world(), {})
        dist.barrier()
    elif dist.get_backend() != "fake":
        _meeting("end of the guard", list(range(dist.get_world_size())), {})


def _meeting(collective: str, group: str | list[int], facts: dict[str, Any]) -> None:
    """Agree with the other ranks of a group, or of a list, on the collective that comes next."""
    if not history.depth():
        return
    if isinstance(group, list):
        ranks = group
    elif world.is_silent(groups.resolve(group)):
        return
    else:
        ranks = dist.get_process_group_ranks(groups.resolve(group))
    line, called = call_of_user()
    op = getattr(counters.current_op, "name", "")
    record = {
        "collective": collective,
        "op": "backward" if _torch.in_backward() else op or called,
        "line": line,
        "facts": {k: str(v) if k == "dtype" else v for k, v in facts.items()},
        "trails": history.since_last(ranks),
    }
    if collective == "end of the guard":
        record["op"] = ""
    if counters.simulated_rank() is not None:
        # the simulated world compares when all have come
        observers.thread.facts = record
        history.agreed(ranks)
    else:
        _agree(record, ranks)


def _agree(record: dict[str, Any], ranks: list[int]) -> None:
    """Compare a record with the other ranks', through the store; raise on all alike."""
    store, me = _store(), dist.get_rank()
    name = ",".join(map(str, ranks))
    number = _counts[name] = _counts.get(name, 0) + 1
    key = f"{name}/{number}"
    text = json.dumps(record)
    store.multi_set([f"{key}/{me}", f"at/{me}"], [text, text])
    missing = _wait(store, [f"{key}/{r}" for r in ranks], f"{key}/verdict", ranks)
    if missing:
        found = _absent(store, record, [r for r in ranks if f"{key}/{r}" in missing])
    else:
        texts = store.multi_get([f"{key}/{r}" for r in ranks])
        found = difference({r: json.loads(t) for r, t in zip(ranks, texts, strict=True)})
    # whoever is first decides for all: a rank that comes late must not enter alone
    verdict = store.compare_set(f"{key}/verdict", "", found or "agreed").decode()
    if verdict != "agreed":
        history.forget(ranks)
        raise DivergenceError(verdict)
    history.agreed(ranks)
    # all have left the collective before this one
    store.delete_key(f"{name}/{number - 1}/{me}")
    if me == ranks[0]:
        store.delete_key(f"{name}/{number - 1}/verdict")


def _wait(store: Any, keys: list[str], verdict: str, ranks: list[int]) -> list[str]:
    """The keys that do not come: in time, before a verdict, or because their ranks raised."""
    begin = looked = time.monotonic()
    pause = 1e-5
    while not store.check(keys):
        now = time.monotonic()
        if now - looked > 0.2:
            looked = now
            missing = [k for k in keys if not store.check([k])]
            lost = [k for k in missing if _message(store, int(k.rpartition("/")[2]))]
            if store.check([verdict]) or lost or now - begin > _open[-1]:
                return missing
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    return []


def _absent(store: Any, record: Mapping[str, Any], ranks: list[int]) -> str:
    """What to say of ranks that did not come to a collective."""
    said = []
    for r in ranks:
        message = _message(store, r)
        if message:
            said.append(f"rank {r} raised {message}")
        elif store.check([f"at/{r}"]):
            said.append(
                f"rank {r} did not come in {_open[-1]:g} s; the last that it came to is "
                + position(json.loads(store.get(f"at/{r}")))
            )
        else:
            said.append(f"rank {r} did not come in {_open[-1]:g} s, nor to any collective before")
    return (
        f"ranks part at {position(record)}: " + "; ".join(said) + ". Every rank must call the same "
        "ops in the same order; if a rank is only slow, raise SHARDTENSOR_DEBUG_TIMEOUT"
    )


def _message(store: Any, rank: int) -> str:
    """What a rank raised, "" if nothing is known."""
    key = f"raised/{rank}"
    return store.get(key).decode() if store.check([key]) else ""


def _left(error: BaseException) -> None:
    """Leave this rank's error for the others."""
    me = counters.simulated_rank()
    if me is not None:
        observers.thread.left[me] = described(error)
    elif dist.is_initialized() and dist.get_backend() != "fake":
        with suppress(RuntimeError):
            _store().set(f"raised/{dist.get_rank()}", described(error))


def _store() -> Any:
    return dist.PrefixStore(f"shardtensor/guard/{_session}", _torch.default_store())


def start_from_environment() -> None:
    """Guard the whole program where SHARDTENSOR_DEBUG asks for it."""
    if not launcher.flag("SHARDTENSOR_DEBUG"):
        return
    start(timeout())
    _torch.at_uncaught(_left)
