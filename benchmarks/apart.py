"""A function in a process of its own, a fork of this one, which may end in any way."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from typing import Any

# bytes of address space
MOST = 20 * 2**30


def apart(fn: Callable[[], dict[str, Any]], limit: float) -> dict[str, Any]:
    """What fn gives, or as "result" what it raised or how its process ended.

    limit: seconds of the processor.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))
        used = int(sum(os.times()[:2]) + limit)
        resource.setrlimit(resource.RLIMIT_CPU, (used, used))
        try:
            try:
                row = fn()
            except Exception as e:
                row = {"result": said(e)}
            with os.fdopen(write, "w") as f:
                json.dump(row, f, default=str)
        finally:
            os._exit(0)
    os.close(write)
    # other programs may hold the processors
    text, end = b"", time.monotonic() + 6 * limit
    while True:
        ready, _, _ = select.select([read], [], [], max(0.0, end - time.monotonic()))
        part = os.read(read, 2**16) if ready else b""
        text += part
        if not part:
            break
    os.close(read)
    late = time.monotonic() >= end
    if late:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    try:
        return dict(json.loads(text))
    except ValueError:
        code = os.waitstatus_to_exitcode(status)
        # past its seconds of the processor the system ends it, by SIGKILL if it goes on
        late |= code == -signal.SIGXCPU
        if code == -signal.SIGKILL and not late:
            return {"result": "it was killed, as where memory ends"}
        return {"result": f"no end after {limit:.0f} s" if late else f"it died ({status})"}


def said(e: BaseException) -> str:
    """An exception in one line."""
    text = str(e).strip().splitlines()
    return f"{type(e).__name__}: {text[0][:300] if text else ''}"
