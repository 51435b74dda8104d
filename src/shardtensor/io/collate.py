"""Samples of any structure as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..containers import Parts, mapped, parts
from ..spec import Dim
from ..tensor import ShardTensor, wrap


def collate(samples: Sequence[Any]) -> Any:
    """Samples of equal structure as one batch.

    ShardTensors of one spec get a batch dim in front without communication, as do tensors and
    arrays of numbers of one shape. Numbers become a tensor, of Python's floats in float64, as
    torch's DataLoader has it. Containers stay what they are, as `containers` finds them; anything
    else, and what differs from sample to sample, becomes a list. Raises ValueError for samples that
    differ in structure.
    """
    first = samples[0]
    found = parts(first)
    if found is not None:
        return found.make([collate(column) for column in _columns(samples, found)])
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

    return mapped(on_device, x)


def _columns(samples: Sequence[Any], first: Parts) -> list[list[Any]]:
    """Equal parts of all samples together. Raises ValueError where their structures differ."""
    columns: dict[str, list[Any]] = {name: [] for name in first.names}
    for s in samples:
        found = parts(s)
        if found is None or set(found.names) != set(first.names):
            raise ValueError(
                f"samples of one batch differ in structure: {_told(samples[0])}, {_told(s)}"
            )
        for name, value in zip(found.names, found.values, strict=True):
            columns[name].append(value)
    return list(columns.values())


def _told(sample: Any) -> str:
    found, kind = parts(sample), type(sample).__name__
    return kind if found is None else f"{kind} of {', '.join(found.names) or 'nothing'}"


def _tensor(x: Any) -> Tensor:
    if np.ma.is_masked(x):
        raise ValueError("a masked array: give x.filled(...), of floats with NaN")
    x = np.asarray(x)
    return torch.from_numpy(as_torch_takes(x, x.dtype.newbyteorder("=")))


def as_torch_takes(x: Any, dtype: np.dtype) -> np.ndarray:
    """Rows first, writable, and no stride below 0, which NumPy leaves where there is one row."""
    found = np.require(x, dtype, ["C", "W"])
    return found.copy() if min(found.strides, default=0) < 0 else found
