"""Where the ranks of a program meet: a store that all have come to, or who did not come."""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from uuid import uuid4

import torch.distributed as dist

from ..comm.launcher import Place
from ..comm.launcher import seconds as seconds_of
from ..observe.hangs import say

# seconds: ranks of one host start together, those of many may not
_ONE_HOST, _HOSTS = 25.0, 300.0
_SAY = 25.0
# seconds that rank 0 keeps the store for those that have not read what is wrong
_READ = 5.0
_starts, _asked = itertools.count(), itertools.count()


def limit(here: Place) -> float:
    """Seconds that ranks wait: SHARDTENSOR_INIT_TIMEOUT, else 25 on one host and 300 on many."""
    one = here.address in ("localhost", "127.0.0.1", "::1")
    one = one or os.environ.get("LOCAL_WORLD_SIZE") == str(here.ranks)
    return seconds_of("SHARDTENSOR_INIT_TIMEOUT", _ONE_HOST if one else _HOSTS)


def met(here: Place) -> dist.Store:
    """The store that rank 0 keeps, once all ranks are there.

    Raises RuntimeError naming the ranks that do not come, and ValueError where two processes say
    that they are the same rank, or ranks differ in how many they are.
    """
    seconds = limit(here)
    end = time.monotonic() + seconds
    # a process may start anew after destroy_process_group, in a store that still knows it
    start = next(_starts)
    store = _opened(here, end)
    try:
        wrong = _counted(here, dist.PrefixStore(f"shardtensor/met/{start}", store), end, seconds)
    except dist.DistError as e:
        raise _store_lost(here, e) from e
    if wrong:
        raise RuntimeError(wrong) if "SHARDTENSOR_INIT_TIMEOUT" in wrong else ValueError(wrong)
    return store


def _counted(here: Place, known: dist.Store, end: float, seconds: float) -> str:
    """Wait until all ranks are there; what is wrong, the same on all that have come."""
    # before anything can be wrong: rank 0 waits until these have read it
    known.add("readers", 1)
    if known.add(f"came/{here.rank}", 1) > 1:
        known.set(
            "wrong",
            f"two processes say that they are rank {here.rank} of {here.ranks} ({here.launcher}): "
            "each needs a number of its own",
        )
    first = known.compare_set("ranks", "", f"{here.ranks} {here.rank}").decode().split()
    if first[0] != str(here.ranks):
        known.set(
            "wrong",
            f"rank {here.rank} is one of {here.ranks}, rank {first[1]} one of {first[0]} "
            f"({here.launcher}): all must be told the same number",
        )
    known.add("count", 1)
    told = False
    while known.add("count", 0) < here.ranks and not known.check(["wrong"]):
        if (not told and time.monotonic() > end - seconds + _SAY) or time.monotonic() > end:
            missing = [r for r in range(here.ranks) if not known.check([f"came/{r}"])]
            try:
                told = _waited(here, missing, end, seconds, told)
            except RuntimeError as e:
                known.set("wrong", str(e))
        time.sleep(0.02)
    return _wrong(here, known)


def _wrong(here: Place, known: dist.Store) -> str:
    """What is wrong, "" if nothing is; rank 0 waits until the others have read it."""
    if not known.check(["wrong"]):
        return ""
    text = known.get("wrong").decode()
    known.add("read", 1)
    until = time.monotonic() + _READ
    # the store goes with rank 0
    while here.rank == 0 and known.add("read", 0) < known.add("readers", 0):
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    return text


def agree(here: Place, store: dist.Store, asked: str, met: bool) -> None:
    """Raise ValueError on all ranks unless all ask `st.init` for the same, before a group is made.

    here: this process among the ranks of the process group. met: whether they have just met; else
    some may be far behind. Raises RuntimeError naming the ranks that do not call `st.init`.
    """
    known = dist.PrefixStore(f"shardtensor/asked/{next(_asked)}", store)
    seconds = limit(here) if met else max(limit(here), _HOSTS)
    end = time.monotonic() + seconds
    known.add("readers", 1)
    known.set(f"came/{here.rank}", "")
    who, _, first = known.compare_set("first", "", f"{here.rank} {asked}").decode().partition(" ")
    if first != asked:
        known.compare_set(
            "wrong",
            "",
            f"st.init: rank {who} asks for {first}, rank {here.rank} for {asked}; all ranks must "
            "ask for the same axes in the same order",
        )
    known.add("count", 1)
    told = False
    while known.add("count", 0) < here.ranks and not known.check(["wrong"]):
        if (not told and time.monotonic() > end - seconds + _SAY) or time.monotonic() > end:
            missing = [r for r in range(here.ranks) if not known.check([f"came/{r}"])]
            told = _waited(here, missing, end, seconds, told, ask="does every rank call it here?")
        time.sleep(0.01)
    wrong = _wrong(here, known)
    if wrong:
        raise ValueError(wrong)


def _store_lost(here: Place, e: BaseException) -> RuntimeError:
    """What a rank says whose store has gone, with the process that keeps it."""
    return RuntimeError(
        f"rank {here.rank} of {here.ranks} ({here.launcher}) lost {here.address}:{here.port} "
        "(MASTER_ADDR, MASTER_PORT) in st.init: the process that keeps the store there (rank 0 or "
        f"the launcher) ended, and its output says why ({_first_line(e)})"
    )


def _opened(here: Place, end: float) -> dist.Store:
    """Rank 0 opens the store, others connect to it."""
    at = f"{here.address}:{here.port} (MASTER_ADDR, MASTER_PORT)"
    if here.rank == 0:
        try:
            return dist.TCPStore(
                here.address, here.port, is_master=True, wait_for_workers=False,
                timeout=timedelta(minutes=30), multi_tenant=True,
            )  # fmt: skip
        except RuntimeError as e:
            raise RuntimeError(
                f"rank 0 cannot open {at}: is the port taken, by another run or by a second "
                f"process that says it is rank 0? ({_first_line(e)})"
            ) from e
    seconds, told = max(0.0, end - time.monotonic()), False
    while not _answers(here):
        told = _waited(here, [0], end, seconds, told, f" at {at}")
        time.sleep(0.1)
    return _connected(here, end, timedelta(minutes=30))


def _connected(here: Place, end: float, timeout: timedelta) -> dist.Store:
    """The store that another process keeps."""
    found: list[dist.Store] = []
    error = ["it does not answer"]
    left = max(1.0, end - time.monotonic())

    def connect() -> None:
        try:
            store = dist.TCPStore(
                here.address, here.port, is_master=False, timeout=timedelta(seconds=left)
            )
            store.set_timeout(timeout)
            found.append(store)
        except dist.DistError as e:
            error[0] = _first_line(e)

    # where another program listens, torch waits for its answer longer than any timeout
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(left)
    if found:
        return found[0]
    raise RuntimeError(
        f"rank {here.rank} of {here.ranks} ({here.launcher}) finds no store of rank 0 at "
        f"{here.address}:{here.port} (MASTER_ADDR, MASTER_PORT): another program listens there, or "
        f"rank 0 has just ended ({error[0]})"
    )


def _answers(here: Place) -> bool:
    """Whether somebody listens where rank 0 is to be."""
    try:
        socket.create_connection((here.address, here.port), 5.0).close()
    except socket.gaierror as e:
        raise RuntimeError(f"MASTER_ADDR={here.address!r}: no such host ({e})") from e
    except OSError:
        return False
    return True


def _waited(
    here: Place,
    missing: Iterable[int],
    end: float,
    seconds: float,
    told: bool,
    where: str = "",
    ask: str = "did every process start? Is the number of ranks right?",
) -> bool:
    """Whether this rank has said for whom it waits; raises RuntimeError at the end of the time."""
    missing = sorted(missing)
    if not missing:
        return told
    names = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
    text = (
        f"rank {here.rank} of {here.ranks} ({here.launcher}) waits in st.init for "
        f"rank{'s' * (len(missing) > 1)} {names}{where}: {ask}"
    )
    now = time.monotonic()
    if now > end:
        raise RuntimeError(
            f"{text} None came in {seconds:.0f} s; SHARDTENSOR_INIT_TIMEOUT=SECONDS waits longer"
        )
    if not told and now > end - seconds + _SAY:
        say(text)
        return True
    return told


def _first_line(e: BaseException) -> str:
    return str(e).partition("\n")[0]


def fresh(here: Place) -> dist.Store:
    """A part of torchrun's store that no earlier attempt has written to, the same on all ranks.

    torchrun keeps one store when it starts all ranks again (torch 2.13). Ranks would meet at the
    addresses of dead ones: they hang, or are refused. How often this host's ranks were started says
    nothing of other hosts', so the first rank names the part and answers whoever asks now.
    """
    seconds = limit(here)
    end = time.monotonic() + seconds
    store = _connected(here, end, timedelta(minutes=5))
    try:
        return dist.PrefixStore(
            _named(here, end, seconds, dist.PrefixStore("shardtensor/init", store)), store
        )
    except dist.DistError as e:
        raise _store_lost(here, e) from e


def _named(here: Place, end: float, seconds: float, meet: dist.Store) -> str:
    """The name of the part that all ranks of this attempt use."""
    told = False
    if here.rank:
        mine = uuid4().hex
        meet.set(f"asks/{here.rank}", mine)
        while not meet.check([f"name/{mine}"]):
            told = _waited(here, [0], end, seconds, told)
            time.sleep(0.01)
        name = meet.get(f"name/{mine}").decode()
        meet.set(f"here/{name}/{here.rank}", "")
        return name
    name, answered = uuid4().hex, set[str]()
    missing = set(range(1, here.ranks))
    while missing:
        for r in missing:
            # what a rank of an earlier attempt asked is answered, too: nobody hears it
            asked = meet.get(f"asks/{r}").decode() if meet.check([f"asks/{r}"]) else ""
            if asked and asked not in answered:
                answered.add(asked)
                meet.set(f"name/{asked}", name)
        missing = {r for r in missing if not meet.check([f"here/{name}/{r}"])}
        told = _waited(here, missing, end, seconds, told)
        time.sleep(0.01)
    return name
