"""The command line: `shardtensor plan`, `check` and `doctor` (extra `cli`)."""

from __future__ import annotations

import sys
from importlib import import_module

# one module each, whose function of the same name is the command; typer reads its signature
COMMANDS = ("check", "doctor", "plan")


def main() -> None:
    """Run the command line; mistakes end it with one line and status 2."""
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as e:
        sys.exit(f"{e}: pip install shardtensor[cli]")
    app = typer.Typer(
        help="Domain parallelism: know before you run.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    # so that there are commands, also where there is one
    app.callback()(lambda: None)
    for name in COMMANDS:
        app.command(name)(getattr(import_module(f".{name}", __package__), name))
    try:
        app()
    except ValueError as e:
        print(f"shardtensor: {e}", file=sys.stderr)
        sys.exit(2)
