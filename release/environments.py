"""Environments of their own, in which a wheel is tried."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PINS = ("-c", ROOT / "constraints.txt")


def run(*command, cwd=None):
    """What the command printed; where it fails, RuntimeError with the end of it."""
    command = [str(c) for c in command]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=cwd, timeout=1800, **output)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:300]}\n{done.stdout[-3000:]}")
    return done.stdout


def environment(folder):
    """The interpreter of the environment in this folder, which is made where it is not."""
    if not (folder / "bin").exists():
        run(sys.executable, "-m", "venv", folder)
    return folder / "bin" / "python"


def pip(python, *arguments):
    return run(python, "-m", "pip", "--disable-pip-version-check", *arguments)


def places(python):
    """The folder where its packages are."""
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
