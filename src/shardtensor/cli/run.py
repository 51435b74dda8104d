"""`shardtensor run`: a script on all ranks of this host, with one log and the first error only."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated

import torch
import typer

# the script's own options begin after its name
SETTINGS = dict(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
# lines of a rank that are shown where it fails
SHOWN = 40
# seconds that the other ranks have to end by themselves
PATIENCE = 5.0


def run(
    script: Annotated[str, typer.Argument(help="train.py, or a module")],
    args: Annotated[list[str] | None, typer.Argument(help="the script's own")] = None,
    data: Annotated[
        int | None, typer.Option(help="groups of ranks with samples of their own, an axis then")
    ] = None,
    domain: Annotated[int, typer.Option(help="ranks that share a sample; -1: all")] = -1,
    processes: Annotated[int, typer.Option(help="default: data x domain, or one a GPU")] = 0,
    log: Annotated[Path | None, typer.Option(help="a file of the output of all ranks")] = None,
    every: Annotated[bool, typer.Option("--all", help="show the output of all ranks")] = False,
) -> None:
    """Start a script on data x domain processes of this host; `st.init()` there has that mesh.

    Without --data the mesh is the domain axis alone, as that of `st.init()` under torchrun.
    """
    groups = 1 if data is None else data
    n = _count(groups, domain, processes)
    axes = f"domain={n // groups}" if data is None else f"data={data},domain={n // data}"
    if script.startswith("-"):
        raise ValueError(
            f"{script} is no option of run: it takes --data, --domain, --processes (torchrun's "
            "--nproc-per-node), --log and --all, then train.py or a module's name without -m"
        )
    named = script.endswith(".py") or Path(script).is_file()
    if named and not Path(script).is_file():
        raise ValueError(f"there is no file {script}")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // n)
    env = {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", **os.environ}
    env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(n)}
    env |= {"LOCAL_WORLD_SIZE": str(n), "SHARDTENSOR_MESH": axes}
    command = [sys.executable, *([] if named else ["-m"]), script, *(args or ())]
    file = None if log is None else log.open("w")
    ranks: list[Rank] = []
    # what a scheduler or the keyboard ends would leave the ranks behind
    with _told() as signals:
        try:
            for r in range(n):
                if not signals:
                    ranks.append(Rank(r, command, env, file, r == 0 or every))
            failed = _first(ranks, signals)
        finally:
            for rank in ranks:
                rank.process.terminate()
            until = time.monotonic() + PATIENCE
            for rank in ranks:
                rank.end(max(0.0, until - time.monotonic()))
            if file is not None:
                file.close()
    if signals:
        raise SystemExit(128 + signals[0])
    for rank in ranks:
        if rank.shown and failed is None:
            # errors that the script got over
            sys.stderr.write("".join(rank.last))
    if failed is not None:
        said = "".join(failed.last)
        print(f"rank {failed.number} of {n} failed:\n{said}", file=sys.stderr, end="")
        raise typer.Exit(failed.process.returncode if failed.process.returncode > 0 else 1)


def _count(data: int, domain: int, processes: int) -> int:
    """The number of ranks. Raises ValueError where sizes do not make it up."""
    if data < 1 or (domain < 1 and domain != -1) or processes < 0:
        raise ValueError(
            f"--data {data} --domain {domain}: sizes are positive, and domain may be -1"
        )
    gpus = torch.cuda.device_count()
    n = processes or (data * domain if domain > 0 else gpus or data)
    if n % data or (domain > 0 and data * domain != n):
        raise ValueError(f"--data {data} --domain {domain} do not make up {n} processes")
    if gpus and n > gpus:
        raise ValueError(f"{n} processes for {gpus} GPUs of this host; over hosts use torchrun")
    return n


class Rank:
    """A process of the script, whose output goes to the log, to the terminal if shown."""

    def __init__(
        self,
        number: int,
        command: list[str],
        env: dict[str, str],
        log: IO[str] | None,
        shown: bool,
    ) -> None:
        self.number, self.log, self.shown = number, log, shown
        self.last: deque[str] = deque(maxlen=SHOWN)
        own = {"RANK": str(number), "LOCAL_RANK": str(number)}
        self.process = subprocess.Popen(
            command, env=env | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        out, err = self.process.stdout, self.process.stderr
        assert out is not None and err is not None
        self.threads = [
            threading.Thread(target=self._read, args=pipe, daemon=True)
            for pipe in ((out, sys.stdout), (err, sys.stderr))
        ]
        for thread in self.threads:
            thread.start()

    def _read(self, pipe: IO[bytes], terminal: IO[str]) -> None:
        shown = self.shown
        for found in pipe:
            line = found.decode(errors="replace")
            # what is wrong is told once, when it has ended the run
            shown = shown and not (terminal is sys.stderr and _is_of_an_end(line))
            if shown:
                terminal.write(line)
                terminal.flush()
            else:
                self.last.append(line)
            if self.log is not None:
                self.log.write(f"[{self.number}] {line}")

    def end(self, seconds: float) -> None:
        """Wait so long for the process, which was told to end; read all it has said."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for thread in self.threads:
            thread.join(PATIENCE)


@contextmanager
def _told() -> Iterator[list[int]]:
    """Inside, signals to end are noted, not obeyed: one may come when a rank is half started."""
    signals: list[int] = []
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    heard = [s for s, handler in before.items() if handler != signal.SIG_IGN]
    for s in heard:
        signal.signal(s, lambda number, _: signals.append(number))
    try:
        yield signals
    finally:
        for s in heard:
            signal.signal(s, before[s])


def _is_of_an_end(line: str) -> bool:
    """Whether a line begins what a rank says of an error, its own or another's."""
    other = line.startswith("shardtensor: ") and line.rstrip().endswith(" ends.")
    # torch's own hook for exceptions begins lines with the rank
    return other or bool(re.match(r"(\[rank\d+\]: )?Traceback \(most recent call last\)", line))


def _first(ranks: list[Rank], signals: list[int]) -> Rank | None:
    """The rank that failed first, once it has; None once all have ended well, or at a signal."""
    running = list(ranks)
    while running and not signals:
        for rank in list(running):
            code = rank.process.poll()
            if code is not None:
                running.remove(rank)
                if code:
                    return rank
        time.sleep(0.05)
    return None
