"""Every type of the public API is known to pyright: `make typed`.

Of what docs/api.md lists, as an installed wheel shows it to who uses it. pyright and Node.js are
installed into an environment of their own.
"""

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from environments import ROOT, environment, pip, places

sys.path.insert(0, str(ROOT / "tests"))
from test_docstrings import NAMES

# bases of others' classes, whose types are theirs
THEIRS = {"shardtensor.accelerate.accelerator.Accelerator"}


def public():
    """Where those names are defined."""
    for of in NAMES.values():
        of = getattr(of, "__func__", None) or getattr(of, "fget", None) or of
        if inspect.isclass(of) or inspect.isfunction(of):
            yield f"{of.__module__}.{of.__qualname__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--keep", type=Path, help="the environment's folder")
    keep = parser.parse_args().keep
    with tempfile.TemporaryDirectory() as temporary:
        folder = (keep or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        python = environment(folder / "typed")
        pip(python, "install", "-q", "pyright[nodejs]")
        # beside the packages of this environment, torch among them
        others = [p for p in sys.path if p.endswith("site-packages")]
        (places(python) / "others.pth").write_text("".join(f"{p}\n" for p in others))
        pip(python, "install", "-q", "--no-deps", "--force-reinstall", ROOT)
        command = [python.parent / "pyright", "--verifytypes", "shardtensor"]
        # the interpreter that pyright asks where packages are
        env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        env |= {"PATH": f"{python.parent}:{env['PATH']}", "VIRTUAL_ENV": str(folder / "typed")}
        done = subprocess.run(
            [*command, "--ignoreexternal", "--outputjson"],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
        )
    found = json.loads(done.stdout)["typeCompleteness"]
    names = tuple(f"{n}." for n in set(public()) - THEIRS)
    mine = [s for s in found["symbols"] if f"{s['name']}.".startswith(names)]
    bad = [s for s in mine if not s["isTypeKnown"] or s["isTypeAmbiguous"]]
    for s in bad:
        print(s["name"], *(d["message"] for d in s["diagnostics"][:1]), sep=": ")
    score = found["completenessScore"]
    print(f"{len(mine)} public names, {len(bad)} of unknown type; of all that is there {score:.1%}")
    sys.exit(bool(bad) or len(mine) < 300)


if __name__ == "__main__":
    main()
