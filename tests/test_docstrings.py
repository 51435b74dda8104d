"""Docstrings of the public names: there, with shapes, the errors that are raised, and what is sent."""

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
# (C, latitude, longitude), (n,), or a shape in words
SHAPE = re.compile(r"shapes?\b|\bdims?\b|\((\.\.\.|\w+)(, ?\*?(\.\.\.|\w+( [-+*/] \w+)*))*,?\)")
# of `comm` and `torch.distributed`, what only asks
SILENT = re.compile(r"^(rank|size|group|along|planned|spread|knows|is_|get_|silent)")
# values, which nothing is asked for
FREE = re.compile(r"shardtensor\.(comm.(knows_values|rank|size|spreads?|along)|errors|spec|testing|ranks|plan\.\w+\.[A-Z]\w+|observe\.\w+\.[A-Z]\w+"
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
    r"|comm\.(counts|faults|window_add|spreads?|knows_values|check_values|windowed|asked|planned)$"
)  # fmt: skip


def own(of):
    """The function of a method or property, of a class what makes it; none of other libraries."""
    of = getattr(of, "__func__", None) or getattr(of, "fget", None) or of
    found = [inspect.unwrap(of)] if callable(of) else []
    if inspect.isclass(of):
        found = [vars(of).get(name) for name in ("__init__", "__post_init__")]
    return [f for f in found if inspect.isfunction(f) and "/shardtensor/" in f.__code__.co_filename]


def code(of, far=False):
    """(function, tree) of it and all functions of its module, or of any, that it names, and so on."""
    seen, todo = set(), own(of)
    while todo:
        f = todo.pop()
        if f in seen:
            continue
        seen.add(f)
        tree = ast.parse(textwrap.dedent(inspect.getsource(f)))
        yield f, tree
        names = (n.id for n in ast.walk(tree) if isinstance(n, ast.Name))
        near = (h for n in names for h in own(f.__globals__.get(n)) if h.__name__ == n)
        todo += [h for h in near if far or h.__module__ == f.__module__]


def raised(of):
    """The errors that it raises."""
    calls = (n.exc for _, tree in code(of) for n in ast.walk(tree) if isinstance(n, ast.Raise))
    return {getattr(c.func, "id", "") for c in calls if isinstance(c, ast.Call)} & RAISED


def sends(of):
    """Whether it calls a collective."""
    calls = (
        n.func for _, tree in code(of, True) for n in ast.walk(tree) if isinstance(n, ast.Call)
    )
    named = {(getattr(f.value, "id", ""), f.attr) for f in calls if isinstance(f, ast.Attribute)}
    return any(of in ("comm", "dist", "wire") and not SILENT.search(n) for of, n in named)


def tensors(of):
    """Whether a tensor is taken or given, by the annotations."""
    said = [s for f in own(of) for s in f.__annotations__.values()]
    return any(re.search(r"Tensor\b", str(s)) for s in said)


def test_there_are_many():
    assert len(NAMES) > 200 and raised(st.fallback) == {"ValueError"}
    # in a function that it calls, and where it is made
    assert "UnsupportedOpError" in raised(st.sparse.submanifold_conv)
    assert raised(st.io.DomainSampler) == {"ValueError"}
    assert sends(NAMES["shardtensor.graph.Topology.original"]) and not sends(st.Spec.of)
    assert sum(map(tensors, NAMES.values())) > 50


@pytest.mark.parametrize("kind", ["there", "errors", "shapes", "cost"])
def test_docstrings(kind):
    missing = []
    for name, of in NAMES.items():
        said = inspect.getdoc(of) or ""
        if kind == "there" and not said:
            missing.append(name)
        if kind == "errors":
            missing += [f"{name}: {e}" for e in sorted(raised(of)) if e not in said]
        if kind == "shapes" and tensors(of) and not SHAPE.search(said):
            missing.append(name)
        asked = not FREE.match(name) and ((name in TOP and callable(of)) or sends(of))
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
