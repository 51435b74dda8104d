"""Samples of any structure as one batch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..spec import Dim
from ..tensor import ShardTensor, wrap


def collate(samples: Sequence[Any]) -> Any:
    """Samples of equal structure as one batch.

    ShardTensors of one spec get a batch dim in front without communication, as do tensors and
    arrays of numbers of one shape. Numbers become a tensor, of Python's floats in float64, as
    torch's DataLoader has it. Dicts, tuples (named ones too), lists and dataclasses stay what they
    are; anything else, and what differs from sample to sample, becomes a list.
    """
    first = samples[0]
    if _parts(first) is not None:
        return _with_parts(first, [collate(parts) for parts in _columns(samples)])
    if isinstance(first, ShardTensor):
        if any(not isinstance(s, ShardTensor) or s.spec != first.spec for s in samples):
            return list(samples)
        local = torch.stack([s.to_local() for s in samples])
        return wrap(local, first.spec.with_dims([Dim(len(samples)), *first.spec.dims]))
    if isinstance(first, np.ndarray | np.generic) and first.dtype.kind in "biufc":
        return collate([_tensor(s) for s in samples])
    if isinstance(first, Tensor):
        alike = all(isinstance(s, Tensor) and s.shape == first.shape for s in samples)
        return torch.stack(list(samples)) if alike else list(samples)
    if isinstance(first, float) and all(isinstance(s, bool | int | float) for s in samples):
        return torch.tensor(samples, dtype=torch.float64)
    if isinstance(first, bool | int) and all(isinstance(s, bool | int) for s in samples):
        return torch.tensor(samples)
    return list(samples)


def moved(x: Any, device: torch.device) -> Any:
    """x on the device; from pinned memory to a GPU, without waiting."""

    def on_device(v: Any) -> Any:
        if isinstance(v, ShardTensor):
            return wrap(on_device(v.to_local()), v.spec)
        if not isinstance(v, Tensor) or v.device.type == device.type:
            return v
        return v.pin_memory().to(device, non_blocking=True)

    return with_leaves(x, on_device)


def with_leaves(x: Any, fn: Callable[[Any], Any]) -> Any:
    """A batch like this one with fn of what its containers hold."""
    parts = _parts(x)
    if parts is None:
        return fn(x)
    return _with_parts(x, [with_leaves(v, fn) for v in parts.values()])


def _parts(x: Any) -> dict[Any, Any] | None:
    """What a container holds; None for a leaf."""
    if isinstance(x, Mapping):
        return dict(x)
    if isinstance(x, tuple | list):
        return dict(enumerate(x))
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
    return None


def _columns(samples: Sequence[Any]) -> list[list[Any]]:
    """Equal parts of all samples together. Raises ValueError where their structures differ."""
    all_parts = [_parts(s) for s in samples]
    first = all_parts[0] or {}
    for s, parts in zip(samples, all_parts, strict=True):
        if parts is None or parts.keys() != first.keys():
            raise ValueError(
                f"samples of one batch differ in structure: {type(samples[0]).__name__} of "
                f"{list(first)}, {type(s).__name__}" + (f" of {list(parts)}" if parts else "")
            )
    return [[parts[k] for parts in all_parts if parts is not None] for k in first]


def _with_parts(like: Any, parts: list[Any]) -> Any:
    """A container like this one of other parts."""
    if isinstance(like, Mapping):
        # a TensorDict has keys, and cannot be iterated over
        return dict(zip(like.keys(), parts, strict=True))
    if isinstance(like, tuple | list):
        make: Callable[..., Any] = type(like)
        return make(*parts) if hasattr(like, "_fields") else make(parts)
    found = copy.copy(like)
    for f, part in zip(dataclasses.fields(like), parts, strict=True):
        object.__setattr__(found, f.name, part)
    return found


def _tensor(x: Any) -> Tensor:
    x = np.asarray(x)
    return torch.from_numpy(np.require(x, x.dtype.newbyteorder("="), ["C", "W"]))
