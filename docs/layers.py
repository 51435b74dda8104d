"""The page docs/layers.md, from the contracts in pyproject.toml; prints it."""

import ast
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAD = """# Layers

A package imports only those below it, and a module of a package only those below it there;
`lint-imports` holds this, and that every module has its layer. What has no gap between does not
import each other. Made by `docs/layers.py`."""
TABLE = "| {} | what it is |\n|---|---|"


def first_line(name: str) -> str:
    """What a module's docstring says first."""
    folder = ROOT / "src" / Path(*name.split("."))
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.split(r"(?<=[.!?])\s|\n\n", text, maxsplit=1)[0].replace("\n", " ").rstrip(".")


def table(contract: dict) -> list[str]:
    """The modules of a container, from the top."""
    (container,) = contract["containers"]
    rows = [TABLE.format("package" if container == "shardtensor" else "module")]
    for layer in contract["layers"]:
        for name in re.split(r"[|:\s]+", layer.strip()):
            rows.append(f"| `{name}` | {first_line(f'{container}.{name}')} |")
        rows.append("| | |")
    return rows[:-1]


def page() -> str:
    """The page, as markdown."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    rows = [HEAD]
    for contract in (c for c in settings["contracts"] if c["type"] == "layers"):
        (container,) = contract["containers"]
        name = contract["name"]
        rows += ["", "## Packages" if container == "shardtensor" else f"## `{name}`", ""]
        rows += table(contract)
    return "\n".join(rows)


if __name__ == "__main__":
    print(page())
