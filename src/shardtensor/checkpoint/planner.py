"""Which value of a checkpoint goes where: none is left out, none without a place."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, WriteItem

from ..later import dt
from ..tensor import ShardTensor
from .alike import digest
from .storage import loaded


class SavePlanner(DefaultSavePlanner):
    """Refuses to write what `load` would refuse to read; of a value that ranks have otherwise each
    writes the first one's.

    error: what this rank's state raised, which all are to raise.
    """

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error = error

    def create_local_plan(self) -> SavePlan:
        if self.error is not None:
            raise self.error
        for key, value in self.state_dict.items():
            if isinstance(value, Tensor) and (value.is_meta or value.layout is not torch.strided):
                kind = "without memory (meta)" if value.is_meta else f"of {value.layout}"
                raise ValueError(f"{key} is a tensor {kind}: give a dense one with values")
        plan = super().create_local_plan()
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return plan
        digests = [
            0 if _is_own(self.state_dict[item.index.fqn])
            else digest(self.lookup_object(item.index))
            for item in plan.items
        ]  # fmt: skip
        return replace(plan, planner_data=(plan.planner_data, digests))

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        known: dict[str, tuple[str, int]] = {}
        for rank, plan in enumerate(all_plans):
            for item in plan.items:
                kind = _kind(item)
                first, before = known.setdefault(item.index.fqn, (kind, rank))
                if kind != first:
                    raise ValueError(
                        f"{item.index.fqn} is {first} on rank {before}, {kind} on rank {rank}: one "
                        "of them would be kept; give a key to each rank's own"
                    )
        if len(all_plans) > 1:
            all_plans = _of_first(all_plans)
        return super().create_global_plan(all_plans)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        try:
            data = super().transform_object(write_item, object)
            if isinstance(data, io.BytesIO):
                loaded(io.BytesIO(data.getbuffer()))
        except Exception as e:
            raise ValueError(
                f"{write_item.index.fqn} is {type(object).__name__}, and checkpoints hold tensors, "
                f"numbers, text and containers of these ({e}): give it as such"
            ) from e
        return data


def _is_own(x: Any) -> bool:
    """Whether no other rank has the rows of a tensor that this one has."""
    if not isinstance(x, ShardTensor | dt.DTensor):
        return False
    return x.device_mesh.size() == dist.get_world_size() and all(p.is_shard() for p in x.placements)


def _of_first(plans: list[SavePlan]) -> list[SavePlan]:
    """The plans without the values that differ from those of the first rank; a warning tells."""
    known: dict[MetadataIndex, tuple[int, int]] = {}
    kept, others = [], dict[str, str]()
    for rank, plan in enumerate(plans):
        mappings, digests = plan.planner_data
        items = []
        for item, mine in zip(plan.items, digests, strict=True):
            first, of = known.setdefault(item.index, (mine, rank))
            if mine == first:
                items.append(item)
            else:
                others.setdefault(item.index.fqn, f"{item.index.fqn} (ranks {of} and {rank})")
        kept.append(replace(plan, items=items, planner_data=mappings))
    if others:
        warnings.warn(
            f"checkpoint: ranks have other values of {_some(list(others.values()))}; that of the "
            "first of them is saved, and all will load it. Give each rank's own a key of its own, "
            "or make them the same before",
            stacklevel=1,
        )
    return kept


def _kind(item: WriteItem) -> str:
    data = item.tensor_data
    if data is None:
        return "no tensor"
    return f"a tensor of {data.properties.dtype} {tuple(data.size)}"


class Planner(DefaultLoadPlanner):
    """Every key of the state is read, and nothing below its first keys is left unread.

    strict: whether that is so. name: of the checkpoint, which must be the same on all ranks. An
    optimizer's state_dict that is still empty takes what the file has.
    """

    def __init__(self, strict: bool, name: str, first: str) -> None:
        super().__init__(allow_partial_load=not strict)
        self._same = (name, first)
        self._made: list[tuple[dict[Any, Any], Any]] = []

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        name, first = self._same
        if name != first:
            raise ValueError(f"the first rank loads {first}, this one {name}: give all the same")
        if not dist.is_initialized() and any(v.is_meta for v in _tensors(state_dict)):
            # with ranks DCP makes them, on the group's device
            raise ValueError(
                "tensors of the state are without memory (meta): call model.to_empty(device=...) "
                "before its state_dict()"
            )
        self._made = _fill(state_dict, metadata)
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        entries = self.metadata.state_dict_metadata
        if not self.allow_partial_load:
            first = {str(k) for k in self.original_state_dict}
            paths = self.metadata.planner_data or {}
            unread = [
                k for k in entries
                if k not in self.state_dict and _first(k, paths, first)
            ]  # fmt: skip
            missing = [k for k in self.state_dict if k not in entries]
            if missing or unread:
                raise ValueError(_differ(missing, unread))
        for key, value in self.state_dict.items():
            if key in entries:
                _same_kind(key, value, entries[key])
        return create_default_local_load_plan(
            self.state_dict, self.metadata, not self.allow_partial_load
        )

    def put(self, request: ReadItem, value: Any) -> None:
        """Set a value that is no tensor."""
        *way, last = self.mappings[request.dest_index.fqn]
        at: Any = self.original_state_dict
        for step in way:
            at = at[_key(at, step)]
        at[_key(at, last)] = value

    def fill(self, request: ReadItem, part: Tensor) -> None:
        """Copy numbers into their tensor, whose dtype must hold them."""
        target = self.resolve_tensor(request).detach()
        if not torch.can_cast(part.dtype, target.dtype):
            raise ValueError(f"{part.dtype} does not go into a tensor of {target.dtype}")
        made = part.to(target.dtype)
        if made.dtype != part.dtype and not _held(part, made):
            raise ValueError(f"its numbers of {part.dtype} are too large for {target.dtype}")
        target.copy_(made)
        self.commit_tensor(request, target)

    def undo(self) -> None:
        """Take back what was made for a checkpoint that could not be loaded."""
        for into, key in reversed(self._made):
            into.pop(key, None)


def _held(x: Tensor, made: Tensor) -> bool:
    """Whether made has the whole numbers of x, or is finite where x is."""
    if x.is_floating_point() or x.is_complex():
        # there are dtypes of one byte without kernels
        x, made = (v.float() if v.itemsize == 1 else v for v in (x, made))
        return bool(made.isnan().equal(x.isnan()) and made.isfinite().equal(x.isfinite()))
    return made.to(x.dtype).equal(x)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    for v in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
        yield from _tensors(v)


def _key(at: Any, step: Any) -> Any:
    """The key of a dict or list that DCP, which makes them text, calls so."""
    if not isinstance(at, Mapping) or step in at:
        return step
    if step.isdecimal() and int(step) in at:
        return int(step)
    return next(k for k in at if str(k) == step)


def _first(key: str, paths: Mapping[str, Any], asked: set[str]) -> bool:
    """Whether the state has the first key of the path to this one."""
    if key in paths:
        return paths[key][0] in asked
    return any(key.startswith(f"{a}.") for a in asked)


def _differ(missing: list[str], unread: list[str]) -> str:
    said = []
    if missing:
        said.append(f"it does not have {_some(missing)}, which the state asks for")
    if unread:
        said.append(f"the state has no place for {_some(unread)}")
    return (
        "; ".join(said) + ". Give a state as it was saved (of an optimizer that has not stepped: "
        "its state_dict(), or get_state_dict of torch.distributed.checkpoint.state_dict), leave "
        "out first keys that are not wanted, or load(..., strict=False)"
    )


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - 8} more" if len(keys) > 8 else ""
    return ", ".join(sorted(keys)[:8]) + more


def _same_kind(key: str, value: Any, entry: Any) -> None:
    """A tensor is filled in place, all else replaced: neither can stand for the other."""
    stored = isinstance(entry, TensorStorageMetadata)
    if stored != isinstance(value, Tensor):
        kind = f"a tensor of {tuple(entry.size)}" if stored else "a value that is no tensor"
        raise ValueError(f"{key} is {kind} in the file, in the state it is {type(value).__name__}")
    if stored and value.layout is not torch.strided:
        raise ValueError(f"{key} is dense in the file, in the state it is of {value.layout}")
    if stored and sum(prod(c.sizes) for c in entry.chunks) != prod(entry.size):
        raise ValueError(f"{key} of {tuple(entry.size)} is not in the file as a whole")


# an optimizer that has not stepped ----------------------------------------------------------------


def _fill(state: Any, metadata: Metadata) -> list[tuple[Any, Any]]:
    """Make room in an optimizer's empty state_dict for what the file has; what was added where.

    Only for what was saved whole: of shards it is not known where they shall be.
    """
    paths = metadata.planner_data or {}
    made = []
    for prefix, found in _fresh(state, ()):
        n = len(prefix)
        into, groups = found["state"], found["param_groups"]
        params = {str(p): p for g in groups for p in g["params"]}
        trees: dict[Any, dict[Any, Any]] = {}
        for key, path in paths.items():
            entry = metadata.state_dict_metadata.get(key)
            if path[:n] != prefix or len(path) < n + 3 or not _whole(entry):
                continue
            first, second, *way = path[n:]
            if first == "state" and second in params:
                tree = trees.setdefault(params[second], {})
                for step in way[:-1]:
                    tree = tree.setdefault(step, {})
                tree[way[-1]] = _room(key, metadata)
            elif (
                first == "param_groups" and second in range(len(groups))
                and len(way) == 1 and way[0] not in groups[second]
            ):  # fmt: skip
                groups[second][way[0]] = _room(key, metadata)
                made.append((groups[second], way[0]))
        for p, tree in trees.items():
            into[p] = _grown(tree)
            made.append((into, p))
    return made


def _fresh(x: Any, path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The state_dicts of optimizers without state, and where in the state they are."""
    if isinstance(x, dict):
        groups = x.get("param_groups")
        known = isinstance(groups, list) and all(
            isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups
        )
        if known and x.get("state") == {}:
            yield path, x
        for k, v in x.items():
            yield from _fresh(v, (*path, str(k)))
    elif isinstance(x, list):
        for i, v in enumerate(x):
            yield from _fresh(v, (*path, i))


def _whole(entry: Any) -> bool:
    if isinstance(entry, TensorStorageMetadata):
        return [c.sizes for c in entry.chunks] == [entry.size]
    return isinstance(entry, BytesStorageMetadata)


def _room(key: str, metadata: Metadata) -> Tensor | None:
    """A tensor to read into; None for other values."""
    entry = metadata.state_dict_metadata[key]
    if not isinstance(entry, TensorStorageMetadata):
        return None
    dtype = entry.properties.dtype
    place = metadata.storage_data[MetadataIndex(key, entry.chunks[0].offsets)]
    if prod(entry.size) * dtype.itemsize > place.length:
        raise ValueError(f"{key} of {tuple(entry.size)} has {place.length} bytes in {place.file}")
    return torch.empty(entry.size, dtype=dtype)


def _grown(tree: Any) -> Any:
    """Dicts and lists of a tree whose steps are text and numbers."""
    if not isinstance(tree, dict):
        return tree
    if all(type(k) is int for k in tree):
        if sorted(tree) != list(range(len(tree))):
            raise ValueError(f"a list has items {sorted(tree)[:8]}")
        return [_grown(tree[i]) for i in range(len(tree))]
    if any(type(k) is int or k.isdecimal() for k in tree):
        # DCP has made text of them
        raise ValueError("an optimizer's state has a dict of numbers: give a state with its keys")
    return {k: _grown(v) for k, v in tree.items()}
