"""Where this process stands: what its launcher says, each odd value named."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple


class Place(NamedTuple):
    """Where this process stands: what its launcher says."""

    launcher: str
    rank: int
    ranks: int
    local_rank: int
    address: str
    port: int


# launcher: (rank, number of ranks, rank on this host), by environment variables
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "MPI": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}
# more ranks than any machine has: what is above is a slip
_MOST = 1 << 20
# how many ranks this host has
_LOCAL_SIZES = {
    "torchrun": "LOCAL_WORLD_SIZE",
    "Open MPI": "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MPI": "MPI_LOCALNRANKS",
}


def place(env: Mapping[str, str] | None = None) -> Place:
    """This process's place, from torchrun's, MPI's or Slurm's environment; alone without any.

    The first rank's address and port are MASTER_ADDR and MASTER_PORT. Under Slurm they default to
    the job's first host and a port made of the job's number, under MPI to this host if there is
    only one.
    Raises RuntimeError where they are needed and unknown, ValueError for values that make no sense;
    both name the variable.
    """
    env = os.environ if env is None else env
    for name, (rank, ranks, local) in _LAUNCHERS.items():
        # a shell inside a Slurm job has SLURM_NTASKS, too, but only its tasks a step
        if rank in env and ranks in env and (name != "Slurm" or "SLURM_STEP_ID" in env):
            n = _number(env, ranks, 1, _MOST)
            r = _number(env, rank, 0, n - 1, f"ranks are 0 to {ranks} - 1")
            at = _number(env, local, 0) if local in env else 0
            here = _LOCAL_SIZES.get(name, "")
            if here in env and at >= _number(env, here, 1, n, f"of {ranks} in all"):
                raise ValueError(f"{local}={env[local]} of {here}={env[here]} ranks of this host")
            return Place(name, r, n, at, *_meeting_point(name, n, env))
    return _alone(env)


def _alone(env: Mapping[str, str]) -> Place:
    """No launcher; half of one is a mistake: every process would run alone."""
    for name, (rank, ranks, _) in _LAUNCHERS.items():
        if name == "torchrun" and ranks in env and _number(env, ranks, 1, _MOST) > 1:
            raise ValueError(
                f"{ranks}={env[ranks]}, but {rank} is not set: which of them is this one?"
            )
        # a shell inside a Slurm job is no task of it
        if rank in env and (name != "Slurm" or "SLURM_STEP_ID" in env):
            raise ValueError(
                f"{rank}={env[rank]}, but {ranks} is not set: how many ranks are there?"
            )
    return Place("none", 0, 1, 0, "localhost", 0)


def _number(
    env: Mapping[str, str], name: str, least: int, most: int | None = None, why: str = ""
) -> int:
    """A variable's whole number from `least` to `most`."""
    text = env[name].strip()
    found = int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else None
    if found is None or found < least or (most is not None and found > most):
        bounds = f"from {least}" + ("" if most is None else f" to {most}")
        raise ValueError(
            f"{name}={env[name]!r}: a whole number {bounds} is expected"
            + (f" ({why})" if why else "")
        )
    return found


def seconds(name: str, default: float) -> float:
    """A variable of this library that is a number of seconds."""
    text = os.environ.get(name, "").strip()
    try:
        found = float(text or default)
    except ValueError:
        found = -1.0
    # also nan
    if not found > 0:
        raise ValueError(f"{name}={text!r}: a number of seconds above 0 is expected")
    return found


def flag(name: str) -> bool:
    """Whether a variable of this library is on; not set, it is off."""
    text = os.environ.get(name, "").strip().lower()
    if text in ("", "0", "false", "no", "off"):
        return False
    if text in ("1", "true", "yes", "on"):
        return True
    raise ValueError(f"{name}={os.environ[name]!r}: 1 or 0 is expected")


def _meeting_point(launcher: str, ranks: int, env: Mapping[str, str]) -> tuple[str, int]:
    address, port = env.get("MASTER_ADDR"), None
    if env.get("MASTER_PORT") and (ranks > 1 or env["MASTER_PORT"] != "0"):
        port = _number(env, "MASTER_PORT", 1, 65535, "a port that is free on the first rank's host")
    if launcher == "Slurm":
        address = address or first_host(env.get("SLURM_STEP_NODELIST", "localhost"))
        if port is None:
            job = _number(env, "SLURM_JOB_ID", 0) if "SLURM_JOB_ID" in env else 0
            port = 20000 + job % 20000
    elif launcher in ("Open MPI", "MPI"):
        here = _LOCAL_SIZES[launcher]
        if here in env and _number(env, here, 1) == ranks:
            address, port = address or "localhost", port or 29500
    if ranks > 1 and not (address and port):
        raise RuntimeError(
            f"{launcher} with {ranks} ranks, but no address where to meet: set MASTER_ADDR to the "
            "first rank's host and MASTER_PORT to a free port on every rank"
        )
    return address or "localhost", port or 0


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts, such as "gpu[03-05,9],login1"."""
    found = re.fullmatch(r"([^\[\],\s]*)(?:\[(\d+)[\d,-]*\])?([^\[\],\s]*)(?:,.*)?", nodes)
    if found is None or not (found[1] or found[2]):
        raise ValueError(
            f"SLURM_STEP_NODELIST={nodes!r} is no list of hosts; MASTER_ADDR overrides it"
        )
    return found[1] + (found[2] or "") + found[3]
