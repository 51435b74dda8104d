"""Inputs by the arguments of forward and by their shapes; where they have the dims of the first."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..containers import mapped, parts


def called(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of forward: a tuple or list of them, a dict by name, else the only one.

    A dict whose keys are no arguments of forward is itself the only one, if forward takes one.
    """
    if type(inputs) in (list, tuple):
        return tuple(inputs), {}
    named = isinstance(inputs, Mapping) and all(isinstance(k, str) for k in inputs)
    if named and (_takes(model, **inputs) or not _takes(model, inputs)):
        return (), dict(inputs)
    return (inputs,), {}


def _takes(model: nn.Module, *args: Any, **kwargs: Any) -> bool:
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return True


def dims_like(
    shape: Sequence[int], first: Sequence[int], dims: Sequence[int]
) -> tuple[int, ...] | None:
    """Where a tensor has the dims of the first one, by their sizes: from the front, else the back.

    So fields (B, V, levels, H, W) are cut as those of (B, C, H, W) are, and a mask (H, W), too.
    """
    for shift in (0, len(shape) - len(first)):
        found = tuple(d + shift for d in dims)
        pairs = zip(dims, found, strict=True)
        if all(0 <= e < len(shape) and shape[e] == first[d] for d, e in pairs):
            return found
    return None


class At(int):
    """The place of an input among all, where it stands in what forward takes."""


def formed(inputs: Any) -> tuple[Any, list[Any]]:
    """(form, inputs): shapes and tensors, however nested; in their form `At` in place.

    What is neither a shape nor a tensor stays in the form.
    """
    found: list[Any] = []

    def of(x: Any) -> Any:
        if isinstance(x, Tensor) or _is_shape(x):
            found.append(x)
            return At(len(found) - 1)
        inside = parts(x)
        return x if inside is None else inside.make([of(v) for v in inside.values])

    return of(inputs), found


def filled(form: Any, made: Sequence[Any]) -> Any:
    """What forward takes, of its form and the inputs that were made."""
    return mapped(lambda x: made[x] if isinstance(x, At) else x, form)


def _is_shape(x: Any) -> bool:
    return isinstance(x, tuple | list) and all(
        isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in x
    )
