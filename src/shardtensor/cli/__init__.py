"""The command line: `shardtensor plan`, `check`, `doctor` and `run` (extra `cli`)."""

from __future__ import annotations

import sys
from importlib import import_module

from .. import __version__

# one module each, whose function of the same name is the command; typer reads its signature
COMMANDS = ("check", "doctor", "plan", "run")


def main() -> None:
    """Run the command line; mistakes end it with one line and status 2."""
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as e:
        sys.exit(f"{e}: pip install shardtensor[cli]")
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def version(asked: bool) -> None:
        if asked:
            print(f"shardtensor {__version__}")
            raise typer.Exit

    @app.callback()
    def _(
        version: bool = typer.Option(
            False, "--version", callback=version, is_eager=True, help="Print the version."
        ),
    ) -> None:
        """Domain parallelism: know before you run."""

    try:
        for name in COMMANDS:
            module = import_module(f".{name}", __package__)
            app.command(name, **getattr(module, "SETTINGS", {}))(getattr(module, name))
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as e:
        print(f"shardtensor: {e}", file=sys.stderr)
        sys.exit(2)
