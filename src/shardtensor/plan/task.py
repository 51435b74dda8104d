"""What is to run, of which a plan is made: a model, its inputs, its loss and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .trees import At, formed


@dataclass(frozen=True)
class Task:
    """What is to run: a step of training or, with train=False, of inference.

    make: gives the model; it runs on fake tensors. shapes, dtypes: of the inputs of forward, for
    the whole batch, in a list, or a dict by name or that forward takes, nested as forward takes
    them; that of the only one as it is. A tensor in place of a shape has values that the model may
    read (edges, masks, lengths).
    dims: those of the first input that may be sharded (default: all from 2, else 0), and of others
    with dims of these sizes, counted from the front or else the back; dim 0 is the batch if it is
    not among them. loss: of the model's output (default: the mean square of all). optimizer: of
    the parameters. tensor: how weights lie on a tensor axis, as `tensor_parallel` takes it.
    form: how shapes are nested; found from them. Raises ValueError for dims that the first input
    has not, or twice, and for a model in place of what makes it.
    """

    make: Callable[[], nn.Module]
    shapes: Any
    dtypes: Sequence[torch.dtype] = ()
    dims: Sequence[int] = ()
    train: bool = True
    loss: Callable[[Any], Tensor] | None = None
    optimizer: Callable[[Any], torch.optim.Optimizer] = torch.optim.AdamW
    tensor: Mapping[str, Any] = field(default_factory=dict)
    form: Any = field(default=None, repr=False)
    values: Sequence[Tensor | None] = field(default=(), init=False)
    # of the optimizer on weights alike: what its step books
    booked: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.make, nn.Module):
            raise ValueError("make is a model: give what makes it, as in `lambda: Net()`")
        form, found = formed(self.shapes) if self.form is None else (self.form, self.shapes)
        if isinstance(form, At) and tuple(getattr(self.shapes, "shape", self.shapes)):
            form = [form]
        if not found or isinstance(form, At):
            raise ValueError(
                f"shapes {self.shapes!r:.60}: that of each input, as [(1, 3, 64, 64)] or by name"
            )
        values = tuple(s.detach() if isinstance(s, Tensor) else None for s in found)
        object.__setattr__(self, "form", form)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "shapes", tuple(tuple(getattr(s, "shape", s)) for s in found))
        first = self.shapes[0]
        dims = tuple(self.dims) or tuple(range(2, len(first))) or (0,)
        if not dims or not all(0 <= d < len(first) for d in dims) or len({*dims}) < len(dims):
            raise ValueError(
                f"dims to shard are {dims} of an input {first}: name them, as dims=(1,)"
            )
        object.__setattr__(self, "dims", dims)
        object.__setattr__(
            self,
            "dtypes",
            tuple(
                d if x is None else x.dtype
                for d, x in zip(
                    tuple(self.dtypes) or (torch.float32,) * len(values), values, strict=True
                )
            ),
        )
