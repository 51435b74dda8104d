# mypy: disable-error-code="assignment, attr-defined, misc, method-assign"
"""Private torch APIs of activation checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils import checkpoint


def install(around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let what checkpoints recompute be around(function), made when the forward runs."""
    begin = checkpoint._checkpoint_without_reentrant_generator

    def without_reentrant(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return begin(around(fn), *args, **kwargs)

    checkpoint._checkpoint_without_reentrant_generator = without_reentrant
    reentrant = checkpoint.CheckpointFunction
    forward = reentrant.forward

    def run(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
        return forward(ctx, around(function), *args)

    reentrant.forward = staticmethod(run)
