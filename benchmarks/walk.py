"""The path of somebody new, timed: from nothing to a forecast, each step held to one device.

    python benchmarks/walk.py                       # in a temporary folder
    python benchmarks/walk.py --folder DIR --pip="--extra-index-url URL" --docs

Makes an environment, installs torch and this checkout, then runs the commands of docs/walk.md on
copies of examples/walk.py and examples/walk_model.py. Prints seconds and what was held; --docs: as
the table of that page. Fails where a command fails, or numbers are not one device's.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMED = (
    "--input surface=1x2x33x64 --input upper=1x2x3x33x64 --input static=1x2x33x64 --input hour=1"
)
WALK = "walk.py train . --double"
# what it is for, the command as docs/walk.md has it, the run that it makes
STEPS = (
    ("is my model right?", f"shardtensor check walk_model.py:Weather {NAMED}", ""),
    (
        "what does it take?",
        "shardtensor plan walk_model.py:Weather --input surface=1x2x721x1440 --input "
        "upper=1x2x3x721x1440 --input static=1x2x721x1440 --input hour=1 --devices 2 --shard 2",
        "",
    ),
    ("data", "python walk.py data .", ""),
    ("one device", f"python {WALK} --name one", "one"),
    ("two ranks", f"torchrun --nproc-per-node 2 {WALK} --name two", "two"),
    ("half of it", f"torchrun --nproc-per-node 2 {WALK} --name half --steps 4", ""),
    ("the other half", f"torchrun --nproc-per-node 2 {WALK} --name half", "half"),
    (
        "data x domain, FSDP2",
        f"torchrun --nproc-per-node 4 {WALK} --name four --data 2 --fsdp all",
        "four",
    ),
)
COMPARED = """
import json, sys, warnings
import xarray as xr
warnings.simplefilter("error")
one, other = (xr.open_zarr(f"{n}/forecast.zarr") for n in sys.argv[1:])
print(json.dumps(float(abs(one - other).max().to_array().max())))
"""


def installed(folder, torch, pip):
    """The commands that make an environment."""
    python = folder / "env" / "bin" / "python"
    yield "environment", [sys.executable, "-m", "venv", folder / "env"]
    install = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *pip]
    yield "torch", [*install, torch]
    yield "shardtensor", [*install, f"{ROOT}[io,cli,html]", "xarray"]


def timed(what, command, folder, env):
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{what}: {shlex.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return seconds


def far(folder, python, name, env):
    """The largest differences from one device: of losses, relative, and of the forecast."""
    one, other = (json.loads((folder / n / "result.json").read_text()) for n in ("one", name))
    losses = max(abs(a - b) / abs(a) for a, b in zip(one["loss"], other["loss"], strict=True))
    done = subprocess.run([python, "-c", COMPARED, "one", name], cwd=folder, env=env,
                          capture_output=True, text=True, check=True)  # fmt: skip
    return losses, json.loads(done.stdout)


def walked(folder, torch, pip):
    """(what, command, seconds, held) of each step."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SHARDTENSOR_MESH")}
    env |= {"OMP_NUM_THREADS": "1", "SHARDTENSOR_HOME": str(folder / "home")}
    shown = ["python -m venv env", f"pip install {torch}", "pip install '.[io,cli,html]' xarray"]
    for (what, command), text in zip(installed(folder, torch, pip), shown, strict=True):
        yield what, text, timed(what, command, folder, env), ""
    bin = folder / "env" / "bin"
    env["PATH"] = f"{bin}{os.pathsep}{env['PATH']}"
    for name in ("walk.py", "walk_model.py"):
        (folder / name).write_text((ROOT / "examples" / name).read_text())
    for what, text, run in STEPS:
        seconds, held = timed(what, shlex.split(text), folder, env), ""
        if run and run != "one":
            losses, forecast = far(folder, bin / "python", run, env)
            if max(losses, forecast) > 1e-9:
                raise SystemExit(f"{what}: losses differ by {losses}, the forecast by {forecast}")
            held = f"losses {losses:.0e}, forecast {forecast:.0e}"
        yield what, text, seconds, held


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, help="where; kept")
    parser.add_argument("--torch", default="torch", help="as torch==2.13.0")
    parser.add_argument("--pip", default="", help="options of pip install")
    parser.add_argument("--docs", action="store_true", help="the table of docs/walk.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as other:
        folder = (args.folder or Path(other)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        total = 0.0
        if args.docs:
            print("| | seconds | from one device |\n|---|---|---|")
        for what, text, seconds, held in walked(folder, args.torch, shlex.split(args.pip)):
            total += seconds
            told = f"{what}: {held}" if held else what
            row, line = f"| {what} | {seconds:.0f} | {held} |", f"{seconds:6.1f} s  {told}"
            print(row if args.docs else f"{line}\n          {text}", flush=True)
        print(f"| all | {total:.0f} | |" if args.docs else f"{total:6.1f} s")


if __name__ == "__main__":
    main()
