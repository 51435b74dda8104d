"""Docstrings of the public names: there, with the errors that are raised, and what is sent."""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path

import pytest

import shardtensor as st

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
ENTRY = re.compile(r"^::: (\S+)\n(?:    options:\n      members: \[(.*)\])?", re.M)
# what may be raised for another's mistake
RAISED = {"ValueError", "TypeError", "IndexError", "KeyError", "ImportError", "UnsupportedOpError"}
COST = re.compile(
    r"\b(sen[dt]s?|communicate[ds]?|messages?|travels?|(all-)?gather(s|ed)?|all-reduce|all-gather|collective"
    r"|exchange[ds]?|in this process|(each|every|this|one) rank|whole|summed)\b",
    re.I,
)  # fmt: skip
# values, which nothing is asked for, and the collectives, of which docs/design.md has a table
FREE = re.compile(r"shardtensor\.(comm|errors|spec|testing|ranks|plan\.\w+\.[A-Z]\w+|observe\.\w+\.[A-Z]\w+"
                  r"|Dim|Spec|Options|.*(Error|Warning)$|.*\.(Mesh|Points|Tiled|Paging)$)")  # fmt: skip


def found(path):
    """What a dotted name means; None where it needs a package that is not there."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        parent, _, name = path.rpartition(".")
        return getattr(found(parent), name)
    except ImportError:
        return None


def listed():
    """(name, object) of what docs/api.md shows, and of `shardtensor` itself."""
    for path, members in ENTRY.findall(PAGE.read_text()):
        of = found(path) if "transformers" not in path else None
        names = [n.strip().strip('"') for n in members.split(",") if n.strip()]
        if inspect.ismodule(of):
            own = (n for n, v in vars(of).items() if getattr(v, "__module__", "") == of.__name__)
            names = names or getattr(of, "__all__", None) or [n for n in own if n[0] != "_"]
        elif of is not None:
            yield path, of
        yield from ((f"{path}.{n}", inspect.getattr_static(of, n)) for n in names)
    yield from ((f"shardtensor.{n}", getattr(st, n)) for n in st.__all__)


def names():
    """Those, once each, with the public methods of classes that are ours."""
    for name, of in dict(listed()).items():
        yield name, of
        if inspect.isclass(of) and name.count(".") > 1 and "ShardTensor" not in name:
            for key, method in vars(of).items():
                kinds = (property, classmethod, staticmethod)
                if key[0] != "_" and (inspect.isfunction(method) or isinstance(method, kinds)):
                    yield f"{name}.{key}", method


# methods of a class of another library are documented there
THEIRS = ("DomainParallel.", "Accelerator.")
NAMES = {n: o for n, o in names() if not inspect.ismodule(o) and not any(t in n for t in THEIRS)}
TOP = set(dict(listed()))
# what functions give, what rules alone call, and loops, which are called in other examples' files
GIVEN = re.compile(
    r"\.(observe\.(network|whole|timeline)|plan\.(plans|estimate\.Device|estimate\.Estimate|parts\.InParts))"
    r"|\.(Tiled|Paging|Graph|Source|Report|Mesh|DomainParallel|Accelerator)$|(Error|Warning)$|replicated$"
    r"|comm\.(counts|window_add|spreads?|knows_values|windowed|asked|planned)$"
)  # fmt: skip


def raised(of):
    """The errors that a function raises itself."""
    of = getattr(of, "__func__", None) or getattr(of, "fget", None) or of
    of = inspect.unwrap(of)
    if not inspect.isfunction(of) or "shardtensor" not in (inspect.getsourcefile(of) or ""):
        return set()
    tree = ast.parse(textwrap.dedent(inspect.getsource(of)))
    calls = (n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise))
    return {getattr(c.func, "id", "") for c in calls if isinstance(c, ast.Call)} & RAISED


def test_there_are_many():
    assert len(NAMES) > 200 and raised(st.fallback) == {"ValueError"}


@pytest.mark.parametrize("kind", ["there", "errors", "cost"])
def test_docstrings(kind):
    missing = []
    for name, of in NAMES.items():
        said = inspect.getdoc(of) or ""
        if kind == "there" and not said:
            missing.append(name)
        if kind == "errors":
            missing += [f"{name}: {e}" for e in sorted(raised(of)) if e not in said]
        asked = name in TOP and callable(of) and not FREE.match(name)
        if kind == "cost" and asked and not COST.search(said):
            missing.append(name)
    assert not missing


def test_each_is_in_an_example():
    """Code of the pages runs, by tests/test_docs.py."""
    pages = [*PAGE.parent.rglob("*.md"), PAGE.parent.parent / "CONTRIBUTING.md"]
    code = "".join(
        b for p in pages for b in re.findall(r"```python\n(.*?)```", p.read_text(), re.S)
    )
    used = set(re.findall(r"\w+", code))
    asked = [n for n in TOP if callable(NAMES.get(n)) and not GIVEN.search(n)]
    assert len(asked) > 80 and not [n for n in asked if n.rpartition(".")[2] not in used]
