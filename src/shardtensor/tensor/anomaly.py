"""torch.autograd.detect_anomaly on shards: a NaN in backward on one rank is an error on all.

Torch's engine raises where it finds one, in the middle of what other ranks wait for. Here backward
runs to its end, with a hook on each node, and then the ranks tell each other.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.distributed.device_mesh import DeviceMesh

from .. import _torch, comm
from ..comm import wire
from ..comm.observers import simulated_rank
from ..later import dt
from ..registry import method
from .apart import told
from .nodes import raw, spec_of
from .shard_tensor import ShardTensor

# bytes of a node's name that are told
_LENGTH = 64
# in the metadata of a node whose result left a ShardTensor: its mesh
_MESH = "shardtensor_mesh"
# backwards of a rank that look for NaNs now, one within another: torch's own search is off there
_running: Counter[int | None] = Counter()


@method
def watched(x: ShardTensor) -> Callable[..., None]:
    """torch.autograd.backward of the local tensor of x, in `watching`."""

    def backward(*args: Any, **kwargs: Any) -> None:
        with watching([x]):
            torch.autograd.backward(*args, **kwargs)

    return backward


@method
def left(local: Tensor, mesh: DeviceMesh) -> None:
    """Note that backward from a plain tensor that comes of this one runs on the ranks of a mesh."""
    node: Any = local.grad_fn
    if node is not None:
        node.metadata[_MESH] = mesh


def watching(roots: Iterable[Any]) -> AbstractContextManager[None]:
    """What a backward from these runs in; NaNs that torch is to find are raised on all ranks.

    Called where `torch.is_anomaly_enabled()`. From a plain tensor it is known whose ranks run it if
    anomalies were looked for in its forward, too.
    """
    if not (_running[simulated_rank()] or torch.is_anomaly_check_nan_enabled()):
        return nullcontext()
    found = list(roots)
    nodes = _nodes(found)
    meshes = [s.mesh for s in map(spec_of, found) if s is not None]
    meshes = meshes or [node.metadata[_MESH] for node in nodes if _MESH in node.metadata]
    return _watching(nodes, _largest(meshes)) if meshes else nullcontext()


def _largest(meshes: list[DeviceMesh]) -> list[DeviceMesh]:
    """Those of the meshes whose ranks no other one has, too; large ones first."""
    found, known = [], list[set[int]]()
    for mesh in sorted(dict.fromkeys(meshes), key=DeviceMesh.size, reverse=True):
        ranks = set(mesh.mesh.flatten().tolist())
        if not any(ranks <= others for others in known):
            found.append(mesh)
            known.append(ranks)
    return found


@contextmanager
def _watching(nodes: list[Any], meshes: list[DeviceMesh]) -> Iterator[None]:
    me = simulated_rank()
    found: list[tuple[Any, int]] = []
    handles = [node.register_hook(_search(node, found)) for node in nodes]
    _running[me] += 1
    torch.autograd.set_detect_anomaly(True, check_nan=False)
    try:
        yield
    finally:
        _running[me] -= 1
        if not _running[me]:
            torch.autograd.set_detect_anomaly(True, check_nan=True)
        for handle in handles:
            handle.remove()
    _tell(found, meshes)


def _search(node: Any, found: list[tuple[Any, int]]) -> Any:
    # no cycle of a node and its hook, which nobody would free
    name, metadata = node.name(), node.metadata

    def hook(grads: tuple[Any, ...], _: Any) -> None:
        for i, g in enumerate(grads if not found else ()):
            if g is not None and _has_nan(g):
                found.append((name, i))
                trace = "".join(metadata.get("traceback_", ()))
                warnings.warn(
                    f"Error detected in {name}. Traceback of forward call that caused the error:\n"
                    f"{trace or 'none: run the forward pass with anomaly detection, too'}",
                    stacklevel=2,
                )

    return hook


def _has_nan(g: Tensor) -> bool:
    own = g._local if isinstance(g, ShardTensor) else g
    own = own.to_local() if isinstance(own, dt.DTensor) else own
    return any(bool(part.isnan().any()) for part in _torch.dense_parts(own))


def _nodes(roots: list[Any]) -> list[Any]:
    """All nodes that a backward from these may run, but for those of leaves.

    In the order in which they are met, which is the same on all ranks.
    """
    first = [
        raw(x.node) if isinstance(x, GradientEdge) else getattr(x, "_local", x).grad_fn
        for x in roots
    ]
    waiting = [node for node in first if node is not None]
    seen = dict.fromkeys(waiting)
    while waiting:
        for other, _ in waiting.pop().next_functions:
            if other is not None and other not in seen:
                seen[other] = None
                waiting.append(other)
    return [node for node in seen if not hasattr(node, "variable")]


def _tell(found: list[tuple[Any, int]], meshes: list[DeviceMesh]) -> None:
    """Raise on all ranks of the meshes what the first of them has found."""
    mine = [0] * (_LENGTH + 2)
    for name, place in found[:1]:
        text = name.encode()[:_LENGTH]
        mine[: len(text) + 2] = place + 1, meshes[0].get_rank(), *text
    for mesh in meshes:
        # along each what those before have brought
        group = comm.group(mesh, tuple(range(mesh.ndim)))
        every = wire.all_gather_numbers(mine, mesh.device_type, group)
        mine = next((list(x) for x in every if x[0]), mine)
    place, rank, *sent = mine
    if place:
        name = bytes(sent).rstrip(b"\0").decode(errors="replace")
        what = f"Function '{name}' returned nan values in its {place - 1}th output"
        raise told(RuntimeError(f"{what}, on rank {rank}"))
