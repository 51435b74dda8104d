"""Which line of the user's code is running."""

from __future__ import annotations

import ast
import linecache
import os
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from types import FrameType

import torch

_OURS = tuple(
    os.path.join(folder, "")
    for folder in (
        str(Path(__file__).parent),
        str(Path(torch.__file__).parent),
        *{sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")},
    )
)
# the folder in which Inductor writes what it compiles
_COMPILED = f"{os.sep}torchinductor_"
# what runs a model without its values
_STEPS = tuple(
    os.path.join("shardtensor", *p) for p in (("plan", "estimate.py"), ("ranks", "rehearse.py"))
)
_SITE = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))

# frames of what called autograd's engine and is not back: its own threads have none of a user's
backwards: list[FrameType] = []


@lru_cache(maxsize=4096)
def is_library(file: str) -> bool:
    """Whether code of this file is this package's, torch's or Python's own."""
    if file.startswith(("<frozen", "<eval_with_key")) or _COMPILED in file:
        return True
    if file.startswith(_OURS[:2]):
        return True
    # packages lie inside the standard library's folder
    return file.startswith(_OURS[2:]) and not file.startswith(_SITE)


def _of_user(file: str) -> bool:
    """Whether the file is one that a user can open."""
    return not (file.startswith("<") or is_library(file))


def caller() -> FrameType | None:
    """The innermost frame outside of this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OURS[0]):
        frame = frame.f_back
    return frame


def call_of_user(frame: FrameType | None = None) -> tuple[str, str]:
    """ "file:line" of the innermost frame outside of this package, torch and Python's library.

    And the name of the function of this package that it called, if it called one. In a thread of
    autograd's own that of the call of backward, "" in others. frame: where to begin, if not here.
    """
    for begin in (frame or sys._getframe(1), *backwards[-1:]):
        at: FrameType | None = begin
        called = ""
        while at is not None:
            file = at.f_code.co_filename
            if _of_user(file):
                return f"{file}:{at.f_lineno}", called
            called = at.f_code.co_name if file.startswith(_OURS[0]) else ""
            at = at.f_back
    return "", ""


@lru_cache(maxsize=64)
def _conditions(file: str) -> tuple[tuple[int, int], ...]:
    """First and last lines of the conditions that end a loop which has no bound."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return ()
    found = []
    for loop in ast.walk(tree):
        if not isinstance(loop, ast.While):
            continue
        tests = [loop.test]
        if isinstance(loop.test, ast.Constant):
            inner = (n for n in ast.walk(loop) if isinstance(n, ast.If))
            ends = ast.Break | ast.Return
            tests = [n.test for n in inner if any(isinstance(b, ends) for b in n.body)]
        found += [(t.lineno, t.end_lineno or t.lineno) for t in tests]
    return tuple(found)


def loop_of_user() -> str:
    """ "file:line" of a `while` loop of the user's that what is read now may end, else ""."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.endswith(_STEPS):
        file = frame.f_code.co_filename
        if _of_user(file):
            line = frame.f_lineno
            if any(first <= line <= last for first, last in _conditions(file)):
                return f"{file}:{line}"
        frame = frame.f_back
    return ""


def line_of_step() -> str:
    """ "file:line" of the user's code that a step without values is at; "" in its backward."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.endswith(_STEPS):
        if _of_user(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def file_within(but: tuple[str, ...] = ()) -> str:
    """The file of this package that runs, that of these folders and files passed over, else ""."""
    frame: FrameType | None = sys._getframe(1)
    passed = tuple(_OURS[0] + b for b in but)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS[0]):
            if not file.startswith(passed):
                return file.removeprefix(_OURS[0])
        elif not is_library(file):
            return ""
        frame = frame.f_back
    return ""


def op_of(frame: FrameType | None) -> str:
    """The torch function on ShardTensors, or "backward", that the frame belongs to."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__torch_function__" and code.co_filename.startswith(_OURS[0]):
            return str(getattr(frame.f_locals.get("func"), "__name__", ""))
        if code.co_name == "_engine_run_backward":
            return "backward"
        frame = frame.f_back
    return ""


def error_line(error: BaseException) -> str:
    """The same for where an exception was raised."""
    found, at = "", error.__traceback__
    while at is not None:
        if _of_user(at.tb_frame.f_code.co_filename):
            found = f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}"
        at = at.tb_next
    return found


def described(error: BaseException) -> str:
    """An exception in one line: its type, message and the user's line."""
    line = error_line(error)
    return f"{type(error).__name__}: {error}" + (f" ({line})" if line else "")
