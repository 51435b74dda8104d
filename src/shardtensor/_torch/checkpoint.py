# mypy: disable-error-code="assignment, attr-defined, misc, method-assign"
"""Private torch APIs of activation checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import checkpoint


def install(around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Let what checkpoints recompute be around(function), made when the forward runs."""
    frame = checkpoint._CheckpointFrame
    make = frame.__init__

    def made(self: Any, recompute: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        make(self, around(recompute), *args, **kwargs)

    # others than torch.utils.checkpoint have imported what makes frames
    frame.__init__ = made
    reentrant = checkpoint.CheckpointFunction
    forward = reentrant.forward

    def run(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
        return forward(ctx, around(function), *args)

    reentrant.forward = staticmethod(run)


def install_inputs(apart: Callable[[Any], tuple[Any, Any]], joined: Callable[..., Any]) -> None:
    """Let checkpoints keep apart(x)[0] for an input x, and recompute with joined(*apart(x))."""
    frame = checkpoint._CheckpointFrame
    if not hasattr(frame, "save_inputs"):
        _install_saver(checkpoint._NoopSaveInputs, apart, joined)
        return
    save, get = frame.save_inputs, frame.get_inputs

    def save_inputs(self: Any, *args: Any) -> None:
        parts = [apart(a) for a in args]
        self._shardtensor_rest = [rest for _, rest in parts]
        save(self, *(kept for kept, _ in parts))

    def get_inputs(self: Any) -> list[Any]:
        return [joined(*pair) for pair in zip(get(self), self._shardtensor_rest, strict=True)]

    frame.save_inputs, frame.get_inputs = save_inputs, get_inputs


def _install_saver(
    saver: Any, apart: Callable[[Any], tuple[Any, Any]], joined: Callable[..., Any]
) -> None:
    """The same of torch 2.11, whose checkpoints keep inputs in a node of autograd."""
    save = saver.setup_context

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        parts = [apart(x) for x in inputs]
        save(ctx, tuple([kept for kept, _ in parts]), output)
        get = ctx.get_args
        # the first input is not one of the user's
        rests = [rest for _, rest in parts[1:]]
        ctx.get_args = lambda saved: [joined(*pair) for pair in zip(get(saved), rests, strict=True)]

    saver.setup_context = staticmethod(setup)


def install_recomputed(again: Callable[[Any], Any]) -> None:
    """Let reentrant checkpoints begin recomputation from again(x) for each input x."""
    detach = checkpoint.detach_variable
    checkpoint.detach_variable = lambda inputs: detach(tuple(map(again, inputs)))


def checkpointed(module: torch.nn.Module) -> None:
    """Keep only the module's inputs for backward; its class and its state_dict stay."""
    from torch.distributed._composable import checkpoint, checkpoint_activation

    if not isinstance(checkpoint_activation._no_hook, type):
        _Again.make = staticmethod(checkpoint_activation._no_hook)
        checkpoint_activation._no_hook = _Again
    checkpoint(module)


class _Again:
    """What a checkpoint recomputes in, each time: torch's own (2.11 to 2.15) is entered once.

    A second backward, as of a gradient penalty, recomputes what the first one has dropped.
    """

    make: Any

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.entered: list[Any] = []

    def __enter__(self) -> None:
        self.entered.append(self.make(*self.args))
        self.entered[-1].__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self.entered.pop().__exit__(*error)
