"""Sequences of several lengths side by side, padded or packed one time step after the other.

Torch's own functions say where rows go: they are called on numbers of rows, which are small and
the same on all ranks, and the rows move as any index takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..._torch import ragged
from ...registry import rule
from ...tensor import ShardTensor


def _plain(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, ShardTensor) else x


@rule("pad_sequence")
def pad_sequence(
    sequences: Sequence[Tensor],
    batch_first: bool = False,
    padding_value: float = 0.0,
    padding_side: str = "right",
) -> Tensor:
    # what torch refuses
    ragged.pad_sequence([_meta(x) for x in sequences], batch_first, padding_value, padding_side)  # type: ignore[arg-type]
    longest, features = max(len(x) for x in sequences), sequences[0].shape[1:]
    rows = []
    for x in sequences:
        # torch writes each into a tensor like the first
        x = x.to(sequences[0].dtype)
        x = x if x.shape[1:] == features else x.expand(len(x), *features)
        ahead = longest - len(x)
        at = (ahead, 0) if padding_side == "left" else (0, ahead)
        rows.append(F.pad(x, (*[0] * 2 * (x.ndim - 1), *at), value=padding_value))
    return torch.stack(rows, 0 if batch_first else 1)


def _meta(x: Tensor) -> Tensor:
    return torch.empty((), dtype=x.dtype, device="meta").expand(x.shape)


@rule("_pack_padded_sequence")
def pack(input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    """(rows of all sequences by time step, how many each step has); the latter plain."""
    steps, sequences = input.shape[:2] if not batch_first else input.shape[1::-1]
    numbers = torch.arange(steps * sequences).reshape(steps, sequences)
    taken, counts = ragged.pack(numbers, _plain(lengths), False)
    at = taken.to(input.device)
    time, number = at // sequences, at % sequences
    return input[number, time] if batch_first else input[time, number], counts


@rule("_pad_packed_sequence")
def unpack(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: Any, total_length: int
) -> tuple[Tensor, Tensor]:
    """(padded sequences, their lengths); the latter plain."""
    numbers = torch.arange(data.shape[0])
    at, lengths = ragged.unpack(numbers, _plain(batch_sizes), batch_first, -1, total_length)
    at = at.to(data.device)
    rows = data[at.clamp(min=0)]
    missing = (at < 0).reshape(*at.shape, *[1] * (data.ndim - 1))
    return rows.masked_fill(missing, padding_value), lengths


@rule("_nested_tensor_from_mask_left_aligned")
def left_aligned(t: Tensor, mask: Tensor) -> bool:
    """What nn.TransformerEncoder asks before a way that it does not go for ShardTensors."""
    whole = _plain(mask)
    stand_in = torch.empty((), dtype=t.dtype, device=t.device).expand(t.shape)
    return bool(ragged.left_aligned(stand_in, whole))
