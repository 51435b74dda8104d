"""varlen_attn: sequences of several lengths beside each other, wherever shards begin and end.

It is flex_attention under the mask of tokens of one sequence, so each rank gets the keys of the
sequences that reach into its shard, and computes their tiles. Windows align at the last token.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ...cache import of_tensor
from ...dispatch.rule import rule
from ...errors import UnsupportedOpError
from ...tensor import ShardTensor
from ..operands import lifted
from .flex import Now, flex_attention

NAME = "torch.nn.attention.varlen.varlen_attn"
TILE = 128


class Hidden(NamedTuple):
    """What flex_attention asks of a block mask."""

    mask_mod: Any
    BLOCK_SIZE: tuple[int, int]
    kv_indices: Tensor
    shape: tuple[int, int, int, int]


@rule(NAME)
def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Any:
    """query (T, H, D), key and value (S, G, D): whole sequences, one after the other."""
    if seqused_k is not None or block_table is not None or cu_seq_k is None:
        raise UnsupportedOpError(
            "varlen_attn of ShardTensors with seqused_k or block_table, or without cu_seq_k: give "
            "it the keys that are meant, packed"
        )
    ends = [x.full_tensor() if isinstance(x, ShardTensor) else x for x in (cu_seq_q, cu_seq_k)]
    lengths = query.shape[0], key.shape[0]
    left, right = window_size

    def make() -> list[Tensor]:
        return _places(ends[0], ends[1], *lengths)

    # the same tensors for each layer, for which what is seen is found once
    numbers, other, at, keys_at = of_tensor(ends[0], (NAME, Now(ends[1]), lengths), make)

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same, apart = numbers[i] == other[j], keys_at[j] - at[i]
        same = same if right < 0 else same & (apart <= right)
        return same if left < 0 else same & (apart >= -left)

    mask = Hidden(seen, (TILE, TILE), ends[0], (1, 1, *lengths))
    given = query, key, value, cu_seq_q, cu_seq_k
    # of plain tokens too, where only their lengths are sharded
    q, k, v = (lifted(x, *given).transpose(0, 1).unsqueeze(0) for x in given[:3])
    out, lse = flex_attention(q, k, v, None, mask, scale, enable_gqa, return_lse=True)
    out = out[0].transpose(0, 1)
    return (out, lse[0]) if return_aux is not None and return_aux.lse else out


def _places(cu_q: Tensor, cu_k: Tensor, queries: int, keys: int) -> list[Tensor]:
    """The sequences of queries and of keys, -1 and -2 of those in none, and where they are in it.

    A query stands where the last one of a sequence meets its last key.
    """
    found = list[Tensor]()
    for cu, n, none in ((cu_q, queries, -1), (cu_k, keys, -2)):
        at = torch.arange(n, device=cu.device)
        number = torch.searchsorted(cu.long(), at, right=True) - 1
        inside = (number >= 0) & (number < len(cu) - 1)
        number = number.clamp(0, max(0, len(cu) - 2))
        after = at - cu[1:].long()[number] if len(cu) > 1 else at
        found += [torch.where(inside, number, none), after]
    return [found[0], found[2], found[1], found[3]]


@rule(f"{NAME}_out")
def varlen_attn_out(*args: Any, **kwargs: Any) -> NoReturn:
    raise UnsupportedOpError("varlen_attn_out of ShardTensors: use varlen_attn")
