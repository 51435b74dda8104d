"""What code names, and whether a class is a user's."""

from __future__ import annotations

import sys
import types

from torch import Tensor

from ..caller import is_library


def names_of(code: types.CodeType, strings: bool = False) -> set[str]:
    """The globals and attributes that code and the functions within it name; maybe as strings."""
    inner = (names_of(c, strings) for c in code.co_consts if isinstance(c, types.CodeType))
    words = (c for c in code.co_consts if strings and isinstance(c, str))
    return {*code.co_names, *words}.union(*inner)


def operators(cls: type) -> set[str]:
    """The special methods of a user's class that an expression may call."""
    own = (vars(c) for c in cls.__mro__ if of_user(c))
    return {
        k for d in own for k, v in d.items() if _special(k) and isinstance(v, types.FunctionType)
    }


def _special(name: str) -> bool:
    made = (
        "__init__",
        "__new__",
        "__repr__",
        "__str__",
        "__del__",
        "__reduce__",
        "__getattribute__",
    )
    return name.startswith("__") and name not in (
        *made,
        "__setattr__",
        "__getstate__",
        "__setstate__",
    )


def of_user(cls: type) -> bool:
    """Whether a class is written in Python, outside of this library, torch and Python's own."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None) or ("" if cls.__module__ == "__main__" else "<frozen>")
    return not is_library(file) and not issubclass(cls, Tensor)
