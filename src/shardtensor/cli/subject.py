"""What a command is about: a model and its inputs, named on the command line."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..later import styles


@dataclass(frozen=True)
class Input:
    """Shape and dtype of one argument of the model's forward."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @classmethod
    def parse(cls, text: str) -> Input:
        """ "1x3x512x512" or "1x3x512x512:bfloat16". Raises ValueError for anything else."""
        sizes, _, name = text.partition(":")
        dtype = getattr(torch, name or "float32", None)
        try:
            shape = tuple(int(n) for n in sizes.split("x"))
        except ValueError:
            shape = ()
        if not shape or min(shape) < 0 or not isinstance(dtype, torch.dtype):
            raise ValueError(f"{text!r} is no input: write 1x3x512x512 or 1x3x512x512:bfloat16")
        return cls(shape, dtype)

    def make(self, device: torch.device | str = "cpu") -> Tensor:
        """Normal numbers; of an integer or boolean dtype, zeros."""
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return torch.randn(self.shape, dtype=self.dtype, device=device)
        return torch.zeros(self.shape, dtype=self.dtype, device=device)


def given(texts: Sequence[str]) -> list[Input] | dict[str, Input]:
    """Inputs in order, or by name: "1x3x64x64", or "static=1x2x64x64" for every one of them."""
    named = [text.partition("=") for text in texts]
    if not any(equals for _, equals, _ in named):
        return [Input.parse(text) for text in texts]
    if not all(equals and name for name, equals, _ in named):
        raise ValueError(f"--input {' '.join(texts)}: give all inputs names, or none")
    return {name: Input.parse(text) for name, _, text in named}


def numbers(text: str, between: str, example: str) -> tuple[int, ...]:
    """ "2,3" or "2x2". Raises ValueError, which shows the example."""
    try:
        return tuple(int(n) for n in text.split(between) if n)
    except ValueError:
        raise ValueError(f"{text!r} are no numbers: write {example}") from None


def styled(text: str) -> dict[str, Any]:
    """ "*.fc1=col,*.fc2=row": how weights lie on a tensor axis, as `tensor_parallel` takes it."""
    known = {"col": "ColwiseParallel", "row": "RowwiseParallel"}
    found = {}
    for part in filter(None, text.split(",")):
        name, _, style = part.partition("=")
        if not name or style not in known:
            raise ValueError(f"{part!r} is no style: write *.fc1=col,*.fc2=row")
        found[name] = getattr(styles, known[style])()
    return found


def factory(path: str, arguments: Sequence[str] = ()) -> Callable[[], nn.Module]:
    """What makes the model that `path` names: "package.module:name" or "folder/file.py:name".

    The name is of a module class or of a function that returns a module, called with arguments
    like "width=64" (Python literals; what is none is a string). Raises ValueError where there is
    no such file, module or name, and where what it makes is no nn.Module.
    """
    where, _, name = path.rpartition(":")
    if not where:
        raise ValueError(f"{path!r}: write package.module:name or folder/file.py:name")
    found = getattr(_module(where), name, None)
    if not callable(found):
        raise ValueError(f"{where} has no class or function {name!r}")
    kwargs = dict(_argument(a) for a in arguments)

    def made() -> nn.Module:
        model = found(**kwargs)
        if not isinstance(model, nn.Module):
            raise ValueError(f"{path} made {type(model).__name__}, not an nn.Module")
        return model

    made.__name__ = name
    return made


def _module(where: str) -> Any:
    # as for a script: modules beside it, or in the current folder, can be imported
    file = Path(where)
    folder = str(file.parent.resolve() if where.endswith(".py") else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = file.stem if where.endswith(".py") else where
    if where.endswith(".py") and not file.is_file():
        raise ValueError(f"there is no file {where}")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name != name.partition(".")[0] and e.name != name:
            raise
        raise ValueError(f"there is no module {name}") from e


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"{text!r} is no argument: write width=64")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
