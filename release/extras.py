"""Each extra alone, from the wheel in an environment of its own, does what it is for.

    make extras
    python release/extras.py [EXTRA ...] [--wheel FILE] [--keep DIR] [--pip="ARGUMENTS"]

All environments see one more, which holds torch at the version of constraints.txt and what torch
itself needs; so torch is installed once. --keep makes them in DIR and takes again what is there.
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from environments import PINS, ROOT, environment, pip, places, run

sys.path.insert(0, str(ROOT / "tests"))
from extras import PROGRAMS, START

PLAN = f"{ROOT}/examples/models.py:UNet --arg c_in=1 --arg c_out=1 --input 1x1x64x64 --devices 2"
DEMO = ["--resolution", "32", "--trajectories", "2", "--frames", "4", "--steps", "2"]


def tried(extra, wheel, base, folder, more):
    """Install this extra and run what it is for: the packages that it brought."""
    python = environment(folder)
    (places(python) / "base.pth").write_text(f"{places(base)}\n")
    pip(python, "install", "-q", *PINS, *more, f"{wheel}[{extra}]" if extra else wheel)
    pip(python, "check")
    work = folder / "work"
    work.mkdir(exist_ok=True)
    script = work / "job.py"
    script.write_text(START.format(examples=str(ROOT / "examples")) + PROGRAMS.get(extra, ""))
    run(python, "-W", "ignore", script, cwd=work)
    if extra == "demo":
        run(python, ROOT / "examples" / "demo.py", *DEMO, cwd=work)
    if extra == "cli":
        run(python.parent / "shardtensor", "plan", *PLAN.split(), cwd=work)
    return len(list(places(python).glob("*.dist-info")))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("extras", nargs="*")
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--keep", type=Path)
    parser.add_argument(
        "--pip", default="", help="more arguments of pip install, such as an index of torch"
    )
    args = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    known = [e for e in project["optional-dependencies"] if e in PROGRAMS]
    if unknown := set(args.extras) - {*known}:
        sys.exit(f"no extras: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        wheel, more = args.wheel, shlex.split(args.pip)
        if wheel is None:
            pip(sys.executable, "wheel", "-q", "--no-deps", "-w", folder / "wheel", ROOT)
            wheel = max((folder / "wheel").glob("*.whl"), key=lambda p: p.stat().st_mtime)
        base = environment(folder / "base")
        pip(base, "install", "-q", *PINS, *more, "torch", "numpy")
        for extra in args.extras or ["", *known]:
            start = time.monotonic()
            try:
                count = tried(extra, wheel.absolute(), base, folder / (extra or "none"), more)
                said = f"ok, {count} packages beside torch's"
            except (RuntimeError, subprocess.TimeoutExpired) as e:
                failed.append(extra)
                said = f"FAILED: {e}"
            print(f"{extra or '(none)':14}{time.monotonic() - start:4.0f} s  {said}", flush=True)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
