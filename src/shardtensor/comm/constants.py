"""Small tensors of numbers that every rank knows, on its device: copied there once.

A copy from the host waits for the device, and a CUDA graph forbids it while it is captured. What is
made there is not kept: its memory is the graph's, and has its numbers in the graph's replays only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _torch, cache
from .._torch import probe

_MOST, _FEW = 4096, 4096
# dtypes whose zero has no sign
_WHOLE = {torch.int32, torch.int64}


# of no mesh: worlds that follow one another find them, as ranks do that take turns in one memory
_numbers: dict[Any, Tensor] = {}


def constant(values: tuple[float, ...] | float, dtype: torch.dtype, like: Tensor) -> Tensor:
    """The tensor of some numbers, or of one without dims, on the device of `like`; not to write to.

    Of a tensor that is not plain, such as a fake one, it is made anew: it belongs to who looks on.
    """
    if type(like) not in (Tensor, torch.nn.Parameter):
        return like.new_tensor(values, dtype=dtype)
    device = like.device
    # 0.0 and -0.0 are equal, but their signs differ; of many numbers a text takes long
    nonzero = all(values) if isinstance(values, tuple) else values
    key = (values if nonzero or dtype in _WHOLE else repr(values)), dtype, device
    found = _numbers.get(key)
    if found is not None:
        return found
    if _torch.transforming():
        # a tensor of the transform, which ends with it
        return torch.tensor(values, dtype=dtype, device=device)
    # what is made in inference mode could not be saved for backward
    with torch.inference_mode(False), cache.making():
        if cache.capturing(device):
            return _filled(values, dtype, device)
        found = torch.tensor(values, dtype=dtype, device=device)
    # a mode that looks on, a pager, may put large ones away, while others read them
    if type(found) is Tensor and (found.numel() <= _FEW or not probe.dispatch_modes()):
        if len(_numbers) >= _MOST:
            _numbers.clear()
        _numbers[key] = found
    return found


def _filled(values: tuple[float, ...] | float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same by kernels alone, which take numbers as their arguments."""
    each = values if isinstance(values, tuple) else (values,)
    found = torch.empty(len(each), dtype=dtype, device=device)
    for to, value in zip(found.unbind(), each, strict=True):
        to.fill_(value)
    return found if isinstance(values, tuple) else found[0]
