"""Counts of the code's structure at commits, side by side.

    python benchmarks/structure.py [REV ...]     (default: the working tree's HEAD)

Read from git; nothing of the code is run. Function lengths are lines from `def` on, docstring
included.
"""

import ast
import re
import subprocess
import sys
from statistics import median, quantiles

PACKAGE = "src/shardtensor/"
PRIVATE = re.compile(r"(?<![\"'])\b(torch|dist|_C)\._[a-zA-Z]")


def git(*args):
    return subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout


def sources(rev):
    """Path below the package -> text."""
    names = git("ls-tree", "-r", "--name-only", rev, "--", PACKAGE).split()
    return {n.removeprefix(PACKAGE): git("show", f"{rev}:{n}") for n in names if n.endswith(".py")}


def inner_imports(tree):
    """Imports of the package itself inside functions."""
    inside = {
        n
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef)
        for n in ast.walk(f)
        if isinstance(n, ast.ImportFrom) and n.level
    }
    return len(inside)


def places_private(path):
    return path.split("/")[0].split(".")[0] in (
        "_torch", "_dtensor", "_probe", "_jit", "_checkpoint",
    )  # fmt: skip


def counts(rev):
    """What is counted -> number."""
    files = sources(rev)
    trees = {p: ast.parse(t) for p, t in files.items()}
    functions = [f for t in trees.values() for f in ast.walk(t) if isinstance(f, ast.FunctionDef)]
    lengths = [f.end_lineno - f.lineno + 1 for f in functions]
    bare = [
        f
        for f, n in zip(functions, lengths, strict=True)
        if n >= 20 and ast.get_docstring(f) is None
    ]
    names = [p.rsplit("/", 1)[-1] for p in files if not p.endswith("__init__.py")]
    code = "\n".join(files.values())
    outside = [
        line
        for p, t in files.items()
        if not places_private(p)
        for line in t.splitlines()
        if PRIVATE.search(line) and not line.lstrip().startswith(("#", "torch."))
    ]
    contracts = git("show", f"{rev}:pyproject.toml")
    return {
        "entries at the top level": len(
            {p.split("/")[0] for p in files} - {"__init__.py", "__main__.py"}
        ),
        "modules": len(files),
        "module names that occur more than once": len({n for n in names if names.count(n) > 1}),
        "contracts of layers": contracts.count("[[tool.importlinter.contracts]]"),
        "imports of the package inside functions": sum(map(inner_imports, trees.values())),
        "private uses of torch outside their place": len(outside),
        "files over 400 lines": sum(t.count("\n") > 400 for t in files.values()),
        "lines": sum(t.count("\n") for t in files.values()),
        "lines of rules": sum(t.count("\n") for p, t in files.items() if p.startswith("rules/")),
        "functions": len(functions),
        "function length, median": median(lengths),
        "function length, 90th percentile": quantiles(lengths, n=10)[-1],
        "function length, longest": max(lengths),
        "functions of 20 lines without a docstring": len(bare),
        "`assert x is not None`": len(re.findall(r"assert [\w.]+ is not None", code)),
        "`fmt: skip`": code.count("fmt: skip"),
    }


def main():
    revs = sys.argv[1:] or ["HEAD"]
    found = [counts(r) for r in revs]
    short = [git("rev-parse", "--short", r).strip() for r in revs]
    print(f"| | {' | '.join(short)} |", "|---" * (len(revs) + 1) + "|", sep="\n")
    for name in found[0]:
        print(f"| {name} | {' | '.join(f'{f[name]:g}' for f in found)} |")


if __name__ == "__main__":
    main()
