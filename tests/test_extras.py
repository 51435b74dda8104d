"""Each extra alone brings what its part of the library needs, and without it a message names it."""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from extras import PROGRAMS, START
from forked import Program

ROOT = Path(__file__).parent.parent
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# tools of the repository, and of other libraries
NOT_OURS = {"dev", "zoo"}

HIDE = """
import sys
from importlib.machinery import PathFinder

class Installed:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] not in {blocked!r}:
            return PathFinder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(*context):
        for found in PathFinder.find_distributions(*context):
            if found.metadata["Name"].lower().replace("_", "-") not in {hidden!r}:
                yield found

for name in [n for n in sys.modules if n.split(".")[0] in {blocked!r}]:
    del sys.modules[name]
sys.meta_path[:] = [Installed if f is PathFinder else f for f in sys.meta_path]
"""
WITHOUT = {
    "io": ('io.write_zarr(x, "a.zarr", "t")', r"shardtensor\[io\]"),
    "mesh": ('io.read_mesh("a.ply")', r"shardtensor\[mesh\]"),
    "cli": (
        "from shardtensor import cli\ntry:\n    cli.main()\nexcept SystemExit as e:\n    raise RuntimeError(e.code)",
        r"shardtensor\[cli\]",
    ),
    "lightning": ("st.lightning", r"shardtensor\[lightning\]"),
    "accelerate": ("st.accelerate", r"shardtensor\[accelerate\]"),
    "transformers": ("st.transformers", r"shardtensor\[transformers\]"),
    "yaml": ('st.Options.from_yaml("a.yaml")', r"shardtensor\[yaml\]"),
}


def closure(names):
    """Distributions that are installed with these, by what each requires."""
    found, left = set(), [*names]
    while left:
        name = re.split(r"[^\w.-]", left.pop(), maxsplit=1)[0].lower().replace("_", "-")
        if name in found:
            continue
        found.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        left += [n for n in needs if "extra ==" not in n]
    return found


def modules():
    """Distribution: its top-level modules."""
    found = {}
    for module, names in metadata.packages_distributions().items():
        for name in names:
            found.setdefault(name.lower().replace("_", "-"), set()).add(module)
    return found


def run(tmp_path, extra, program):
    """(exit code, output) where only this extra is installed beside what the package needs."""
    optional = closure(n for k, names in EXTRAS.items() if k not in {"zoo"} for n in names)
    mine = closure([*EXTRAS.get(extra, ()), "torch", "numpy"])
    ours = modules()
    kept = set().union(*(ours.get(n, set()) for n in mine))
    blocked = set().union(*(ours.get(n, set()) for n in optional - mine)) - kept
    blocked -= sys.stdlib_module_names | {"shardtensor", "pkg_resources", "setuptools"}
    script = tmp_path / "job.py"
    hidden = sorted(optional - mine)
    head = HIDE.format(blocked=sorted(blocked), hidden=hidden)
    head += START.format(examples=str(ROOT / "examples"))
    script.write_text(f"import os\nos.chdir({str(tmp_path)!r})\n{head}{program}\nprint('done')\n")
    return Program(script).ended()


@pytest.mark.gloo
@pytest.mark.parametrize("extra", [e for e in EXTRAS if e not in NOT_OURS])
def test_alone(tmp_path, extra):
    needed = [re.split(r"[^\w.-]", n, maxsplit=1)[0] for n in EXTRAS[extra]]
    for name in needed:
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed")
    code, text = run(tmp_path, extra, PROGRAMS[extra])
    assert code == 0 and "done" in text, text[-3000:]


@pytest.mark.gloo
@pytest.mark.parametrize("extra", WITHOUT)
def test_without_it_the_message_names_it(tmp_path, extra):
    program, said = WITHOUT[extra]
    code, text = run(tmp_path, "", program)
    assert code != 0 and re.search(said, text), text[-3000:]
