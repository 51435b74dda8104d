"""The page docs/layers.md, from the contract in pyproject.toml; prints it."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAD = """# Layers

A module imports only those below it; `lint-imports` holds this, and that every module has its
layer. Modules without a gap between them do not import each other, but where a note says so. Made
by `docs/layers.py`.

| module | what it is |
|---|---|"""


def first_line(name: str) -> str:
    """What a module's docstring says first."""
    folder = ROOT / "src" / "shardtensor" / name
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.split(r"(?<=[.!?])\s|\n\n", text, maxsplit=1)[0].replace("\n", " ").rstrip(".")


def page() -> str:
    """The page, as markdown."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    rows = [HEAD]
    for layer in contract["contracts"][0]["layers"]:
        names = re.split(r"\s*[|:]\s*", layer)
        together = " (these import each other when called)" if ":" in layer else ""
        rows += [
            f"| `{n}` | {first_line(n)}{together if i == 0 else ''} |" for i, n in enumerate(names)
        ]
        rows.append("| | |")
    return "\n".join(rows[:-1])


if __name__ == "__main__":
    print(page())
