"""Private torch APIs of flex_attention: its checks and results, and what stands for nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..later import flex as _flex


def is_identity(score_mod: Any) -> bool:
    """Whether a score_mod is torch's own that changes nothing."""
    return score_mod is _flex._identity


def is_noop(mask_mod: Any) -> bool:
    """Whether a mask_mod is torch's own that hides nothing."""
    return mask_mod is _flex.noop_mask


def takes_scores(mod: Any) -> bool:
    """Whether a function is a score_mod, by how many arguments it takes."""
    return _flex._get_mod_type(mod) is _flex._ModificationType.SCORE_MOD


def device_of(create: Any, args: Any, kwargs: Any) -> Any:
    """The device on which create_mask or create_block_mask makes its mask, of all but its mod."""
    bound = inspect.signature(create).bind(None, *args, **kwargs)
    asked = bound.arguments.get("device")
    return asked or torch.accelerator.current_accelerator() or "cpu"


def is_endless(block_mask: Any) -> bool:
    """Whether a block mask has one block, of any length."""
    return all(n == _flex._LARGE_SPARSE_BLOCK_SIZE for n in block_mask.BLOCK_SIZE)


def asked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    return_lse: bool,
    kernel_options: Any,
    return_aux: Any,
) -> Callable[[Any, Any, Any], Any]:
    """What makes flex_attention's result of out, log-sum-exps and maxima; raises as torch does."""
    if return_lse and return_aux is not None:
        raise ValueError(
            "Cannot specify both return_lse and return_aux. return_lse is deprecated, please use "
            "return_aux=AuxRequest(lse=True) instead."
        )
    _flex._apply_kernel_options(query, key, value, return_lse, kernel_options, return_aux)

    def result(out: Any, lse: Any, top: Any) -> Any:
        if return_aux is None:
            return (out, lse) if return_lse else out
        return out, _flex.AuxOutput(
            lse=lse if return_aux.lse else None, max_scores=top if return_aux.max_scores else None
        )

    return result
