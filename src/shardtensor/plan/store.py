"""Plans that were made before: kept as JSON, read but never run, while their code stays."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..comm.counters import Sent
from ..observe.network import folder
from ..train.options import Options
from .estimate import Estimate, Layout
from .step.course import Course
from .tree import Part


def file_of(asked: Mapping[str, Any]) -> Path:
    """Where the answer to a question is kept: plain values that say all of what was asked."""
    text = json.dumps([asked, torch.__version__], sort_keys=True, default=str)
    return folder() / "plans" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def save(path: Path, plans: Sequence[Estimate], **facts: Any) -> None:
    """Keep estimates and plain values, with what all loaded source files were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"files": _files(), "facts": facts, "plans": [_plain(e) for e in plans]}
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(found))
    part.replace(path)


def load(path: Path) -> tuple[list[Estimate], dict[str, Any]] | None:
    """What was kept; None if there is nothing, or a source file has changed since."""
    try:
        found = json.loads(path.read_text())
        if any(_state(name) != tuple(state) for name, state in found["files"].items()):
            return None
        return [_estimate(e) for e in found["plans"]], found["facts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _files() -> dict[str, tuple[int, int]]:
    """Size and time of every file that a module of this process came from."""
    names = {getattr(m, "__file__", None) for m in list(sys.modules.values())}
    found = {name: _state(name) for name in names if isinstance(name, str)}
    return {name: state for name, state in found.items() if state is not None}


def _state(name: str) -> tuple[int, int] | None:
    try:
        about = os.stat(name)
    except OSError:
        return None
    return about.st_size, about.st_mtime_ns


def _plain(e: Estimate) -> dict[str, Any]:
    found = {k: getattr(e, k) for k in e.__dataclass_fields__}
    found["layout"] = asdict(e.layout)
    # it is long, and nobody asks for it of a layout that was kept
    found["turns"] = ()
    found["sent"] = [asdict(replace(s, marks=None)) for s in e.sent]
    found["modules"] = {name: asdict(part) for name, part in e.modules.items()}
    found["course"] = None if e.course is None else asdict(e.course)
    return found


def _estimate(found: dict[str, Any]) -> Estimate:
    layout, course = found["layout"], found["course"]
    options = Options(**layout.pop("options"))
    dims, cuts = tuple(layout.pop("dims")), tuple(layout.pop("cuts"))
    known = dict(found)
    sizes, speeds = tuple(map(tuple, layout.pop("sizes"))), tuple(layout.pop("speeds"))
    known["layout"] = Layout(
        dims=dims, cuts=cuts, options=options, sizes=sizes, speeds=speeds, **layout
    )
    known["turns"] = ()
    known["sent"] = tuple(Sent(**{**s, "peers": tuple(s["peers"])}) for s in found["sent"])
    known["modules"] = {name: Part(**part) for name, part in found["modules"].items()}
    known["gathered"], known["assumed"] = tuple(found["gathered"]), tuple(found["assumed"])
    if course is not None:
        known["course"] = Course(
            tuple(course["at"]),
            tuple(map(tuple, course["held"])),
            tuple((name, at) for name, at in course["phases"]),
        )
    return Estimate(**known)
