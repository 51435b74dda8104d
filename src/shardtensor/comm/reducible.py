"""Vectors that NCCL and gloo reduce, in place of those of dtypes that they do not."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import transport

# dtypes that NCCL does not add up
_WIDER = {
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.float8_e4m3fn: torch.float32,
    torch.float8_e4m3fnuz: torch.float32,
    torch.float8_e5m2: torch.float32,
    torch.float8_e5m2fnuz: torch.float32,
    torch.float8_e8m0fnu: torch.float32,
}


def reducible(
    flat: torch.Tensor, op: str
) -> tuple[torch.Tensor, str, Callable[[torch.Tensor], object]]:
    """(a vector, an op of it, what brings its values back): of a dtype that NCCL and gloo reduce.

    The vector shares the memory of `flat` where it can. Integers wrap as those of `flat` do.
    """
    if flat.is_complex():
        if op != "sum":
            raise ValueError(f"all_reduce {op} of complex numbers")
        return torch.view_as_real(flat).view(-1), op, _stay
    if flat.dtype is torch.bool:
        # logical or / and: sums of booleans saturate
        return flat.view(torch.uint8), {"sum": "max", "product": "min"}.get(op, op), _stay
    if flat.dtype in transport.REDUCED:
        return flat, op, _stay
    if flat.dtype is torch.uint64:
        signed, top = flat.view(torch.int64), torch.iinfo(torch.int64).min
        if op in ("sum", "product"):
            return signed, op, _stay
        # the order of the numbers is that of the signed ones with the first bit turned over
        return signed ^ top, op, lambda turned: signed.copy_(turned ^ top)
    if flat.dtype not in _WIDER:
        raise ValueError(f"all_reduce of {flat.dtype}")
    return flat.to(_WIDER[flat.dtype]), op, lambda summed: flat.copy_(summed)


def _stay(x: torch.Tensor) -> None:
    """The values are where they belong."""
