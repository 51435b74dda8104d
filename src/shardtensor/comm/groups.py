"""Process groups by name: ops carry the name, so they can be traced and cached."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from typing import Any, NamedTuple
from weakref import WeakValueDictionary, ref

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .. import _torch
from .._torch.world import Middle, group_of, is_silent
from ..cache import cached, clear
from ..caller import call_of_user, line_of_step, loop_of_user, op_of
from ..errors import DivergenceError, RankError, UnsupportedOpError
from ..spec import Spec, axes_in
from .observers import Hooks, simulated_rank, thread


class Facts(NamedTuple):
    """What is known of a group by its name: ranks, this rank's number, whether it is rehearsed."""

    size: int
    rank: int
    silent: bool


# weak: a group that outlives destroy_process_group aborts the process at its end
_groups: WeakValueDictionary[str, dist.ProcessGroup] = WeakValueDictionary()
# the name of a group of one rank, which needs no process group
ALONE = "self"
facts = {ALONE: Facts(1, 0, False)}
# the process group that the caches of functions of meshes are for
_world: ref[dist.ProcessGroup] | None = None
# by group: the devices of its meshes
_devices: dict[str, set[str]] = {}
# by rank and world: why a rank that has left the others may not meet them again
_apart: dict[str, str] = {}


def resolve(name: str) -> dist.ProcessGroup:
    """The process group that `group` registered under this name.

    Raises DivergenceError on a rank that `part` has set apart, RankError where there is no other.
    """
    made = _groups.get(name)
    if made is None:
        if _place(name) not in _apart:
            raise RankError("this needs rows of other parts, which do not meet")
        raise DivergenceError(_apart[_place(name)])
    return made


def _place(name: str) -> str:
    """The part of a group's name that says whose it is."""
    return ":" + ":".join(name.rsplit(":", 2)[1:])


def part(why: str) -> None:
    """Let this rank meet no other from now on: what it sent would be taken for something else."""
    if not dist.is_initialized():
        return
    place = _place(_name(""))
    if _apart.setdefault(place, why) == why:
        for name in [n for n in _groups if n.endswith(place)]:
            _groups.pop(name, None)


@cached
def group(mesh: DeviceMesh, axes: tuple[int, ...]) -> str:
    """The name of the group of ranks that differ from this one along mesh axes only.

    Ranks are numbered row-major over `axes`. A group over several axes is made on first use by its
    members, which communicate then, never again. Raises ValueError for a mesh whose ranks do not
    ascend along the axes.
    """
    if prod(mesh.size(a) for a in axes) == 1:
        return ALONE
    with _torch.outside_modes() if _torch.is_tracing() else nullcontext():
        return _made(mesh, axes)


@cached
def along(spec: Spec, *dims: int) -> str:
    """The name of the group of ranks that share out dims of a tensor.

    As of `group`, which raises ValueError for a mesh whose ranks do not ascend.
    """
    return group(spec.mesh, axes_in([spec.dims[d] for d in dims]))


def _made(mesh: DeviceMesh, axes: tuple[int, ...]) -> str:
    """The name of the group of this rank's part of the mesh along axes, made if need be."""
    place = mesh.get_coordinate()
    if place is None:
        raise ValueError("this rank is not part of the mesh")
    if isinstance(mesh, Middle):
        # what asks a rank of it finds none, see `resolve`
        name = _name(f"{mesh.shape}{axes}")
        size = prod(mesh.size(a) for a in axes)
        facts[name] = Facts(size, size // 2, False)
        return name
    at = tuple(slice(None) if a in axes else place[a] for a in range(mesh.ndim))
    ranks = mesh.mesh[at].flatten().tolist()
    if ranks != sorted(ranks):
        raise ValueError(f"ranks {ranks} along mesh axes {axes} must ascend")
    made: dist.ProcessGroup | None
    if len(axes) == 1:
        made = mesh.get_group(axes[0])
    elif ranks == list(range(dist.get_world_size())) and mesh.device_type == "cpu":
        made = dist.group.WORLD
    else:
        if Hooks.meeting is not None and simulated_rank() is None:
            Hooks.meeting("new_group", ranks, {})
        made = group_of(ranks)
    assert made is not None
    name = _named(made)
    _devices.setdefault(name, set()).add(mesh.device_type)
    if Hooks.grouped is not None and simulated_rank() is None:
        Hooks.grouped()
    return name


def _named(made: dist.ProcessGroup) -> str:
    # ranks of simulated worlds share the tables, hence the numbers of both in the key
    name = _name(made.group_name)
    if not _apart or _place(name) not in _apart:
        _groups[name] = made
    facts[name] = Facts(made.size(), made.rank(), is_silent(made))
    return name


def _name(of: str) -> str:
    return f"{of}:{dist.get_rank()}:{thread.__dict__.get('world', '')}"


def devices(name: str) -> list[str]:
    """The kinds of device that meshes of the group have; none is known of a group without one."""
    return sorted(_devices.get(name, ()))


def meets_on_host(name: str) -> bool:
    """Whether the group takes tensors of the host, as those of `st.init` do; alike on all ranks."""
    made = resolve(name)
    return silent(name) or "cpu" in dist.get_backend_config(made)


def size(name: str) -> int:
    """How many ranks the group has."""
    return facts[name].size


def rank(name: str) -> int:
    """This rank's number within the group."""
    return facts[name].rank


def silent(name: str) -> bool:
    """Whether the group is one of a rehearsal, in which nothing arrives."""
    return facts[name].silent


def world() -> str:
    """The group of all ranks."""
    made = dist.group.WORLD
    assert made is not None
    return _named(made)


def members(name: str) -> tuple[int, ...]:
    """The global ranks of the group, in its order."""
    if name == ALONE:
        return (dist.get_rank(),)
    return _members(name)


@cached
def _members(name: str) -> tuple[int, ...]:
    return tuple(dist.get_process_group_ranks(resolve(name)))


def knows_values(name: str) -> bool:
    """Whether ranks get each other's values: not in a plan or a rehearsal."""
    return not silent(name)


class _Spread:
    """Whether ranks whose values are not known are taken to have as many rows of each kind."""

    taken: dict[str, None] | None = None


@contextmanager
def taken_spread(told: dict[str, None] | None = None) -> Iterator[None]:
    """Inside, as in a plan, what depends on values is taken to be spread evenly over the ranks.

    told: gets what is taken, with the op and the line of the user's code.
    """
    _Spread.taken = {} if told is None else told
    try:
        yield
    finally:
        _Spread.taken = None


def spreads(name: str, what: str = "") -> bool:
    """Whether numbers that depend on other ranks' values are taken as if spread evenly.

    what: is taken, and told; backward takes what forward has told.
    """
    if _Spread.taken is None or not silent(name):
        return False
    if what and (line := line_of_step()):
        _Spread.taken[f"{op_of(sys._getframe(1))}: {what} ({line})"] = None
    return True


def check_values(name: str) -> None:
    """Raise UnsupportedOpError in a rehearsal, where no rank's values are known to another.

    name: of a group, as `comm.group` gives it. Sends nothing.
    """
    if not knows_values(name) and _Spread.taken is None:
        op = op_of(sys._getframe(1)) or "this op"
        line = call_of_user()[0]
        raise UnsupportedOpError(
            f"{op}: what is sent depends on values (sort, masks, indices), so it cannot be "
            f"rehearsed{f' ({line})' if line else ''}; `plan` takes them as if spread evenly"
        )


def check_loop() -> None:
    """Raise UnsupportedOpError where a rehearsal reads what ends a loop: it might take no end."""
    if _Spread.taken is not None or not dist.is_initialized() or not is_silent(dist.group.WORLD):
        return
    if line := loop_of_user():
        raise UnsupportedOpError(
            f"how many turns a loop takes depends on values, so it cannot be rehearsed ({line}): "
            "bound it by a number, as in `for _ in range(turns)`"
        )


def renew() -> None:
    """Forget what was kept for a process group that was destroyed, if there is another now.

    A mesh of the new one equals that of the old one, hence is found in caches.
    """
    global _world
    if simulated_rank() is not None or not dist.is_initialized():
        return
    now = dist.group.WORLD
    assert now is not None
    if _world is None or _world() is not now:
        clear()
        forget()
        _world = ref(now)


def forget(world: int | None = None) -> None:
    """Drop the groups of a simulated world that has ended; without its number, all."""
    table: dict[str, Any]
    for table in (_groups, _devices, facts, _apart):  # type: ignore[assignment]
        for name in [n for n in table if world is None or n.endswith(f":{world}")]:
            table.pop(name, None)
    facts[ALONE] = Facts(1, 0, False)
