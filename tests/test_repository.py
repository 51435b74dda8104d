"""What is in the repository, and what is built from it."""

import ast
import importlib
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

import shardtensor as st

ROOT = Path(__file__).parent.parent


def _run(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_no_large_files():
    found = [ROOT / name for name in _run("git", "ls-files", "-z").split("\0") if name]
    large = [str(p) for p in found if p.exists() and p.stat().st_size > 2**20]
    assert len(found) > 100 and not large


def test_rows_of_benchmarks_hold_no_path_of_a_machine():
    files = sorted((ROOT / "benchmarks").glob("*_rows.jsonl"))
    rows = [line for p in files for line in p.read_text().splitlines()]
    path = re.compile(r"""["'\s(]/\w""")
    assert path.search('"result": "ValueError: (/a/b.py:1)"') and len(files) == 2
    assert len(rows) > 800 and not [line for line in rows if path.search(line)]


def _missing(tree):
    """What a file reads of the library's modules, private names too, that they do not have."""
    known = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shardtensor"):
            module = importlib.import_module(node.module)
            for a in node.names:
                if not hasattr(module, a.name):
                    importlib.import_module(f"{node.module}.{a.name}")
                known[a.asname or a.name] = getattr(module, a.name)
    read = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    named = [(n.value.id, n.attr) for n in read if isinstance(n.value, ast.Name)]
    return [
        f"{name}.{attr}" for name, attr in named
        if isinstance(known.get(name), types.ModuleType) and not hasattr(known[name], attr)
    ]  # fmt: skip


def test_benchmarks_read_names_that_exist():
    files = [*(ROOT / "benchmarks").rglob("*.py")]
    assert len(files) > 30
    found = {p.name: _missing(ast.parse(p.read_text())) for p in files}
    assert not {name: missing for name, missing in found.items() if missing}


def test_no_test_is_long():
    found = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    lines = {str(p.relative_to(ROOT)): p.read_text().count("\n") for p in found}
    assert len(lines) > 100 and not {name: n for name, n in lines.items() if n > 400}


def test_no_test_asserts_wall_clock_time():
    """What took how long says more of the machine than of the code: count, or put in order."""
    clock = re.compile(r"assert\b.*\b(perf_counter|monotonic|time\.time|process_time)\(")
    found = [p for p in (ROOT / "tests").rglob("*.py") if p.name != Path(__file__).name]
    assert not [p.name for p in found if clock.search(p.read_text())]


def test_the_version_of_the_command_line():
    assert (
        _run(sys.executable, "-m", "shardtensor", "--version") == f"shardtensor {st.__version__}\n"
    )


def test_the_version_is_the_same_wherever_it_stands():
    minor = st.__version__.rpartition(".")[0]
    said = {
        name: (ROOT / name).read_text() for name in ("CITATION.cff", "CHANGELOG.md", "README.md")
    }
    assert f"\nversion: {st.__version__}\n" in said["CITATION.cff"]
    assert re.search(rf"^## \[{re.escape(st.__version__)}\]", said["CHANGELOG.md"], re.MULTILINE)
    assert f"\nVersion {minor}, for" in said["README.md"]


def test_a_readme_for_an_index(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "release"))
    package = importlib.import_module("package")
    text = "![a map](docs/demo.png) [x](docs/plan.md#one) [y](https://a.b/c) [z](#here) `[1](2 3)`"
    assert package.absolute(text, "https://host/who/it/", "v1.2.0") == (
        "![a map](https://host/who/it/raw/v1.2.0/docs/demo.png) "
        "[x](https://host/who/it/blob/v1.2.0/docs/plan.md#one) [y](https://a.b/c) [z](#here) `[1](2 3)`"
    )
    readme = (ROOT / "README.md").read_text()
    assert len(package.LINK.findall(readme)) > 10
    assert not package.LINK.search(package.absolute(readme, "https://host/who/it", "v1.2.0"))


@pytest.mark.slow
def test_wheel_and_sdist(tmp_path, monkeypatch):
    # which looks through both
    _run(sys.executable, "release/package.py", "--tree", "--out", str(tmp_path))
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    # installed apart, found before the checkout: every module is there and imports
    apart = tmp_path / "apart"
    _run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "-t", str(apart), str(wheel))
    code = (
        f"import sys; sys.path.insert(0, {str(apart)!r}); import shardtensor; "
        "print(shardtensor.__file__, shardtensor.__version__)"
    )
    assert _run(sys.executable, "-c", code).split() == [
        str(apart / "shardtensor" / "__init__.py"),
        st.__version__,
    ]
    monkeypatch.syspath_prepend(str(ROOT / "release"))
    package = importlib.import_module("package")
    with zipfile.ZipFile(wheel, "a") as z:
        z.writestr("tests/test_it.py", "")
        z.writestr("shardtensor/__pycache__/spec.pyc", "")
    wrong = [*package.faults(wheel, sdist, ROOT)]
    assert len([w for w in wrong if "not of the package" in w]) == 2
    assert len([w for w in wrong if "RECORD and the wheel differ" in w]) == 2 and len(wrong) == 4
